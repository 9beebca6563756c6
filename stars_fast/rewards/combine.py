"""From several rewards of one response to one number, and whether it keeps all constraints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from stars_fast.config import Combine
from stars_fast.errors import RewardError
from stars_fast.reward import Reward

__all__ = ["Combination", "CombinedReward"]


class CombinedReward(float):
    """A reward made of several.

    Attributes
    ----------
    rewards : dict of str to float
        Those that it is made of, by name, unweighted.
    keeps : bool
        Whether all constraints are kept.
    """

    rewards: dict[str, float]
    keeps: bool

    def __new__(cls, value: float, rewards: dict[str, float], keeps: bool) -> CombinedReward:
        """Return the number with its parts."""
        made = super().__new__(cls, value)
        made.rewards, made.keeps = rewards, keeps
        return made

    def __getnewargs__(self) -> tuple[float, dict[str, float], bool]:  # type: ignore[override]
        """Return what it is pickled by."""
        return float(self), self.rewards, self.keeps


class Combination:
    """How rewards are combined; each is first multiplied with its weight.

    Parameters
    ----------
    rewards : sequence of Reward
        Those with weight 0 have no part but their constraints.
    how : str
        ``"sum"``, ``"min"``, or ``"mean_minus_std"``: the mean less `stds` standard deviations of
        the population, which for an ensemble is a bound that falls where its members disagree.
    stds : float
        See `how`.
    """

    def __init__(self, rewards: Sequence[Reward], how: Combine, stds: float = 1.0) -> None:
        self._rewards = tuple(rewards)
        self._stds = stds
        ways: dict[Combine, Callable[[Sequence[float]], float]] = {
            "sum": math.fsum,
            "min": min,
            "mean_minus_std": self._mean_minus_std,
        }
        self._how = ways[how]

    def of(self, values: Sequence[float]) -> CombinedReward | RewardError:
        """Combine the values of the rewards, which are in their order."""
        pairs = list(zip(self._rewards, values, strict=True))
        named = {reward.name: value for reward, value in pairs}
        # Not numpy: the rounding must not depend on how many responses are combined at once.
        weighted = [reward.weight * value for reward, value in pairs if reward.weight]
        try:
            combined = self._how(weighted)
        except (OverflowError, ValueError):  # of numbers that are not finite
            combined = math.nan
        if not math.isfinite(combined):
            return RewardError(f"the rewards {named} combine to no finite number: lower weights")
        return CombinedReward(combined, named, all(r.keeps(value) for r, value in pairs))

    def _mean_minus_std(self, values: Sequence[float]) -> float:
        mean = math.fsum(values) / len(values)
        variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
        return mean - self._stds * math.sqrt(variance)
