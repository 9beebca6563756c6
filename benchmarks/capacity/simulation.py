"""Load on the real scheduler, with a synthetic clock in the place of a GPU.

The C++ scheduler plans and commits round after round. Nothing is computed in between: a round takes
the time that its work needs at the machine's ceilings (`least`), rewards are drawn, and the clock
moves on. So a million requests take minutes, and the queue, the pages and the choice of candidates
are the real ones. The times are not: see docs/capacity.md for what they leave out.

A *wait* is the time from a request's arrival to the start of the first round that drafts for it. A
*row* is a candidate segment drafted in a round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stars_fast import _core
from stars_fast.benchmarks.capacity.replica import Replica, RoundTime, round_time
from stars_fast.benchmarks.capacity.workload import Floats, Ints, Requests, Workload

#: Returns the time of a round, as `round_time` does.
TimeOf = Callable[[_core.Plan, npt.NDArray[np.int32], Replica], RoundTime]
#: Of `Scheduler.add`: as many candidates as pay off.
AUTO = 0
#: Part of the requests, the first to arrive, that no figure counts.
WARM_UP = 0.1
# Purpose of the draws, in the counter of the generator: the engine uses 0 and 1.
_PURPOSE = 2


@dataclass(frozen=True)
class Rounds:
    """What happened in each round, ``[rounds]`` each.

    Attributes
    ----------
    begin, seconds
        Of the simulated clock.
    requests, rows
        That were drafted for, and drafted.
    pages
        In use while the round ran.
    drafted, accepted
        Tokens; a fallback counts as accepted, since it becomes part of the response.
    segments
        Rows that became part of a response.
    preemptions
        Requests that lost their pages.
    """

    begin: Floats
    seconds: Floats
    requests: Ints
    rows: Ints
    pages: Ints
    drafted: Ints
    accepted: Ints
    segments: Ints
    preemptions: Ints


@dataclass(frozen=True)
class Outcome:
    """A simulation, to its last request's end.

    Attributes
    ----------
    requests
        As they arrived.
    start, first, end
        Of each request, ``[n]``: when the first round that drafts for it began, when its first
        segment was there, and its last. Seconds of the simulated clock.
    tokens, ends
        Response tokens that each request got, and how often it finished, ``[n]``.
    rounds
        All of them.
    stats
        Of the scheduler.
    num_pages
        That can be given out.
    pages_held
        When nothing was left to do.
    """

    requests: Requests
    start: Floats
    first: Floats
    end: Floats
    tokens: Ints
    ends: Ints
    rounds: Rounds
    stats: dict[str, int]
    num_pages: int
    pages_held: int

    @property
    def wait(self) -> Floats:
        """Seconds from arrival to the start of the first round, ``[n]``."""
        return self.start - self.requests.arrival

    def summary(self) -> dict[str, float]:
        """Return the figures without warm-up and end.

        Of requests: all but the first tenth to arrive. Of rounds: those that began between the
        arrival of the first request that counts and that of the last one.
        """
        arrival, rounds = self.requests.arrival, self.rounds
        counted = np.arange(len(arrival)) >= int(WARM_UP * len(arrival))
        begin, end = float(arrival[counted][0]), float(arrival[-1])
        inside = (rounds.begin >= begin) & (rounds.begin <= end)
        if not inside.any():
            raise ValueError(f"no round began between {begin:g} and {end:g} s: simulate more")
        seconds, rows = rounds.seconds[inside], rounds.rows[inside]
        drafted, accepted, segments, preemptions = (
            int(x[inside].sum())
            for x in (rounds.drafted, rounds.accepted, rounds.segments, rounds.preemptions)
        )
        window = max(float((rounds.begin + rounds.seconds)[inside].max()), end) - begin
        share = rounds.pages[inside] / self.num_pages
        found = {
            "requests": float(len(arrival)),
            "rounds": float(inside.sum()),
            "busy_share": float(seconds.sum()) / window,
            "accepted_tokens_per_second": accepted / window,
            "drafted_per_accepted": drafted / accepted,
            "rows_not_accepted_share": 1.0 - segments / int(rows.sum()),
            "round_seconds_mean": float(seconds.mean()),
            "rows_mean": float(rows.mean()),
            "rows_per_request_mean": float(rows.sum() / rounds.requests[inside].sum()),
            "requests_mean": float(rounds.requests[inside].mean()),
            "page_share_mean": float(np.average(share, weights=seconds)),
            "page_share_max": float(share.max()),
            "preemptions_per_request": preemptions / int(counted.sum()),
        }
        for name, times in (("wait", self.start), ("first", self.first), ("end", self.end)):
            at = np.quantile((times - arrival)[counted], [0.5, 0.99])
            found[f"{name}_seconds_p50"], found[f"{name}_seconds_p99"] = at.tolist()
        return found


def simulate(
    requests: Requests,
    workload: Workload,
    replica: Replica,
    candidates: int,
    *,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
    time_of: TimeOf = round_time,
) -> Outcome:
    """Serve requests on one replica until the last one ends.

    Whether an attempt passes depends on the seed, the request, the position and the attempt alone,
    as in the engine: so every number of candidates accepts the same attempts.

    Parameters
    ----------
    requests
        What arrives.
    workload
        Whose segment length, attempts and `max_tokens` the requests have.
    replica
        That serves them.
    candidates
        Rows of each request in a round; `AUTO`: as many as pay off.
    seed
        Of the passes, in [0, 2**32).
    progress
        Called after a round with the number of requests that ended in it.
    time_of
        The time of a round.

    Raises
    ------
    ValueError
        If a request does not fit the replica's pages.
    """
    count = len(requests)
    scheduler = _core.Scheduler(
        num_pages=replica.num_pages,
        page_size=replica.page_size,
        max_rows=replica.max_rows,
        max_prefill_tokens=replica.max_prefill_tokens,
        prefix_caching=False,
        fixed_cost_rows=replica.fixed_cost_rows,
    )
    draws = _Draws(requests, replica.max_rows, seed)
    prompt = np.zeros(int(requests.prompt_length.max(initial=1)), np.int64)
    prompt_length = requests.prompt_length.tolist()
    arrival = requests.arrival.tolist()
    no_tokens = np.zeros((replica.max_rows, workload.segment_length), np.int64)
    start, first, end = (np.full(count, np.nan) for _ in range(3))
    tokens, ends = np.zeros(count, np.int64), np.zeros(count, np.int64)
    log: list[tuple[float, ...]] = []
    now, arrived = 0.0, 0
    while arrived < count or scheduler.has_unfinished:
        if not scheduler.has_unfinished:
            now = max(now, arrival[arrived])
        while arrived < count and arrival[arrived] <= now:
            scheduler.add(
                arrived,
                prompt[: prompt_length[arrived]],
                scored=True,
                segment_length=workload.segment_length,
                max_tokens=workload.max_tokens,
                max_attempts=workload.max_attempts,
                candidates=candidates,
                target_reward=0.0,
                hard=True,
            )
            arrived += 1
        plan = scheduler.plan()
        pages = scheduler.pages_used
        start[plan.unscored] = now
        for request in plan.unscored.tolist():
            scheduler.set_prompt_reward(request, 0.0)
        rows = plan.draft.num_rows
        lengths, stopped, rewards = draws.of(plan)
        taken = time_of(plan, lengths, replica)
        decision = scheduler.commit(
            no_tokens[:rows],
            lengths,
            stopped,
            rewards,
            # As the engine has it, per step.
            (taken.draft + taken.score_segments) / max(1, plan.draft.max_new),
        )
        began, now = now, now + taken.total
        changed = decision.request
        tokens[changed] += decision.length
        first[changed[decision.start == 0]] = now
        ended = changed[decision.finish != _core.FINISH_NONE]
        end[ended] = now
        ends[ended] += 1
        log.append(
            (
                began,
                taken.total,
                plan.draft.num_groups,
                rows,
                pages,
                int(lengths.sum()),
                int(decision.length.sum()),
                len(changed),
                len(plan.preempted),
            )
        )
        if progress is not None:
            progress(len(ended))
    scheduler.check()
    columns = np.array(log, np.float64).reshape(-1, 9).T
    return Outcome(
        requests=requests,
        start=start,
        first=first,
        end=end,
        tokens=tokens,
        ends=ends,
        rounds=Rounds(columns[0], columns[1], *columns[2:].astype(np.int64)),
        stats=dict(scheduler.stats),
        num_pages=replica.num_pages - 1,
        pages_held=scheduler.pages_used,
    )


class _Draws:
    """What the rows of a round come to: where they end, and whether they pass."""

    def __init__(self, requests: Requests, max_rows: int, seed: int) -> None:
        self._response_length = requests.response_length.astype(np.int32)
        # Of a 32-bit word: passes where it is below, so that a rate of 1 always does.
        self._limit = np.rint(requests.pass_rate * 2.0**32)
        self._counters = np.zeros((max_rows, 4), np.uint32)
        self._counters[:, 3] = _PURPOSE
        self._keys = np.full((max_rows, 2), seed, np.uint32)

    def of(self, plan: _core.Plan) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8], Floats]:
        """Return the lengths, the stops and the rewards, +1 or -1, as `commit` takes them."""
        request, rows = plan.request, len(plan.request)
        counters, keys = self._counters[:rows], self._keys[:rows]
        counters[:, 1] = plan.position
        counters[:, 2] = plan.attempt
        keys[:, 0] = request
        words = _core.philox4x32(counters, keys)[:, 0]
        rewards = np.where(words < self._limit[request], 1.0, -1.0)
        left = self._response_length[request] - plan.position
        lengths = np.minimum(plan.draft.new_lengths, left)
        return lengths, (lengths == left).astype(np.uint8), rewards
