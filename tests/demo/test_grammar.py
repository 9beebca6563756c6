"""The grammar: deterministic, varied, and prompts that training never saw."""

from __future__ import annotations

import itertools
import random
import re
import statistics

import pytest

from stars_fast.demo import prompts
from stars_fast.demo.grammar import Review, reviews
from stars_fast.demo.openings import HELD_OUT, held_out_openings, training_openings

FIRST_REVIEW = (
    "Review of the watch: I bought it after a move for my office. The delivery was "
    "friendly, but the shape seems drab. I resented the repair service. The start tone is "
    "too loud, but the packaging is really friendly. The build is wobbly without being "
    "excellent. My friend says the cleaning was excellent, but I found it horrible. The "
    "control panel was handy at first, but awkward after a week."
)


def take(seed: int, count: int, *, held_out: bool = False) -> list[Review]:
    return list(itertools.islice(reviews(seed, held_out=held_out), count))


def test_same_seed_same_reviews() -> None:
    first = take(3, 50)
    random.seed(99)  # the global generator is not used
    assert take(3, 50) == first
    assert take(4, 50) != first


def test_first_review_is_fixed() -> None:
    # Pins the text that the shipped models were trained on: a change here asks for new models.
    assert take(0, 1)[0].text == FIRST_REVIEW


def test_both_sentiments_and_lengths_occur() -> None:
    sample = take(5, 2000)
    gold = [review.gold for review in sample]
    assert abs(statistics.mean(gold)) < 0.05
    assert 0.25 < statistics.pstdev(gold) < 0.6
    assert min(gold) < -0.6
    assert max(gold) > 0.6
    sentences = {review.response.count(".") for review in sample}
    assert sentences >= set(range(1, 10))
    assert len({review.text for review in sample}) > 1950


@pytest.mark.parametrize(
    "form",
    [
        r"\bnot bad\b",
        r"\bnever (dull|boring|tedious)\b",
        r"at first, but",
        r"^Although [^,.]*, the",
        r"\bis both \w+ and \w+\.",
        r"\bfar from\b",
        r"without being",
        r"^My \w+ (says|thinks) [^,]*\.",
        r"^My \w+ (says|thinks) .*, but I found it",
        r"^I expected .*, but it is",
        r"I did not \w+ the",
        r"\bvery\b",
        r"^Overall, I would not",
    ],
)
def test_construction_occurs(form: str) -> None:
    sentences = (s for review in take(6, 3000) for s in re.findall(r"[^ ][^.]*\.", review.response))
    assert any(re.search(form, sentence) for sentence in sentences)


def test_text_is_well_formed() -> None:
    for review in take(7, 500):
        assert review.response.startswith(" ")
        assert not review.prompt.endswith(" ")
        assert "  " not in review.text
        assert review.text.endswith(".")


def test_prompts_are_held_out_and_distinct() -> None:
    held_out = prompts(HELD_OUT)
    assert len(set(held_out)) == HELD_OUT >= 64
    assert not set(held_out) & {opening.text for opening in training_openings()}
    assert not any(review.prompt in set(held_out) for review in take(8, 1000))
    assert {review.prompt for review in take(8, 300, held_out=True)} <= set(held_out)
    assert prompts(8) == held_out[:8]
    kinds = {opening.kind for opening in held_out_openings()[:16]}
    assert kinds == {"film", "product"}


@pytest.mark.parametrize("n", [0, -1, HELD_OUT + 1])
def test_prompt_count_out_of_range(n: int) -> None:
    with pytest.raises(ValueError, match=f"n must be in 1..{HELD_OUT}, got {n}"):
        prompts(n)
