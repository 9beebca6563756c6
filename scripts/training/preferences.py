"""Preferences between reviews of one opening: what the trained baselines learn from.

The demo's grammar writes both reviews. A judge prefers the first with probability
``sigmoid(sharpness * (gold of the first - gold of the second))``, the noise that the reward model
was trained with, so neither it nor a fine-tuned model knows gold. The preferred reviews are the
demonstrations of supervised fine-tuning, the pairs those of DPO.

Seeds are apart from those of the demo models, openings from those of `prompt_sets.tuning_prompts`
and of the evaluation.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from prompt_sets import tuning_prompts

from stars_fast.demo.grammar import Review, reviews

SHARPNESS = 5.0  # of make_demo_models.Settings
_REVIEW_SEED, _JUDGE_SEED = 10_000, 20_000


@dataclass(frozen=True)
class Pair:
    """Two reviews of one opening; ``chosen`` is the one that the judge preferred."""

    chosen: Review
    rejected: Review

    @property
    def prompt(self) -> str:
        """The opening."""
        return self.chosen.prompt


def preference_pairs(count: int, seed: int = 0, sharpness: float = SHARPNESS) -> list[Pair]:
    """The first ``count`` pairs, the same for the same seed; no review is in two.

    Raises
    ------
    ValueError
        If ``count`` is negative.
    """
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    judge = random.Random(_JUDGE_SEED + seed)
    kept_back = frozenset(tuning_prompts())
    unpaired: dict[str, Review] = {}
    pairs: list[Pair] = []
    stream = reviews(_REVIEW_SEED + seed)
    while len(pairs) < count:
        second = next(stream)
        if second.prompt in kept_back:
            continue
        first = unpaired.pop(second.prompt, None)
        if first is None:
            unpaired[second.prompt] = second
        elif judge.random() < _sigmoid(sharpness * (first.gold - second.gold)):
            pairs.append(Pair(first, second))
        else:
            pairs.append(Pair(second, first))
    return pairs


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))
