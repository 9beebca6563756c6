"""A scheduler of the core, a model of the device under it, and what must hold between the two."""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from helpers.path_groups import Generation, GroupSpec
from helpers.scheduler_draws import Draw, Event, Spec

from stars_fast import _core

PHASES = 3  # of a plan's work on the device: copies, prefill, draft


@dataclass
class InFlightPlan:
    """A plan that is out, and what its requests were when it was made."""

    plan: _core.Plan
    known: dict[int, list[int]]
    steps: int  # of its draft, at most; rows that need more go on in a later plan
    issued: int = 0  # phases that the device was given
    written: set[int] = field(default_factory=set)  # slots
    read: set[int] = field(default_factory=set)  # pages
    aborted: set[int] = field(default_factory=set)


@dataclass(eq=False)
class Party:
    """A group, the requests that are its paths, and what it has yet to do."""

    requests: list[int]
    generations: deque[Generation]


class Device:
    """Pages whose slots hold a digest of the tokens up to theirs, as keys and values depend on."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.slots = [-1] * (num_pages * page_size)

    def run(self, flight: InFlightPlan, specs: dict[int, Spec], phases: int) -> None:
        """Run a plan's phases as far as `phases`."""
        plan = flight.plan
        while flight.issued < phases:
            if flight.issued == 0:
                sources, targets, counts = (column.tolist() for column in plan.copies)
                for source, target, count in zip(sources, targets, counts, strict=True):
                    for slot in range(count):
                        value = self.slots[source * self.page_size + slot]
                        self.slots[target * self.page_size + slot] = value
            elif flight.issued == 1:
                fed = iter(plan.prefill_tokens.tolist())
                for row in range(plan.prefill.num_rows):
                    tokens = [next(fed) for _ in range(plan.prefill.new_lengths[row])]
                    self._write(plan.prefill, row, tokens)
            else:
                for row, request in enumerate(plan.request.tolist()):
                    drawn = int(plan.drawn[row])
                    made = draw_of(plan, row, specs[request]).tokens
                    known = flight.known[request] + made[:drawn]
                    new = made[drawn : drawn + flight.steps]
                    assert self._prefix(plan.draft, row) == digests(0, known[:-1])
                    self._write(plan.draft, row, [known[-1], *new[:-1]])
            flight.issued += 1

    def _prefix(self, batch: _core.Batch, row: int) -> list[int]:
        group = batch.row_group[row]
        padding = range(batch.padding_start[group], batch.padding_end[group])
        pages = batch.group_pages[group].tolist()
        return [
            self.slots[pages[slot // self.page_size] * self.page_size + slot % self.page_size]
            for slot in range(batch.group_extent[group])
            if slot not in padding
        ]

    def _write(self, batch: _core.Batch, row: int, tokens: list[int]) -> None:
        prefix = self._prefix(batch, row)
        for slot, value in zip(  # a row that stopped is shorter than planned
            batch.slots[row].tolist(), digests(prefix[-1] if prefix else 0, tokens), strict=False
        ):
            self.slots[slot] = value


def draw_of(plan: _core.Plan, row: int, spec: Spec) -> Draw:
    """What a row of a plan draws, and has drawn of its segment."""
    position = int(plan.position[row] - plan.drawn[row])
    return spec.draw(position, int(plan.attempt[row]), int(plan.stream[row]))


def digests(before: int, tokens: list[int]) -> list[int]:
    values = []
    for token in tokens:
        before = hash((before, token))
        values.append(before)
    return values


def slots_written(batch: _core.Batch) -> list[int]:
    return [
        slot
        for row in range(batch.num_rows)
        for slot in batch.slots[row, : batch.new_lengths[row]].tolist()
    ]


def pages_read(batch: _core.Batch, group: int, page_size: int) -> set[int]:
    pages = -(-int(batch.group_extent[group]) // page_size)
    return set(batch.group_pages[group, :pages].tolist())


class Driver:
    """A scheduler, the device under it, and what must hold between the two.

    `out` holds the plans that are out, oldest first. With a `pace`, the seed of their steps, rounds
    end at any step, and rows that have not ended go on.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_rows: int = 256,
        lanes: int = 1,
        pace: int | None = None,
        **options: int,
    ) -> None:
        self.pace = None if pace is None else random.Random(pace)
        self.under_way: dict[tuple[int, int], Draw] = {}  # by request and attempt
        self.page_size = page_size
        self.max_rows = max_rows
        self.lanes = lanes
        self.scheduler = _core.Scheduler(
            num_pages=num_pages,
            page_size=page_size,
            max_rows=max_rows,
            lanes=lanes,
            **options,  # type: ignore[arg-type]
        )
        self.device = Device(num_pages, page_size)
        self.next_id = 0
        self.specs: dict[int, Spec] = {}
        self.expected: dict[int, deque[Event]] = {}  # events to come
        self.committed: dict[int, list[int]] = {}
        self.ended: set[int] = set()
        self.parties: dict[int, Party] = {}  # by each of their requests
        self.drawn: dict[tuple[int, ...], tuple[int, ...]] = {}  # by counter: what came before
        self.out: deque[InFlightPlan] = deque()

    @property
    def alive(self) -> list[int]:
        return sorted(set(self.specs) - self.ended)

    def add(self, spec: Spec) -> int:
        request = self.next_id
        self.next_id += 1
        spec.add_to(self.scheduler, request)
        self.specs[request] = spec
        self.expected[request] = deque(spec.outcome())
        self.committed[request] = []
        return request

    def add_group(self, spec: GroupSpec) -> list[int]:
        requests = [self.next_id + number for number in range(len(spec.paths))]
        spec.add_to(self.scheduler, requests)
        self.next_id += len(requests)
        party = Party(requests, deque(spec.outcome()))
        for request, path in zip(requests, spec.paths, strict=True):
            self.specs[request] = path
            self.parties[request] = party
            self.committed[request] = []
        self._expect_generation(party)
        return requests

    def _expect_generation(self, party: Party) -> None:
        events = party.generations[0].events
        for number, request in enumerate(party.requests):
            self.expected[request] = deque([events[number]] if number in events else [])

    def abort(self, request: int) -> None:
        assert self.scheduler.abort(request)
        party = self.parties.get(request)
        for one in [request] if party is None else party.requests:
            assert not self.scheduler.abort(one)
            self.ended.add(one)
            for flight in self.out:
                flight.aborted.add(one)

    def plan(self) -> InFlightPlan:
        plan = self.scheduler.plan()
        known = {
            request: self.specs[request].prompt + self.committed[request]
            for request in plan.request.tolist()
        }
        steps = 1000 if self.pace is None else self.pace.choice([1, 1, 2, 5, 1000])
        flight = InFlightPlan(plan, known, steps)
        self.check_plan(flight)
        self.out.append(flight)
        for request in plan.unscored.tolist():
            self.scheduler.set_prompt_reward(request, self.specs[request].prompt_reward)
        return flight

    def issue(self, plans: int, phases: int = PHASES) -> None:
        """Give the device all the work of the first `plans` that are out, and some of the next."""
        for number, flight in enumerate(self.out):
            if number <= plans:
                self.device.run(flight, self.specs, PHASES if number < plans else phases)

    def commit(self) -> _core.Decision:
        self.issue(1, 0)
        flight = self.out.popleft()
        plan = flight.plan
        owners = [*plan.request.tolist(), *plan.held.tolist()]
        attempts = [*plan.attempt.tolist(), *plan.held_attempt.tolist()]
        rows = len(owners)
        tokens = np.zeros((rows, 64), np.int64)
        lengths, stopped = np.zeros(rows, np.int32), np.zeros(rows, np.uint8)
        rewards, breaks = np.zeros(rows), np.zeros(rows, np.uint8)
        unfinished = np.zeros(rows, np.uint8)
        waits: dict[int, int] = {}  # the first attempt of a request that goes on
        for row, key in enumerate(zip(owners, attempts, strict=True)):
            if row < plan.draft.num_rows:
                made = self.under_way[key] = draw_of(plan, row, self.specs[key[0]])
                ran = int(plan.drawn[row]) + flight.steps
                if ran < len(made.tokens):
                    made = dataclasses.replace(made, tokens=made.tokens[:ran], stopped=False)
                    unfinished[row] = 1
                    waits[key[0]] = min(key[1], waits.get(key[0], key[1]))
            made = made if unfinished[row] else self.under_way[key]
            lengths[row], stopped[row], rewards[row] = len(made.tokens), made.stopped, made.reward
            tokens[row, : lengths[row]] = made.tokens
            breaks[row] = made.breaks
        for row, (request, attempt) in enumerate(zip(owners, attempts, strict=True)):
            if request in waits and attempt >= waits[request]:
                rewards[row] = np.nan  # nobody has asked for it
        decision = self.scheduler.commit(
            tokens,
            lengths,
            stopped,
            rewards,
            1e-3,
            breaks if breaks.any() else None,
            unfinished if unfinished.any() else None,
        )
        self.check_decision(flight, decision, tokens)
        return decision

    def cancel(self) -> None:
        self.scheduler.cancel()
        self.out.clear()

    def finish(self, rounds: int) -> None:
        """Run what is left, with as many plans out as there may be; fail after too many rounds."""
        for _ in range(rounds if self.pace is None else 8 * rounds):
            while len(self.out) < self.lanes:
                self.plan()
            self.commit()
            self.scheduler.check()
            if not self.scheduler.has_unfinished:
                break
        while self.out:
            self.commit()
        assert not self.scheduler.has_unfinished
        assert self.ended == set(self.specs)
        assert self.scheduler.pages_used == 0

    def check_plan(self, flight: InFlightPlan) -> None:
        plan = flight.plan
        draft = plan.draft
        assert draft.num_rows == len(plan.request) <= self.max_rows
        # Rows that go on read what they have drawn, the others the request's prefix together.
        fresh = {request for request, n in zip(plan.request, plan.drawn, strict=True) if n == 0}
        assert len(fresh) + np.count_nonzero(plan.drawn) == draft.num_groups
        assert set(plan.held.tolist()) <= set(plan.request.tolist())
        # Slots that this round writes are all different and none is of the null page.
        written = slots_written(plan.prefill) + slots_written(draft)
        flight.written = set(written)
        assert len(flight.written) == len(written)
        assert all(slot >= self.page_size for slot in written)
        # No draft row writes into a page that another group reads, nor to a slot that its own does.
        for group in range(draft.num_groups):
            read = pages_read(draft, group, self.page_size)
            assert 0 not in read
            for row in range(draft.num_rows):
                written = draft.slots[row, : draft.new_lengths[row]].tolist()
                if draft.row_group[row] != group or not plan.drawn[row]:
                    assert not read & {slot // self.page_size for slot in written}
                else:
                    pages = draft.group_pages[group].tolist()
                    last = int(draft.group_extent[group]) - 1
                    behind = pages[last // self.page_size] * self.page_size
                    assert written[0] == (behind + last % self.page_size + 1) or (
                        written[0] // self.page_size not in read
                    )
            flight.read |= read
        for group in range(plan.prefill.num_groups):
            flight.read |= pages_read(plan.prefill, group, self.page_size)
        # A group's valid slots are the tokens before the row's first.
        valid = draft.group_extent - (draft.padding_end - draft.padding_start)
        np.testing.assert_array_equal(valid[draft.row_group], draft.row_start)
        for row, request in enumerate(plan.request.tolist()):
            assert request not in self.ended
            assert self.expected[request], "a path that waits for others, or has ended"
            drawn = int(plan.drawn[row])
            known = flight.known[request] + draw_of(plan, row, self.specs[request]).tokens[:drawn]
            assert draft.row_start[row] == len(known) - 1
            assert plan.first_token[row] == known[-1]
            assert plan.position[row] == len(self.committed[request]) + drawn
            self._check_counters(plan, row, flight.known[request])
        # Copies can run side by side.
        sources, targets, _ = (set(column.tolist()) for column in plan.copies)
        assert len(targets) == len(plan.copies[1])
        assert not sources & targets
        # Nothing here touches what a plan that is out works on.
        for other in self.out:
            assert not set(plan.request.tolist()) & set(other.plan.request.tolist())
            assert not flight.written & other.written
            pages = {slot // self.page_size for slot in flight.written} | targets
            assert not pages & other.read
            assert not pages & {slot // self.page_size for slot in other.written}
        if self.scheduler.has_unfinished and not self.out:
            assert draft.num_rows + plan.prefill.num_rows > 0, "a round that moves nobody"

    def _check_counters(self, plan: _core.Plan, row: int, known: list[int]) -> None:
        """No counter is used twice, but where a round that was undone is drawn again.

        Where attempts are rejected, all that is planned may be drawn, and more than is kept.
        """
        spec = self.specs[int(plan.request[row])]
        length = len(draw_of(plan, row, spec).tokens) - int(plan.drawn[row])
        if spec.scored and spec.max_attempts > 1:
            length = int(plan.draft.new_lengths[row])
        seed, attempt, stream = (int(x[row]) for x in (plan.seed, plan.attempt, plan.stream))
        begin = int(plan.position[row])
        for position in range(begin, begin + length):
            counter = (int(plan.request[row]), seed, position, attempt, stream)
            assert self.drawn.setdefault(counter, tuple(known)) == tuple(known)

    def check_decision(
        self, flight: InFlightPlan, decision: _core.Decision, tokens: npt.NDArray[np.int64]
    ) -> None:
        touched: list[Party] = []
        for event, request in enumerate(decision.request.tolist()):
            assert request in flight.known
            assert request not in flight.aborted | self.ended
            due = self.expected[request].popleft()
            assert decision.start[event] == due.start == len(self.committed[request])
            assert decision.kind[event] == due.kind
            assert decision.attempts[event] == due.attempts
            assert decision.finish[event] == due.finish
            assert decision.length[event] == len(due.tokens)
            row = int(decision.row[event])
            if row >= 0:
                assert [*flight.plan.request, *flight.plan.held][row] == request
            if row >= 0 and due.kind != _core.EVENT_FAILED:
                assert decision.outcome[row] == _core.ROW_WINNER
                assert tokens[row, : len(due.tokens)].tolist() == due.tokens
            self.committed[request] += due.tokens
            if request in self.parties:
                if self.parties[request] not in touched:
                    touched.append(self.parties[request])
            elif due.goes_on:
                known = self.specs[request].prompt + self.committed[request]
                assert self.scheduler.tokens(request) == known
            else:
                assert not self.expected[request]
                self.ended.add(request)
        self._check_groups(decision, touched)

    def _check_groups(self, decision: _core.Decision, touched: list[Party]) -> None:
        """Compare what the decision says of groups, and carry it out."""
        copies: list[tuple[int, int]] = []
        dropped: list[int] = []
        chosen: list[int] = []
        for party in touched:
            requests, generation = party.requests, party.generations[0]
            alive = [request for request in requests if request not in self.ended]
            made = {n: e for n, e in generation.events.items() if not self.expected[requests[n]]}
            if any(event.kind == _core.EVENT_FAILED for event in made.values()):
                self.ended |= set(alive)
                continue
            if len(made) < len(generation.events):
                continue
            party.generations.popleft()
            for target, source in generation.copies:
                copies.append((requests[target], requests[source]))
                self.committed[requests[target]] = list(self.committed[requests[source]])
            dropped += [requests[number] for number in generation.dropped]
            self.ended |= set(dropped)
            if generation.chosen is not None:
                chosen.append(requests[generation.chosen])
                self.ended |= set(requests)
                assert not party.generations
                continue
            self._expect_generation(party)
            for request in set(alive) - self.ended:
                known = self.specs[request].prompt + self.committed[request]
                assert self.scheduler.tokens(request) == known
        found = zip(decision.copy_target.tolist(), decision.copy_source.tolist(), strict=True)
        assert sorted(found) == sorted(copies)
        assert sorted(decision.dropped.tolist()) == sorted(dropped)
        assert sorted(decision.chosen.tolist()) == sorted(chosen)
