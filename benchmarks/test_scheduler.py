"""Cost of plan + commit per row: as rows grow, and with many requests waiting."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from stars_fast import _core
from stars_fast.benchmarks.measure import percentiles

SEGMENT = 32


@dataclass(frozen=True)
class Load:
    """Requests that run, candidates of each, and requests that wait behind them."""

    running: int
    candidates: int
    waiting: int

    def __str__(self) -> str:
        return f"{self.running}x{self.candidates}-waiting-{self.waiting}"


class Driver:
    """Rounds of a scheduler whose attempts pass by the toss of a coin, 30 in a hundred."""

    def __init__(self, load: Load) -> None:
        self.rows = load.running * load.candidates
        self.scheduler = _core.Scheduler(
            num_pages=max(self.rows * 16, 256),
            max_rows=self.rows,
            max_prefill_tokens=1 << 30,
            prefix_caching=False,
        )
        prompt = np.arange(64)
        for request in range(load.running + load.waiting):
            self.scheduler.add(
                request,
                prompt,
                scored=True,
                segment_length=SEGMENT,
                max_tokens=2048,
                max_attempts=20,
                candidates=load.candidates,
                seed=request,
                target_reward=1.0,
                hard=True,
            )
        self._random = np.random.default_rng(0)
        self._tokens = np.ones((self.rows, SEGMENT), np.int64)
        self._stopped = np.zeros(self.rows, np.uint8)

    def round(self) -> float:
        """Run one; seconds spent in plan and commit."""
        begun = time.perf_counter()
        plan = self.scheduler.plan()
        seconds = time.perf_counter() - begun
        for request in plan.unscored.tolist():
            self.scheduler.set_prompt_reward(request, 0.0)
        rows = plan.draft.num_rows
        rewards = np.where(self._random.random(rows) < 0.3, 2.0, -2.0)
        lengths = plan.draft.new_lengths.copy()
        begun = time.perf_counter()
        self.scheduler.commit(self._tokens[:rows], lengths, self._stopped[:rows], rewards, 1e-3)
        return seconds + time.perf_counter() - begun


LOADS = [
    Load(running, candidates, waiting)
    for running, candidates in ((1, 1), (64, 1), (512, 1), (4096, 1), (1024, 4), (512, 8))
    for waiting in (0, 100_000)
]
SMALL_LOADS = [Load(8, 4, 0), Load(64, 1, 1000)]


@pytest.mark.sizes("load", full=LOADS, small=SMALL_LOADS, ids=str)
def test_plan_and_commit(benchmark: BenchmarkFixture, load: Load, full: bool) -> None:
    """`ours` is the time of plan and commit alone; the target is 1 microsecond a row."""
    driver = Driver(load)
    for _ in range(3):
        driver.round()
    driver.scheduler.check()
    rounds = 20 if full else 3
    seconds = benchmark.pedantic(
        lambda: [driver.round() for _ in range(rounds)], rounds=1, iterations=1
    )
    driver.scheduler.check()
    found = percentiles(seconds)
    benchmark.extra_info.update(
        work={"rows": driver.rows, "waiting": load.waiting},
        ours=found,
        candidates=load.candidates,
        microseconds_per_row={name: x / driver.rows * 1e6 for name, x in found.items()},
    )
