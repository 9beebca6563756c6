"""Random adds, rounds, aborts and page shortages: pages add up and every request ends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from stars_fast import _core


class SchedulerMachine(RuleBasedStateMachine):
    """Drives a scheduler whose 'model' draws tokens by hash, so that re-drafts repeat."""

    @initialize(
        num_pages=st.integers(12, 40),
        page_size=st.sampled_from([1, 3, 4, 16]),
        max_rows=st.integers(1, 9),
        max_prefill_tokens=st.sampled_from([3, 10, 1000]),
        prefix_caching=st.booleans(),
    )
    def start(
        self,
        num_pages: int,
        page_size: int,
        max_rows: int,
        max_prefill_tokens: int,
        prefix_caching: bool,
    ) -> None:
        self.page_size = page_size
        self.max_rows = max_rows
        self.scheduler = _core.Scheduler(
            num_pages=num_pages,
            page_size=page_size,
            max_rows=max_rows,
            max_prefill_tokens=max_prefill_tokens,
            prefix_caching=prefix_caching,
        )
        self.next_id = 0
        self.prompts: dict[int, list[int]] = {}
        self.committed: dict[int, list[int]] = {}
        self.budget: dict[int, int] = {}
        self.ended: set[int] = set()

    @rule(
        length=st.integers(1, 30),
        prefix=st.integers(0, 1),
        segment_length=st.integers(1, 9),
        max_tokens=st.integers(1, 20),
        max_attempts=st.integers(1, 4),
        candidates=st.integers(0, 4),
        scored=st.booleans(),
        seed=st.integers(0, 2**64 - 1),
    )
    def add(
        self,
        length: int,
        prefix: int,
        segment_length: int,
        max_tokens: int,
        max_attempts: int,
        candidates: int,
        scored: bool,
        seed: int,
    ) -> None:
        prompt = [prefix] * (length - 1) + [self.next_id % 7]
        try:
            self.scheduler.add(
                self.next_id,
                np.array(prompt, np.int64),
                scored=scored,
                segment_length=segment_length,
                max_tokens=max_tokens,
                max_attempts=max_attempts,
                candidates=candidates,
                seed=seed,
                target_reward=0.0,
            )
        except _core.RequestTooLargeError as error:
            assert "num_pages" in str(error)  # noqa: PT017 - the refusal is a legal outcome
        else:
            self.prompts[self.next_id] = prompt
            self.committed[self.next_id] = []
            self.budget[self.next_id] = max_tokens
        self.next_id += 1

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        alive = sorted(set(self.prompts) - self.ended)
        if alive:
            request = data.draw(st.sampled_from(alive))
            assert self.scheduler.abort(request)
            assert not self.scheduler.abort(request)
            self.ended.add(request)

    @rule(
        pass_rate=st.sampled_from([0.0, 0.3, 1.0]),
        stop_rate=st.sampled_from([0.0, 0.1]),
        bad_rate=st.sampled_from([0.0, 0.0, 0.1]),
        abort_inside=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
    )
    def round(
        self, pass_rate: float, stop_rate: float, bad_rate: float, abort_inside: bool, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        plan = self.scheduler.plan()
        self.check_plan(plan)
        self.scheduler.check()
        for request in plan.unscored:
            self.scheduler.set_prompt_reward(int(request), 0.0)
        aborted = None
        if abort_inside and len(plan.request):
            aborted = int(plan.request[0])
            assert self.scheduler.abort(aborted)
            self.ended.add(aborted)
        rows = plan.draft.num_rows
        tokens = rng.integers(0, 50, (rows, plan.draft.max_new))
        lengths = np.array([rng.integers(1, n + 1) for n in plan.draft.new_lengths], np.int32)
        stopped = (rng.random(rows) < stop_rate).astype(np.uint8)
        # A row may only be short if it stopped.
        lengths = np.where(stopped == 1, lengths, plan.draft.new_lengths)
        rewards = np.where(rng.random(rows) < pass_rate, 1e9, -1e9)
        rewards = np.where(rng.random(rows) < bad_rate, np.nan, rewards)
        decision = self.scheduler.commit(tokens, lengths, stopped, rewards, seconds=1e-3)
        self.check_decision(plan, decision, tokens, lengths, rewards, aborted)

    @rule()
    def cancel(self) -> None:
        self.scheduler.plan()
        self.scheduler.cancel()

    def check_plan(self, plan: _core.Plan) -> None:
        draft = plan.draft
        assert draft.num_rows == len(plan.request) <= self.max_rows
        assert len(set(plan.request.tolist())) == draft.num_groups
        # Slots that this round writes are all different and none is of the null page.
        written = [
            slot
            for batch in (plan.prefill, draft)
            for row in range(batch.num_rows)
            for slot in batch.slots[row, : batch.new_lengths[row]].tolist()
        ]
        assert len(set(written)) == len(written)
        assert all(slot >= self.page_size for slot in written)
        # No draft row writes into a page that a group reads.
        for group in range(draft.num_groups):
            pages = -(-int(draft.group_extent[group]) // self.page_size)
            read = set(draft.group_pages[group, :pages].tolist())
            assert 0 not in read
            first = draft.slots[draft.row_group == group]
            lengths = draft.new_lengths[draft.row_group == group]
            for slots, length in zip(first, lengths, strict=True):
                assert not read & {slot // self.page_size for slot in slots[:length].tolist()}
        # A group's valid slots are the tokens before the row's first.
        valid = draft.group_extent - (draft.hole_end - draft.hole_start)
        np.testing.assert_array_equal(valid[draft.row_group], draft.row_start)
        for row, request in enumerate(plan.request.tolist()):
            known = self.prompts[request] + self.committed[request]
            assert draft.row_start[row] == len(known) - 1
            assert plan.first_token[row] == known[-1]
            assert plan.position[row] == len(self.committed[request])
        if self.scheduler.has_unfinished:
            assert draft.num_rows + plan.prefill.num_rows > 0, "a round that moves nobody"

    def check_decision(
        self,
        plan: _core.Plan,
        decision: _core.Decision,
        tokens: np.ndarray,
        lengths: np.ndarray,
        rewards: np.ndarray,
        aborted: int | None,
    ) -> None:
        assert aborted not in decision.request.tolist()
        for event, request in enumerate(decision.request.tolist()):
            row = int(decision.row[event])
            if decision.kind[event] == _core.EVENT_FAILED:
                assert np.isnan(rewards[row])
                self.ended.add(request)
                continue
            if row >= 0:
                assert plan.request[row] == request
                assert decision.outcome[row] == _core.ROW_WINNER
                segment = tokens[row, : lengths[row]].tolist()
            elif decision.finish[event] == _core.FINISH_NONE:
                segment = self.scheduler.tokens(request)[-int(decision.length[event]) :]
            else:
                segment = [0] * int(decision.length[event])  # gone with the request
            assert decision.start[event] == len(self.committed[request])
            self.committed[request] += segment
            assert len(self.committed[request]) <= self.budget[request]
            if decision.finish[event] == _core.FINISH_NONE:
                known = self.prompts[request] + self.committed[request]
                assert self.scheduler.tokens(request) == known
            else:
                self.ended.add(request)

    @invariant()
    def pages_add_up(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()

    @invariant()
    def nobody_is_lost(self) -> None:
        if hasattr(self, "scheduler"):
            alive = len(set(self.prompts) - self.ended)
            assert self.scheduler.num_running + self.scheduler.num_waiting == alive

    def teardown(self) -> None:
        """With every attempt passing, whatever is left must end in a bounded number of rounds."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(400 + 60 * len(self.prompts)):
            if not self.scheduler.has_unfinished:
                break
            self.round(1.0, 0.0, 0.0, False, 0)
            self.scheduler.check()
        assert not self.scheduler.has_unfinished
        assert self.scheduler.pages_used == 0


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True
)


