"""Preference data: the same for a seed, apart from the evaluation, and as noisy as said."""

from __future__ import annotations

import math
import statistics

import pytest
from preferences import preference_pairs
from prompt_sets import TUNING, training_prompts, tuning_prompts

from stars_fast.demo import gold_score, prompts
from stars_fast.demo.openings import HELD_OUT


def test_same_seed_same_pairs() -> None:
    first = preference_pairs(50)
    assert preference_pairs(50) == first
    assert preference_pairs(20) == first[:20]
    assert preference_pairs(50, seed=1) != first
    assert preference_pairs(0) == []
    with pytest.raises(ValueError, match="count must be at least 0, got -1"):
        preference_pairs(-1)


def test_pairs_are_two_reviews_of_one_opening() -> None:
    pairs = preference_pairs(300)
    for pair in pairs:
        assert pair.chosen.prompt == pair.rejected.prompt == pair.prompt
        assert pair.chosen.gold == pytest.approx(gold_score(pair.chosen.text))
    responses = [review.text for pair in pairs for review in (pair.chosen, pair.rejected)]
    assert len(set(responses)) > 0.99 * len(responses)


def test_sets_of_prompts_are_disjoint() -> None:
    tuning, training, evaluation = tuning_prompts(), training_prompts(), prompts(HELD_OUT)
    assert len(set(tuning)) == TUNING
    assert len(set(training)) == len(training) > 500
    assert set(tuning).isdisjoint(training)
    assert set(evaluation).isdisjoint([*tuning, *training])


def test_no_text_starts_with_a_prompt_of_another_set() -> None:
    elsewhere = (*prompts(HELD_OUT), *tuning_prompts())
    for pair in preference_pairs(500):
        assert pair.prompt in training_prompts()
        assert not pair.chosen.text.startswith(elsewhere)
        assert not pair.rejected.text.startswith(elsewhere)


@pytest.mark.parametrize("sharpness", [1.0, 5.0])
def test_higher_gold_is_preferred_at_the_stated_rate(sharpness: float) -> None:
    pairs = preference_pairs(2000, sharpness=sharpness)
    gaps = [pair.chosen.gold - pair.rejected.gold for pair in pairs]
    stated = [1.0 / (1.0 + math.exp(-sharpness * abs(gap))) for gap in gaps]
    right = statistics.mean(gap > 0 for gap in gaps)
    error = math.sqrt(sum(p * (1 - p) for p in stated)) / len(pairs)
    assert right == pytest.approx(statistics.mean(stated), abs=4 * error)
    assert 0.5 < right < 1.0


def test_without_sharpness_the_judge_tosses_a_coin() -> None:
    gaps = [pair.chosen.gold - pair.rejected.gold for pair in preference_pairs(2000, sharpness=0.0)]
    assert statistics.mean(gap > 0 for gap in gaps) == pytest.approx(0.5, abs=0.05)
