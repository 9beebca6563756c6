"""Random adds, plans, commits, cancels, aborts and page shortages.

Pages add up, every draft reads what was written for it, and every request ends once, with the
segments that it has alone.
"""

from __future__ import annotations

import numpy as np
import pytest
from helpers.scheduler_draws import Spec
from helpers.scheduler_driver import PHASES, Driver, InFlightPlan
from helpers.scheduler_machine import DriverMachine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from stars_fast import _core


class SchedulerMachine(DriverMachine):
    """Single requests."""

    @rule(
        length=st.integers(1, 30),
        prefix=st.integers(0, 1),
        segment_length=st.integers(1, 9),
        max_tokens=st.integers(1, 20),
        max_attempts=st.integers(1, 4),
        candidates=st.integers(0, 4),
        scored=st.booleans(),
        choose=st.booleans(),
        overrun=st.booleans(),
        last_untested=st.booleans(),
        draft_attempts=st.integers(0, 3),
        hard=st.booleans(),
        alpha=st.sampled_from([0.5, 1.0]),
        seed=st.integers(0, 2**64 - 1),
        bias=st.sampled_from([-1e9, 0.0, 1e9]),
        stop_rate=st.sampled_from([0.0, 0.1]),
        ends_early=st.sampled_from([0.0, 0.5]),
        bad_rate=st.sampled_from([0.0, 0.0, 0.1]),
        breaks_rate=st.sampled_from([0.0, 0.0, 0.5, 1.0]),
        attempts_at=st.just(()) | st.tuples(*[st.integers(1, 4)] * 3),
        plain_from=st.sampled_from([2**31 - 1, 2**31 - 1, 5]),
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
        choose: bool,
        overrun: bool,
        last_untested: bool,
        draft_attempts: int,
        hard: bool,
        alpha: float,
        seed: int,
        bias: float,
        stop_rate: float,
        ends_early: float,
        bad_rate: float,
        breaks_rate: float,
        attempts_at: tuple[int, ...],
        plain_from: int,
    ) -> None:
        prompt = [prefix] * (length - 1) + [self.driver.next_id % 7]
        spec = Spec(
            prompt=prompt,
            segment_length=segment_length,
            max_tokens=max_tokens,
            max_attempts=max_attempts,
            candidates=candidates,
            scored=scored,
            choose=choose,
            overrun=overrun,
            last_untested=last_untested,
            draft_attempts=0 if attempts_at else min(draft_attempts, max_attempts - 1),
            hard=hard,
            alpha=alpha,
            seed=seed,
            bias=bias,
            stop_rate=stop_rate,
            ends_early=ends_early,
            bad_rate=bad_rate,
            breaks_rate=breaks_rate,
            # By parts of three tokens; with one attempt there is nothing to share out.
            attempts_at=attempts_at if scored and max_attempts > 1 else (),
            attempts_span=3,
            plain_from=plain_from,
        )
        try:
            self.driver.add(spec)
        except _core.RequestTooLargeError as error:
            assert "num_pages" in str(error)  # noqa: PT017 - the refusal is a legal outcome

    @rule()
    def round(self) -> None:
        self.plan(True)
        self.driver.commit()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, derandomize=True
)

EMPTY = np.zeros((0, 0), np.int64), np.zeros(0), np.zeros(0), np.zeros(0)


def spec(seed: int, **changes: float | list[int]) -> Spec:
    """A request of four segments that pass at the first attempt."""
    values: dict[str, object] = {
        "prompt": [1] * 5 + [seed],
        "segment_length": 4,
        "max_tokens": 16,
        "max_attempts": 4,
        "candidates": 1,
        "scored": True,
        "seed": seed,
        "bias": 1e9,
    }
    return Spec(**(values | changes))  # type: ignore[arg-type]


def requests_of(flight: InFlightPlan) -> set[int]:
    return set(flight.plan.request.tolist())


