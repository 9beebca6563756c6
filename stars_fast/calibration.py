"""A target reward from the rewards of unaligned samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stars_fast.outputs import Calibration

_QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)


def calibration_of(rewards: Sequence[float], quantile: float) -> Calibration:
    """Return the calibration whose target is the given quantile of `rewards`.

    Quantiles are interpolated linearly between neighbouring rewards.
    """
    levels = sorted({*_QUANTILES, quantile})
    values = np.quantile(np.asarray(rewards, np.float64), levels)
    quantiles = dict(zip(levels, values.tolist(), strict=True))
    return Calibration(quantiles[quantile], quantiles, tuple(rewards))
