"""The gold score: what each construction is worth, and any text has a score."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stars_fast.demo import gold_score
from stars_fast.demo.gold import combine, evaluations, value_of
from stars_fast.demo.grammar import reviews
from stars_fast.demo.lexicon import ENTRIES, MODIFIERS, NEGATORS, NEUTRAL
from stars_fast.demo.openings import held_out_openings, training_openings


def test_gold_of_generated_text_is_the_gold_of_its_derivation() -> None:
    for review in itertools.islice(reviews(seed=11), 3000):
        assert math.isclose(gold_score(review.text), review.gold, abs_tol=1e-12), review.text
        assert math.isclose(gold_score(review.response), review.gold, abs_tol=1e-12)


def test_values_by_hand() -> None:
    # gold = w * v / (1 + w) for one evaluation
    assert gold_score("The plot is clever.") == pytest.approx(0.65 / 2)
    assert gold_score("The plot is very clever.") == pytest.approx(0.65 * 1.3 / 2)
    assert gold_score("The plot is far from clever.") == pytest.approx(-0.8 * 0.65 / 2)
    assert gold_score("Overall, I would not recommend it.") == pytest.approx(-2 * 0.9 / 3)
    assert gold_score("The plot is dull at first, but gripping by the end.") == pytest.approx(
        (-0.5 * 0.65 + 1.5 * 0.9) / 3
    )
    assert gold_score("My sister thinks the plot is clever.") == pytest.approx(0.25 * 0.65 / 1.25)


@pytest.mark.parametrize("entry", sorted(ENTRIES))
def test_negation_flips(entry: str) -> None:
    plain = gold_score(f"it is {entry}.")
    assert plain * gold_score(f"it is not {entry}.") < 0
    _, is_deed = ENTRIES[entry]
    if not is_deed:
        for negator, strength in NEGATORS.items():
            assert gold_score(f"it is {negator} {entry}.") == pytest.approx(-strength * plain)


@pytest.mark.parametrize("modifier", sorted(MODIFIERS))
def test_modifiers_scale(modifier: str) -> None:
    ratio = gold_score(f"It is {modifier} good.") / gold_score("It is good.")
    assert ratio == pytest.approx(MODIFIERS[modifier])
    assert abs(value_of("terrible", modifier)) <= 1.0


def test_negation_takes_in_the_modifier() -> None:
    assert value_of("good", "very", "not") == pytest.approx(-0.5 * 1.3 * 0.65)
    assert gold_score("It is not very good.") == pytest.approx(-0.5 * 1.3 * 0.65 / 2)


def test_contrast_leans_to_the_claim() -> None:
    assert gold_score("The plot is bad, but the cast is good.") > 0
    assert gold_score("The cast is good, but the plot is bad.") < 0
    assert gold_score("Although the cast is good, the plot is bad.") == pytest.approx(
        gold_score("The cast is good, but the plot is bad.")
    )


def test_expectations_do_not_count_and_reports_count_little() -> None:
    assert gold_score("I expected the plot to be dull") == 0.0
    assert gold_score("I expected the plot to be dull, but it is clever.") > 0.3
    assert abs(gold_score("My boss says it is bad.")) < abs(gold_score("It is bad.")) / 2


def test_length_is_evidence() -> None:
    once, twice = gold_score("It is good."), gold_score("It is good. The plot is good.")
    assert 0 < once < twice < 0.65


def test_neutral_text_scores_zero() -> None:
    texts = [opening.text for opening in (*training_openings(), *held_out_openings())]
    texts += [sentence for sentences in NEUTRAL.values() for sentence in sentences]
    for text in ["", " ", "...", *texts]:
        assert evaluations(text) == [], text
        assert gold_score(text) == 0.0


def test_truncated_text_counts_what_is_complete() -> None:
    text = "The plot is dull at first, but gripping by the end."
    assert gold_score(text[: text.index("dull")]) == 0.0
    assert gold_score("Although the plot is dull") == pytest.approx(-0.5 * 0.65 / 1.5)
    assert gold_score(text[: text.index(" gripping")]) == pytest.approx(-0.65 / 2)


def test_case_and_white_space_do_not_matter() -> None:
    assert gold_score("OVERALL,  it is\nvery GOOD") == gold_score("Overall, it is very good.")


@given(st.text() | st.lists(st.sampled_from([*ENTRIES, *NEGATORS, ", but ", ". "])).map(" ".join))
def test_any_text_has_a_bounded_score(text: str) -> None:
    assert -1.0 < gold_score(text) < 1.0


def test_combine_of_nothing_is_neutral() -> None:
    assert combine([]) == 0.0


def test_unknown_phrase_is_an_error() -> None:
    with pytest.raises(KeyError, match="nonesuch"):
        value_of("nonesuch")