class TestLanes:
    def test_two_plans_are_out_of_other_requests_and_alternate(self) -> None:
        driver = Driver(num_pages=200, page_size=4, lanes=2)
        for seed in range(9):
            driver.add(spec(seed))
        first, second = driver.plan(), driver.plan()
        assert requests_of(first) == {0, 1, 2, 3, 4}
        assert requests_of(second) == {5, 6, 7, 8}
        with pytest.raises(RuntimeError, match="not been committed"):
            driver.plan()
        for expected in (first, second, first):
            decision = driver.commit()
            assert set(decision.request.tolist()) == requests_of(expected)
            assert requests_of(driver.plan()) == requests_of(expected)
        driver.finish(20)

    @pytest.mark.parametrize("num_pages", [60, 1000])
    @pytest.mark.parametrize("candidates", [0, 1, 3])
    def test_both_lanes_stay_filled(self, num_pages: int, candidates: int) -> None:
        """Whether rows or pages are short, each lane holds about half of what runs."""
        driver = Driver(num_pages=num_pages, page_size=4, max_rows=12, lanes=2)
        for seed in range(80):
            bias = (-1e9, 0.0, 1e9)[seed % 3]
            driver.add(spec(seed, candidates=candidates, bias=bias, max_tokens=8 + seed % 9))
        driver.plan()
        sizes = []
        while driver.scheduler.num_waiting > 10:
            driver.plan()
            one, other = (len(requests_of(flight)) for flight in driver.out)
            sizes.append((one, other))
            driver.commit()
        share = np.array(sizes)
        assert share.min() >= 1
        assert (abs(share[:, 0] - share[:, 1]) <= share.sum(1) / 2).mean() > 0.9
        assert abs(share[::2].mean() - share[1::2].mean()) < share.mean() / 3
        driver.finish(2000)

    def test_requests_that_come_one_by_one_go_to_the_smaller_lane(self) -> None:
        driver = Driver(num_pages=200, page_size=4, lanes=2)
        sizes = []
        for seed in range(6):
            driver.add(spec(seed, max_tokens=200))
            for _ in range(2):
                driver.plan()
                driver.commit()
            lanes = [len(requests_of(driver.plan())) for _ in range(2)]
            sizes.append(sorted(lanes))
            driver.cancel()
        assert sizes == [[0, 1], [1, 1], [1, 2], [2, 2], [2, 3], [3, 3]]

    def test_one_request_needs_every_plan(self) -> None:
        """With nothing else out no plan is empty; beside one that is out it is, and may be."""
        driver = Driver(num_pages=20, page_size=4, lanes=2)
        driver.add(spec(0))
        for _ in range(2):
            assert requests_of(driver.plan()) == {0}
            driver.commit()
        assert requests_of(driver.plan()) == {0}
        assert requests_of(driver.plan()) == set()
        driver.commit()
        assert requests_of(driver.plan()) == {0}
        driver.commit()
        driver.commit()
        driver.finish(1)
        assert driver.scheduler.stats["rounds"] == 4

    def test_a_request_in_flight_keeps_its_pages(self) -> None:
        """Its lane takes the whole pool; the other one's plan waits, and neither is lost."""
        driver = Driver(num_pages=9, page_size=4, lanes=2)
        driver.add(spec(0, max_tokens=20, segment_length=20))
        driver.add(spec(1, max_tokens=20, segment_length=20))
        assert requests_of(driver.plan()) == {0}
        assert requests_of(driver.plan()) == set()
        driver.finish(20)
        assert driver.scheduler.stats["preemptions"] == 0

    def test_the_oldest_waits_for_pages_one_round_at_most(self) -> None:
        """It sits out while the younger is in flight, which then gives way."""
        driver = Driver(num_pages=12, page_size=4, lanes=2, prefix_caching=False)
        driver.add(spec(0, segment_length=8, max_tokens=24))
        driver.add(spec(1, segment_length=1, max_tokens=16))
        rounds, preempted = [], []
        driver.plan()
        while 0 in driver.alive:
            flight = driver.plan()
            rounds.append(sorted(requests_of(flight)))
            preempted += flight.plan.preempted.tolist()
            driver.commit()
        assert rounds[:7] == [[1], [0], [1], [], [], [0], []]
        assert preempted == [1]
        driver.finish(40)

    def test_abort_in_flight(self) -> None:
        driver = Driver(num_pages=100, page_size=4, lanes=2)
        for seed in range(4):
            driver.add(spec(seed))
        driver.plan()
        driver.plan()
        used = driver.scheduler.pages_used
        for request in (0, 2):
            driver.abort(request)
        assert driver.scheduler.pages_used == used  # the device may write to them yet
        assert driver.scheduler.num_running == 2
        assert driver.commit().request.tolist() == [1]
        assert driver.commit().request.tolist() == [3]
        driver.finish(20)

    def test_views_of_both_plans_stay(self) -> None:
        driver = Driver(num_pages=100, page_size=4, lanes=2)
        for seed in range(4):
            driver.add(spec(seed))
        plans = [driver.plan().plan for _ in range(2)]
        slots = [plan.draft.slots for plan in plans]
        before = [array.copy() for array in slots]
        driver.commit()
        driver.plan()
        for array, copy in zip(slots, before, strict=True):
            np.testing.assert_array_equal(array, copy)

    @pytest.mark.parametrize("lanes", [0, 3])
    def test_bad_number_of_lanes(self, lanes: int) -> None:
        with pytest.raises(ValueError, match=f"lanes must be 1 or 2, got {lanes}"):
            _core.Scheduler(num_pages=9, lanes=lanes)


