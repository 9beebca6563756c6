"""Numbers of a spec's responses, and of two specs side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stars_fast.eval.bootstrap import Resamples

LEVEL = 0.95

Grid = NDArray[np.float64]  # [prompts, seeds], NaN where there is no value


@dataclass(frozen=True)
class Interval:
    """A mean over prompts with its bootstrap interval.

    Attributes
    ----------
    mean
        Mean of the prompts' means over their seeds.
    low, high
        The `LEVEL` interval; None for fewer than two prompts.
    over
        Responses with a value.
    """

    mean: float
    low: float | None
    high: float | None
    over: int

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "over": self.over}


class Intervals:
    """Makes intervals over the same prompts, with the same resamples of them.

    The seeds of a prompt are resampled together, since responses to one prompt are not independent.

    Parameters
    ----------
    prompts
        Number of prompts.
    seed
        Seed of the resamples.
    """

    def __init__(self, prompts: int, seed: int = 0) -> None:
        self._resamples = Resamples(prompts, seed) if prompts > 1 else None

    def of(self, grid: Grid) -> Interval | None:
        """Return the mean of a grid and its interval; None if it has no value."""
        known = np.isfinite(grid)
        counts = known.sum(axis=1)
        if not counts.any():
            return None
        sums = np.where(known, grid, 0.0).sum(axis=1)
        means = np.divide(sums, counts, out=np.full(len(grid), np.nan), where=counts > 0)
        low = high = None
        if self._resamples is not None and (counts > 0).sum() > 1:
            low, high = self._resamples.interval(means, LEVEL)
        return Interval(float(np.nanmean(means)), low, high, int(counts.sum()))


@dataclass(frozen=True)
class Comparison:
    """One spec against another, on the responses of both to one prompt with one seed.

    Attributes
    ----------
    win, tie, loss
        Shares that add up to 1, each the mean over prompts of the mean over seeds.
    win_rate
        ``win + tie / 2``.
    gain
        Mean difference of the scores.
    """

    win: float
    tie: float
    loss: float
    win_rate: Interval
    gain: Interval

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {
            "win": self.win,
            "tie": self.tie,
            "loss": self.loss,
            "win_rate": self.win_rate.to_json(),
            "gain": self.gain.to_json(),
        }


def compare(ours: Grid, theirs: Grid, margin: float, intervals: Intervals) -> Comparison | None:
    """Compare scores.

    Parameters
    ----------
    ours, theirs
        Scores of the same prompts and seeds.
    margin
        A difference of at most this is a tie.
    intervals
        Intervals over these prompts.

    Returns
    -------
    None if no prompt and seed has both scores.
    """
    difference = ours - theirs
    known = np.isfinite(difference)
    won = np.where(known, difference > margin, np.nan)
    lost = np.where(known, difference < -margin, np.nan)
    rate = intervals.of((1.0 + won - lost) / 2)
    gain = intervals.of(difference)
    if rate is None or gain is None:
        return None
    win, loss = (_mean(intervals.of(share)) for share in (won, lost))
    tie = max(1.0 - win - loss, 0.0)  # and not -0.0
    return Comparison(win, tie, loss, rate, gain)


def _mean(interval: Interval | None) -> float:
    return math.nan if interval is None else interval.mean


def distinct(texts: Sequence[Sequence[int]], n: int) -> float | None:
    """Return distinct-n: different n-grams / n-grams, over all texts together.

    None if no text has n tokens. Source: Li et al., A diversity-promoting objective function for
    neural conversation models (2016).
    """
    grams = [tuple(ids[i : i + n]) for ids in texts for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def perplexity(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return exp(-mean log-probability of a token under the base model) over all responses."""
    known = [row for row in rows if row["base_logprob"] is not None and row["base_tokens"]]
    tokens = sum(row["base_tokens"] for row in known)
    if not tokens:
        return None
    mean = -math.fsum(row["base_logprob"] for row in known) / tokens
    return math.exp(mean) if mean < 700 else None  # what a float can hold


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Tell which (cost, quality) no other point beats: at most the cost, at least the quality.

    Equal points are all kept.
    """
    return [
        not any(
            (other_cost <= cost and other_quality > quality)
            or (other_cost < cost and other_quality >= quality)
            for other_cost, other_quality in points
        )
        for cost, quality in points
    ]
