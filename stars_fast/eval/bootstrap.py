"""Confidence interval of a mean, without assumptions on the distribution.

Source: B. Efron, Bootstrap methods, Annals of Statistics 7 (1979).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000

_CHUNK = 500  # resamples at once, for memory


class Resamples:
    """Resamples of a fixed number of units, the same ones for every mean that is asked for.

    Means over the same units that go through the same resamples are paired: the interval of a
    difference is that of the differences.

    Parameters
    ----------
    count
        Units, such as prompts, at least 2.
    seed
        Seed of the `RESAMPLES` resamples of `count` units each, drawn with replacement.
    """

    def __init__(self, count: int, seed: int) -> None:
        if count < 2:
            raise ValueError(f"values must hold at least 2 values, got {count}")
        rng = np.random.default_rng(seed)
        #: How often each unit is in each resample, [RESAMPLES, count].
        self._times = np.empty((RESAMPLES, count), np.uint16 if count < 2**16 else np.uint32)
        for begin in range(0, RESAMPLES, _CHUNK):
            drawn = rng.integers(count, size=(_CHUNK, count))
            drawn += np.arange(_CHUNK)[:, None] * count
            times = np.bincount(drawn.ravel(), minlength=_CHUNK * count)
            self._times[begin : begin + _CHUNK] = times.reshape(_CHUNK, count)

    def means(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the mean of `values` in each resample, float64 ``[RESAMPLES]``.

        Parameters
        ----------
        values
            float64 ``[count]``, one of each unit; NaN is left out, and so is a resample that has
            nothing else.
        """
        known = np.isfinite(values)
        held = np.where(known, values, 0.0)
        found = []
        for begin in range(0, RESAMPLES, _CHUNK):
            times = self._times[begin : begin + _CHUNK].astype(np.float64)
            counts = times @ known.astype(np.float64)
            sums = times @ held
            found.append(sums[counts > 0] / counts[counts > 0])
        return np.concatenate(found)

    def interval(self, values: NDArray[np.float64], level: float) -> tuple[float, float]:
        """Return the (1 - level) / 2 and (1 + level) / 2 quantiles of `means`.

        Parameters
        ----------
        values
            As for `means`, at least one of them finite.
        level
            Coverage, in (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"level must be in (0, 1), got {level!r}")
        low, high = np.quantile(self.means(values), [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def mean_interval(values: Sequence[float], level: float, seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`.

    Parameters
    ----------
    values
        Independent values, at least 2; for paired data the differences of the pairs.
    level
        Coverage, in (0, 1).
    seed
        Seed of the resamples.

    Returns
    -------
    As `Resamples.interval`.
    """
    return Resamples(len(values), seed).interval(np.asarray(values, np.float64), level)