@pytest.mark.parametrize("lanes", [1, 2])
def test_segments_that_end_inside_a_page_find_room(lanes: int) -> None:
    """Where whole segments just fit, one behind a shorter segment needs a page more."""
    spec = Spec(
        prompt=[0] * 29, segment_length=9, max_tokens=19, max_attempts=2, candidates=0,
        scored=True, seed=0, bias=-1e9, ends_early=0.5,
    )  # fmt: skip
    tight = Driver(num_pages=18, page_size=3, max_rows=1, lanes=lanes, prefix_caching=False)
    with pytest.raises(_core.RequestTooLargeError, match="needs 18 pages of 3 tokens"):
        tight.add(spec)
    driver = Driver(num_pages=19, page_size=3, max_rows=1, lanes=lanes, prefix_caching=False)
    driver.add(spec)
    driver.finish(200)


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("phases", range(PHASES + 1))
def test_a_cancelled_plan_leaves_nothing_half_copied(lanes: int, phases: int) -> None:
    """Its drafts may have written over the sources of its copies, which were free by then."""
    driver = Driver(num_pages=30, page_size=4, lanes=lanes)
    for seed in range(4):
        driver.add(spec(seed, segment_length=3, max_tokens=30))
    for _ in range(2 * lanes):
        driver.plan()
        driver.issue(1)
        driver.commit()
    copies = 0
    for _ in range(4):
        for _ in range(lanes):
            copies += len(driver.plan().plan.copies[0])
        driver.issue(lanes - 1, phases)
        driver.cancel()
        for _ in range(2 * lanes):
            driver.plan()
            driver.commit()
    assert copies > 0
    driver.finish(100)


def test_a_cancelled_prefill_is_not_read() -> None:
    """Not even by a request that matched its pages and had no prefill of its own in that plan."""
    driver = Driver(num_pages=60, page_size=4, max_prefill_tokens=8)
    driver.add(spec(0, prompt=[1] * 9))
    driver.add(spec(1, prompt=[1] * 13))
    for _ in range(2):
        driver.plan()
        driver.commit()
    driver.add(spec(2, prompt=[2] * 9))
    for _ in range(2):  # the first takes everyone's pages: the next begins with prefills
        assert driver.plan().plan.prefill.num_rows == 1
        driver.cancel()
    driver.finish(20)


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
        with pytest.raises(_core.RequestTooLargeError, match=r"13 pages .* pool has 8"):
            self.add(self.scheduler(), [1] * 5, max_tokens=44)
        self.add(self.scheduler(), [1] * 5, max_tokens=24)

    def test_id_in_use(self) -> None:
        scheduler = self.scheduler()
        self.add(scheduler, [1])
        with pytest.raises(ValueError, match="request id"):
            self.add(scheduler, [1])

    def test_plan_and_commit_alternate(self) -> None:
        scheduler = self.scheduler()
        with pytest.raises(RuntimeError, match="no plan"):
            scheduler.commit(*EMPTY)
        scheduler.plan()
        with pytest.raises(RuntimeError, match="not been committed"):
            scheduler.plan()
        scheduler.commit(*EMPTY)

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


@pytest.mark.parametrize(("fixed_cost_rows", "more_than"), [(8.0, 5), (0.0, 0)])
def test_auto_gives_rows_to_what_is_hard_to_pass(fixed_cost_rows: float, more_than: int) -> None:
    """Where a round has a fixed cost, hard segments get rows to save rounds, easy ones do not."""
    scheduler = _core.Scheduler(
        num_pages=500, max_rows=64, prefix_caching=False, fixed_cost_rows=fixed_cost_rows
    )
    for request in (0, 1):
        scheduler.add(
            request, np.arange(5), scored=True, segment_length=4, max_tokens=4000,
            max_attempts=20, target_reward=0.0, hard=True,
        )  # fmt: skip
    most = [0, 0]
    for _ in range(60):
        plan = scheduler.plan()
        for request in plan.unscored.tolist():
            scheduler.set_prompt_reward(request, 0.0)
        count = plan.draft.num_rows
        rewards = np.where(plan.request == 0, 1.0, -1.0)  # request 1 never passes
        most = [max(most[r], int((plan.request == r).sum())) for r in (0, 1)]
        tokens = np.ones((count, plan.draft.max_new), np.int64)
        scheduler.commit(tokens, plan.draft.new_lengths, np.zeros(count, np.uint8), rewards)
    assert most[0] <= 2  # until it is known to be easy
    assert most[1] > more_than
    assert (most == [1, 1]) == (fixed_cost_rows == 0)


def test_admission_leaves_pages_for_candidates() -> None:
    """Requests that wait do not take the pages that the candidates of those that run had."""
    scheduler = _core.Scheduler(
        num_pages=100, page_size=4, max_rows=256, prefix_caching=False, max_prefill_tokens=10_000
    )

    def add(request: int) -> None:
        scheduler.add(
            request, np.arange(9), scored=True, segment_length=4, max_tokens=8, candidates=4,
            max_attempts=100_000, target_reward=0.0, hard=True,
        )  # fmt: skip

    def round_of() -> tuple[int, int]:
        plan = scheduler.plan()
        for request in plan.unscored.tolist():
            scheduler.set_prompt_reward(request, 0.0)
        rows = plan.draft.num_rows
        tokens = np.ones((rows, plan.draft.max_new), np.int64)
        scheduler.commit(
            tokens, plan.draft.new_lengths, np.zeros(rows, np.uint8), np.full(rows, -1.0)
        )
        return plan.draft.num_groups, rows

    add(0)
    for _ in range(100):
        assert round_of() == (1, 4)
    for request in range(1, 60):
        add(request)
    for _ in range(10):
        requests, rows = round_of()
    assert requests > 4
    assert rows / requests > 3.0
    assert scheduler.num_waiting > 0
    scheduler.check()