class TestRefusals:
    def scheduler(self) -> _core.Scheduler:
        return _core.Scheduler(num_pages=9, page_size=4)

    def add(self, scheduler: _core.Scheduler, prompt: list[int], **options: object) -> None:
        settings: dict[str, object] = {"scored": True, "segment_length": 4, "max_tokens": 8}
        scheduler.add(1, np.array(prompt, np.int64), **(settings | options))  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"segment_length": 0}, "segment_length"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_attempts": 0}, "max_attempts"),
            ({"candidates": -1}, "candidates"),
            ({"beta": 0.0}, "beta"),
            ({"alpha": 1.5}, "alpha"),
            ({"target_reward": float("nan")}, "target_reward"),
        ],
    )
    def test_bad_option_is_named(self, options: dict[str, object], named: str) -> None:
        with pytest.raises(ValueError, match=named):
            self.add(self.scheduler(), [1, 2], **options)

    def test_bad_prompts(self) -> None:
        for prompt in ([], [1, -1], [2**31]):
            with pytest.raises(ValueError, match="prompt"):
                self.add(self.scheduler(), prompt)

    def test_too_large_names_the_numbers(self) -> None:
        with pytest.raises(_core.RequestTooLargeError, match=r"12 pages .* pool has 8"):
            self.add(self.scheduler(), [1] * 5, max_tokens=44)
        self.add(self.scheduler(), [1] * 5, max_tokens=28)

    def test_id_in_use(self) -> None:
        scheduler = self.scheduler()
        self.add(scheduler, [1])
        with pytest.raises(ValueError, match="request id"):
            self.add(scheduler, [1])

    def test_plan_and_commit_alternate(self) -> None:
        scheduler = self.scheduler()
        empty = np.zeros((0, 0), np.int64), np.zeros(0), np.zeros(0), np.zeros(0)
        with pytest.raises(RuntimeError, match="no plan"):
            scheduler.commit(*empty)
        scheduler.plan()
        with pytest.raises(RuntimeError, match="not been committed"):
            scheduler.plan()
        scheduler.commit(*empty)

    def test_commit_needs_the_prompt_reward_and_changes_nothing_without(self) -> None:
        scheduler = self.scheduler()
        self.add(scheduler, [1, 2])
        plan = scheduler.plan()
        assert plan.unscored.tolist() == [1]
        rows = plan.draft.num_rows
        result = (np.ones((rows, 4), np.int64), plan.draft.new_lengths, np.zeros(rows))
        with pytest.raises(ValueError, match="prompt reward"):
            scheduler.commit(*result, rewards=np.zeros(rows))
        scheduler.set_prompt_reward(1, 0.0)
        scheduler.commit(*result, rewards=np.full(rows, 5.0))
        assert scheduler.tokens(1) == [1, 2, 1, 1, 1, 1]

    def test_views_outlive_the_next_plan(self) -> None:
        scheduler = self.scheduler()
        self.add(scheduler, [1, 2], scored=False)
        plan = scheduler.plan()
        slots = plan.draft.slots
        before = slots.copy()
        scheduler.commit(np.ones((1, 4), np.int64), np.array([4]), np.zeros(1), np.zeros(1))
        again = scheduler.plan()
        np.testing.assert_array_equal(slots, before)
        assert not np.array_equal(again.draft.slots, before)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    page_size=st.sampled_from([1, 4, 5]),
)
def test_shared_prompts_share_full_pages(lengths: list[int], page_size: int) -> None:
    scheduler = _core.Scheduler(num_pages=400, page_size=page_size, max_rows=16)
    for request, length in enumerate(lengths):
        scheduler.add(
            request, np.arange(length), scored=False, segment_length=page_size, max_tokens=page_size
        )
    plan = scheduler.plan()
    longest = (max(lengths) - 1) // page_size
    tails = sum(1 for length in lengths if (length - 1) % page_size)
    # Full pages once for all, a partly filled one and one page of draft for each.
    assert scheduler.pages_used == longest + tails + len(lengths)
    assert plan.prefill.num_tokens <= sum(length - 1 for length in lengths)
