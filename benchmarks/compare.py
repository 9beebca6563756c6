"""How a benchmark times its sides, and what it keeps of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from stars_fast.benchmarks.measure import percentiles, seconds_of


class Compare:
    """Times one side with pytest-benchmark, and others between its rounds."""

    def __init__(self, benchmark: BenchmarkFixture, device: torch.device, *, full: bool) -> None:
        self._benchmark = benchmark
        self._device = device
        self._full = full

    def __call__(
        self,
        ours: Callable[[], Any],
        others: Mapping[str, Callable[[], Any]],
        *,
        work: Mapping[str, float],
        tokens: float | None = None,
        repeats: int = 20,
        budget: float = 4.0,
        once: Mapping[str, float] | None = None,
        **facts: Any,
    ) -> None:
        """Time all sides in turn; what was measured goes to ``extra_info``.

        Both sides have been run, and found right, before.

        Parameters
        ----------
        ours
            The engine's side.
        others
            The same job done otherwise, by name.
        work
            What was asked for: the numbers along the axes of a plot.
        tokens
            That each side gives, where tokens per second are to be shown.
        repeats
            Of each side, at full size; 1 at small size.
        budget
            Seconds that may be spent on all repeats, as the first of them lets expect; at least
            three are made at full size.
        once
            Seconds of sides that were run but once, by name: they take too long.
        facts
            Further results to keep.
        """
        taken: dict[str, list[float]] = {name: [] for name in others}
        first: list[float] = []

        def run_others() -> None:
            for name, run in others.items():
                taken[name].append(seconds_of(run, self._device))

        rounds = 1
        if self._full:
            first.append(seconds_of(ours, self._device))
            run_others()
            expected = first[0] + sum(times[0] for times in taken.values())
            rounds = max(2, min(repeats, int(budget / max(expected, 1e-9))))
        self._benchmark.pedantic(
            seconds_of, args=(ours, self._device), setup=run_others, rounds=rounds
        )
        stats = self._benchmark.stats
        assert stats is not None  # pedantic has run
        mine = percentiles(first + stats.stats.data)
        theirs = {name: percentiles(values) for name, values in taken.items()}
        theirs |= {name: percentiles([value]) for name, value in (once or {}).items()}
        self._benchmark.extra_info.update(
            work=dict(work),
            ours=mine,
            others=theirs,
            ratio={name: times["p50"] / mine["p50"] for name, times in theirs.items()},
            **({} if tokens is None else {"tokens": tokens}),
            **facts,
        )
