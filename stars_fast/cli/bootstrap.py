"""Confidence interval of a mean, without assumptions on the distribution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000


def mean_interval(values: Sequence[float], level: float, seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`.

    Parameters
    ----------
    values
        Independent values, at least 2; for paired data the differences of the pairs.
    level
        Coverage, in (0, 1).
    seed
        Of the `RESAMPLES` resamples, each of ``len(values)`` values drawn with replacement.

    Returns
    -------
    The (1 - level) / 2 and (1 + level) / 2 quantiles of the resamples' means.

    Source: B. Efron, Bootstrap methods, Annals of Statistics 7 (1979).
    """
    if len(values) < 2:
        raise ValueError(f"values must hold at least 2 values, got {len(values)}")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level!r}")
    data = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(data), size=(RESAMPLES, len(data)))
    low, high = np.quantile(data[drawn].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
