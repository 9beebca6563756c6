"""Groups of paths among other requests: random adds, aborts, failures, cancels and shortages.

Beside what holds of single requests: a path that becomes a copy reads what its source wrote, every
path's tokens are those of the plain algorithm, and every group ends with one path, or none.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.path_groups import GroupSpec
from helpers.scheduler_draws import Spec
from helpers.scheduler_driver import PHASES, Driver
from helpers.scheduler_machine import DriverMachine
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from stars_fast import _core


class GroupMachine(DriverMachine):
    """Groups of paths, and single requests among them."""

    def prompt(self, length: int, prefix: int) -> list[int]:
        return [prefix] * (length - 1) + [self.driver.next_id % 7]

    @rule(
        length=st.integers(1, 30),
        prefix=st.integers(0, 1),
        segment_length=st.integers(1, 9),
        max_tokens=st.integers(1, 20),
        paths=st.integers(1, 6),
        resample=st.booleans(),
        beta=st.sampled_from([0.2, 1.0]),
        ess_threshold=st.sampled_from([0.0, 0.5, 1.0]),
        rejection_rate=st.sampled_from([0.0, 0.2, 0.5, 0.9]),
        seed=st.integers(0, 2**64 - 1),
        stop_rate=st.sampled_from([0.0, 0.1, 0.3]),
        ends_early=st.sampled_from([0.0, 0.5]),
        bad_rate=st.sampled_from([0.0, 0.0, 0.05]),
        breaks_rate=st.sampled_from([0.0, 0.0, 0.5, 1.0]),
    )
    def add_group(
        self,
        length: int,
        prefix: int,
        segment_length: int,
        max_tokens: int,
        paths: int,
        resample: bool,
        beta: float,
        ess_threshold: float,
        rejection_rate: float,
        seed: int,
        stop_rate: float,
        ends_early: float,
        bad_rate: float,
        breaks_rate: float,
    ) -> None:
        prompt = self.prompt(length, prefix)
        spec = GroupSpec(
            paths=[
                Spec(
                    prompt=prompt,
                    segment_length=segment_length,
                    max_tokens=max_tokens,
                    max_attempts=1,
                    candidates=0,
                    scored=False,
                    seed=(seed + path) % 2**64,
                    stop_rate=stop_rate,
                    ends_early=ends_early,
                    bad_rate=bad_rate,
                    breaks_rate=breaks_rate,
                )
                for path in range(min(paths, self.driver.max_rows))
            ],
            resample=resample,
            seed=seed,
            beta=beta,
            ess_threshold=ess_threshold,
            rejection_rate=rejection_rate,
        )
        try:
            self.driver.add_group(spec)
        except _core.RequestTooLargeError as error:
            assert "num_pages" in str(error)  # noqa: PT017 - the refusal is a legal outcome

    @rule(
        length=st.integers(1, 30),
        prefix=st.integers(0, 1),
        segment_length=st.integers(1, 9),
        max_tokens=st.integers(1, 20),
        max_attempts=st.integers(1, 4),
        seed=st.integers(0, 2**64 - 1),
        bias=st.sampled_from([-1e9, 0.0]),
    )
    def add_single(
        self,
        length: int,
        prefix: int,
        segment_length: int,
        max_tokens: int,
        max_attempts: int,
        seed: int,
        bias: float,
    ) -> None:
        spec = Spec(
            prompt=self.prompt(length, prefix),
            segment_length=segment_length,
            max_tokens=max_tokens,
            max_attempts=max_attempts,
            candidates=0,
            scored=True,
            seed=seed,
            bias=bias,
        )
        try:
            self.driver.add(spec)
        except _core.RequestTooLargeError as error:
            assert "num_pages" in str(error)  # noqa: PT017 - the refusal is a legal outcome

    @rule(rounds=st.integers(1, 4))
    def rounds(self, rounds: int) -> None:
        for _ in range(rounds):
            self.plan(True)
            self.driver.commit()


TestGroups = GroupMachine.TestCase
TestGroups.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, derandomize=True
)


def paths(number: int, **changes: float) -> list[Spec]:
    """Paths of three segments that nobody stops."""
    values = {"segment_length": 6, "max_tokens": 18, **changes}
    return [
        Spec([1] * 9, max_attempts=1, candidates=0, scored=False, seed=seed, **values)  # type: ignore[arg-type]
        for seed in range(number)
    ]


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("resample", [False, True])
def test_paths_that_wait_give_their_pages_to_the_last(lanes: int, resample: bool) -> None:
    """They hold the pool and nobody is in flight; with two lanes a plan without rows is out."""
    driver = Driver(num_pages=10, page_size=4, lanes=lanes)
    driver.add_group(
        GroupSpec(paths(4), resample=resample, seed=1, ess_threshold=1.0, rejection_rate=0.0)
    )
    driver.finish(100)
    assert driver.scheduler.stats["preemptions"] > 0


@pytest.mark.parametrize("phases", range(PHASES + 1))
def test_a_cancelled_plan_leaves_no_waiting_path_half_copied(phases: int) -> None:
    """A path may wait, in flight no more, for what the copies of the next plan bring."""
    driver = Driver(num_pages=60, page_size=4, lanes=2)
    driver.add_group(GroupSpec(paths(4), resample=True, seed=1, ess_threshold=0.0))
    for _ in range(2):
        driver.plan()
    for _ in range(2):
        driver.commit()
    for _ in range(2):
        driver.plan()
    driver.commit()
    flight = driver.plan()
    assert len(flight.plan.copies[0]) == 2
    assert not flight.plan.draft.num_rows
    driver.issue(1, phases)
    driver.cancel()
    driver.finish(30)


@pytest.mark.parametrize("resample", [False, True])
def test_a_copy_of_a_path_that_has_ended_has_ended(resample: bool) -> None:
    driver = Driver(num_pages=100, page_size=4)
    for seed in range(12):
        spec = GroupSpec(paths(4, stop_rate=0.4), resample=resample, seed=seed, ess_threshold=1.0)
        driver.add_group(spec)
    driver.finish(60)


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_path_that_fails_takes_its_group_along(lanes: int) -> None:
    driver = Driver(num_pages=100, page_size=4, lanes=lanes)
    spec = GroupSpec(paths(4, bad_rate=0.3), resample=True, seed=1)
    assert spec.outcome()[-1].fails
    group = driver.add_group(spec)
    other = driver.add(replace(paths(1)[0], prompt=[2] * 5))
    driver.finish(20)
    assert driver.committed[other]
    assert {*group, other} == driver.ended


def test_an_aborted_path_in_flight_takes_its_group_along() -> None:
    """Its plan's rows and those of the other lane's plan keep their pages until they are done."""
    driver = Driver(num_pages=100, page_size=4, lanes=2)
    group = driver.add_group(GroupSpec(paths(4), resample=True, seed=1))
    driver.plan()
    driver.plan()
    used = driver.scheduler.pages_used
    driver.abort(group[0])
    assert not driver.scheduler.has_unfinished
    assert driver.scheduler.pages_used == used
    for _ in range(2):
        assert not len(driver.commit().request)
        driver.scheduler.check()
    assert driver.scheduler.pages_used == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"requests": []}, "number of paths"),
        ({"requests": [1, 2, 3, 4]}, "max_rows"),
        ({"requests": [1, 1]}, "given once"),
        ({"requests": [7, 8]}, "request id"),
        ({"seeds": [1]}, "number of seeds"),
        ({"beta": 0.0}, "beta"),
        ({"ess_threshold": 1.5}, "ess_threshold"),
        ({"rejection_rate": 1.0}, "rejection_rate"),
        ({"max_tokens": 400}, "num_pages"),
    ],
)
def test_bad_groups_are_refused_whole(options: dict[str, object], named: str) -> None:
    scheduler = _core.Scheduler(num_pages=30, page_size=4, max_rows=3)
    values: dict[str, object] = {"requests": [1, 2], "resample": True, "max_tokens": 8}
    values = {"prompt": [1, 2], "segment_length": 4, **values, **options}
    values.setdefault("seeds", [0] * len(values["requests"]))  # type: ignore[arg-type]
    scheduler.add(7, [1, 2], scored=False, segment_length=4, max_tokens=4)
    with pytest.raises(ValueError, match=named):
        scheduler.add_group(**values)  # type: ignore[arg-type]
    assert scheduler.num_waiting == 1
