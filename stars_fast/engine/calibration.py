"""A target reward, and what prefixes predict, from the rewards of unaligned samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stars_fast.outputs import (
    Calibration,
    CompletionOutput,
    PrefixCalibration,
    PromptTargets,
    SampleWalks,
)
from stars_fast.params import StarsParams

_QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)


#: Fewer samples at a position fit no line: the mean of their final rewards stands for it.
_FEWEST = 8

#: A target that every reward reaches.
_ANY_REWARD = -1e30


def plain_params(params: StarsParams, n: int) -> StarsParams:
    """Return parameters that draw `n` unaligned samples where these draw aligned responses.

    One attempt of each segment, whatever its reward, and so plain samples: scored as they grow,
    which costs the reward model no token more and tells what prefixes predict.
    """
    return params.with_method(
        "stars" if params.budget is None else params.method,
        acceptance="hard",
        target_reward=_ANY_REWARD,
        budget=None,
        alpha=1.0,
        max_attempts=1,
        candidates=1,
        calibrate_prefixes=False,
        n=n,
        trace=False,
        top_logprobs=0,
    )


def calibration_of(
    rewards: Sequence[float],
    quantile: float,
    prefixes: PrefixCalibration | None = None,
    targets: PromptTargets | None = None,
    walks: SampleWalks | None = None,
) -> Calibration:
    """Return the calibration whose target is the given quantile of `rewards`.

    Quantiles are interpolated linearly between neighbouring rewards.
    """
    levels = sorted({*_QUANTILES, quantile})
    values = np.quantile(np.asarray(rewards, np.float64), levels)
    quantiles = dict(zip(levels, values.tolist(), strict=True))
    return Calibration(quantiles[quantile], quantiles, tuple(rewards), prefixes, targets, walks)


def prefix_calibration_of(samples: Sequence[CompletionOutput]) -> PrefixCalibration | None:
    """Fit `PrefixCalibration` to unaligned samples with the rewards of their segments.

    Returns None if no sample has an unfinished segment.
    """
    by_position: dict[int, list[tuple[float, float]]] = {}
    for sample in samples:
        *unfinished, last = sample.segments
        for segment in unfinished:
            if segment.reward is not None and last.reward is not None:
                by_position.setdefault(segment.end, []).append((segment.reward, last.reward))
    if not by_position:
        return None
    slope, intercept, correlation, samples_at = [], [], [], []
    positions = tuple(sorted(by_position))
    for position in positions:
        prefix, final = np.array(by_position[position], np.float64).T
        spread = float(prefix.std())
        line, related = 0.0, 0.0
        if len(prefix) >= _FEWEST and spread > 0:
            covariance = float(((prefix - prefix.mean()) * (final - final.mean())).mean())
            line = covariance / spread**2
            related = covariance / (spread * float(final.std())) if final.std() > 0 else 0.0
        slope.append(line)
        intercept.append(float(final.mean()) - line * float(prefix.mean()))
        correlation.append(related)
        samples_at.append(len(prefix))
    return PrefixCalibration(
        positions, tuple(slope), tuple(intercept), tuple(correlation), tuple(samples_at)
    )
