"""When best-of-n has enough samples.

Of n rewards with mean m, standard deviation s (n - 1) and largest b, one more is taken to be normal
about m with variance v = s^2 (1 + 1/n). It gains on average

    E[max(r - b, 0)] = sqrt(v) (phi(z) - z (1 - Phi(z))),    z = (b - m) / sqrt(v),

phi and Phi being density and distribution function of the standard normal. Below the cost of a
sample there are enough.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

#: Samples to begin with.
FIRST = 4


def expected_gain(rewards: Sequence[float]) -> float:
    """Return what the largest of at least two rewards gains by another sample, on average."""
    count = len(rewards)
    spread = statistics.stdev(rewards) * math.sqrt(1 + 1 / count)
    if spread == 0:
        return 0.0
    z = (max(rewards) - statistics.fmean(rewards)) / spread
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return spread * (density - z * math.erfc(z / math.sqrt(2)) / 2)


def more_samples(rewards: Sequence[float], most: int, cost: float) -> int:
    """Return how many samples to draw next, 0 if there are enough.

    A quarter of what there is, so that they are drawn in few rounds.

    Parameters
    ----------
    rewards
        Of the samples so far.
    most
        Samples in all, at most.
    cost
        Of a sample, in units of reward; 0: all are drawn.
    """
    count = len(rewards)
    if count >= FIRST and cost > 0 and expected_gain(rewards) < cost:
        return 0
    wave = -(-count // 4) if count else FIRST
    return most - count if cost == 0 else min(wave, most - count)
