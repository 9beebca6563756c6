"""``acceptance="gibbs"``: a segment is chosen among N by exp(r / beta)."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from helpers.letter_law import (
    count,
    gibbs_law,
    letter_engine,
    model_law,
    p_value,
    responses_of,
    tilted,
    total_variation,
)
from helpers.outputs import same
from helpers.ragged_law import EVEN, RAGGED, SETTINGS, ragged_engine
from helpers.ragged_law import count as count_ragged

from stars_fast import Engine, StarsParams

BETA = 0.5
PARAMS = StarsParams(
    acceptance="gibbs", segment_length=2, max_tokens=2, beta=BETA, temperature=0.9, top_k=0
)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return letter_engine()


@pytest.mark.parametrize(("candidates", "max_tokens"), [(2, 2), (3, 2), (2, 3)])
def test_matches_closed_form(engine: Engine, candidates: int, max_tokens: int) -> None:
    params = dataclasses.replace(PARAMS, candidates=candidates, max_tokens=max_tokens)
    counts = count(engine, params, 3000)
    assert p_value(counts, gibbs_law(params, BETA)) > 1e-3
    planted = {
        "beta": gibbs_law(params, 0.85),
        "one more": gibbs_law(dataclasses.replace(params, candidates=candidates + 1), BETA),
        "one fewer": gibbs_law(dataclasses.replace(params, candidates=candidates - 1), BETA),
        "temperature": gibbs_law(dataclasses.replace(params, temperature=1.1), BETA),
    }
    found = {name: p_value(counts, law) for name, law in planted.items()}
    assert all(p < 1e-4 for p in found.values()), found


def test_segments_of_unequal_length_match_closed_form() -> None:
    params = dataclasses.replace(PARAMS, candidates=3, beta=1.0, **SETTINGS)
    counts = count_ragged(ragged_engine(), params, 12_000)
    assert p_value(counts, gibbs_law(params, 1.0, RAGGED)) > 1e-3
    assert p_value(counts, gibbs_law(params, 1.0, EVEN)) < 1e-6


def test_one_candidate_is_the_model(engine: Engine) -> None:
    counts = count(engine, dataclasses.replace(PARAMS, candidates=1), 2500)
    assert p_value(counts, model_law(2, PARAMS.temperature)) > 1e-3


def test_comes_to_the_tilted_distribution_as_candidates_grow(engine: Engine) -> None:
    requests = 1200
    law = tilted(model_law(2, PARAMS.temperature), BETA)
    apart = [
        total_variation(count(engine, dataclasses.replace(PARAMS, candidates=n), requests), law)
        for n in (1, 2, 4, 8, 16)
    ]
    # What as many exact draws would be apart on average, at most: E|X/n - p| <= sqrt(p / n).
    noise = sum(math.sqrt(p / requests) for p in law.values()) / 2
    assert all(after < before for before, after in itertools.pairwise(apart[:4])), apart
    assert apart[0] > 6 * noise, apart
    assert apart[-1] < 1.5 * noise, (apart, noise)


@pytest.mark.parametrize("max_rows", [1, 4])
def test_same_choice_in_however_many_rounds(engine: Engine, max_rows: int) -> None:
    params = dataclasses.replace(PARAMS, candidates=7, max_tokens=7, ignore_eos=True, trace=True)
    few = responses_of(letter_engine(max_rows=max_rows), params, 4)
    many = responses_of(engine, params, 4)
    assert all(same(a, b) for a, b in zip(few, many, strict=True))
    kept = {s.attempts - len(s.rejected) for output in few for s in output.segments}
    assert kept == {1}
    assert {s.accepted for output in few for s in output.segments} == {"choice"}
    assert {s.threshold for output in few for s in output.segments} == {None}
