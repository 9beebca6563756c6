"""Attempts that go to the first segments, or to the last: the table, and the law of responses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from helpers.letter_law import (
    Law,
    count,
    gibbs_law,
    letter_engine,
    p_value,
    responses_of,
    stars_law,
)
from helpers.outputs import same
from helpers.ragged_law import RAGGED, SETTINGS, ragged_engine
from helpers.ragged_law import count as count_ragged

from stars_fast import StarsParams
from stars_fast.methods.attempts import shared_out

STARS = StarsParams(
    segment_length=2, max_tokens=4, max_attempts=3, target_reward=1.2, beta=0.3, top_k=0
)
GIBBS = StarsParams(
    acceptance="gibbs", segment_length=1, max_tokens=3, candidates=2, beta=0.5, top_k=0
)


def test_what_is_shared_out_is_all_there_is() -> None:
    assert shared_out(4, 20, 0.5) == (42, 21, 11, 6)  # 1 + 76 (8, 4, 2, 1) / 15
    for parts in (1, 2, 7, 50):
        for attempts in (1, 2, 3, 20):
            for rate in (1e-9, 0.3, 0.5, 0.93, 0.999999):
                table = shared_out(parts, attempts, rate)
                assert sum(table) == parts * attempts
                assert min(table) >= 1
                assert list(table) == sorted(table, reverse=True)
                assert shared_out(parts, attempts, rate, growth=True) == table[::-1]


@pytest.mark.parametrize(
    ("params", "table"),
    [
        (dataclasses.replace(STARS, attempts_schedule="decay"), (4, 2)),
        (dataclasses.replace(STARS, attempts_schedule="growth"), (2, 4)),
        (dataclasses.replace(STARS, attempts_schedule="decay", max_attempts=1), ()),
        (dataclasses.replace(STARS, attempts_schedule="decay", temperature=0), ()),
        (dataclasses.replace(STARS, attempts_schedule="decay", max_tokens=5), (4, 3, 2)),
        (dataclasses.replace(GIBBS, attempts_schedule="decay"), (3, 2, 1)),
        # By positions where segments differ in length: half as many after 4 tokens.
        (
            dataclasses.replace(
                STARS, **SETTINGS, attempts_schedule="decay", attempts_rate=0.5**1.25
            ),
            (4, 3, 3, 3, 2),
        ),
        (
            STARS.with_method(
                "cards", rules="public", segment_length=4, min_segment_length=2, max_tokens=8,
                attempts_schedule="growth", attempts_rate=0.25,
            ),
            (3, 3, 4, 6),
        ),
    ],
    ids=["decay", "growth", "one", "greedy", "a part left", "gibbs", "clauses", "cards"],
)  # fmt: skip
def test_a_request_has_a_table(params: StarsParams, table: tuple[int, ...]) -> None:
    assert params.attempts_at == table
    uniform = dataclasses.replace(params, attempts_schedule="uniform")
    assert uniform.attempts_at == ()
    assert sum(table) == len(table) * uniform.attempts_per_segment


@pytest.mark.parametrize(
    ("params", "law"),
    [(STARS, stars_law), (GIBBS, lambda params: gibbs_law(params, 0.5))],
    ids=["stars", "gibbs"],
)
def test_responses_follow_the_law_of_their_attempts(
    params: StarsParams, law: Callable[[StarsParams], Law]
) -> None:
    forms: list[Any] = ["uniform", "decay", "growth"]
    each = {form: dataclasses.replace(params, attempts_schedule=form) for form in forms}
    counts = count(letter_engine(), each["decay"], 1500)
    assert p_value(counts, law(each["decay"])) > 1e-3
    assert p_value(counts, law(each["uniform"])) < 1e-6
    assert p_value(counts, law(each["growth"])) < 1e-6


def test_segments_of_unequal_length_have_the_attempts_of_where_they_begin() -> None:
    params = dataclasses.replace(
        STARS, **SETTINGS, target_reward=-0.5, alpha=1.0, attempts_rate=0.2,
        attempts_schedule="decay",
    )  # fmt: skip
    counts = count_ragged(ragged_engine(), params, 1500)
    assert p_value(counts, stars_law(params, RAGGED)) > 1e-3
    uniform = dataclasses.replace(params, attempts_schedule="uniform")
    assert p_value(counts, stars_law(uniform, RAGGED)) < 1e-6


@pytest.mark.parametrize("candidates", [1, 3, "auto"])
def test_every_segment_has_its_attempts_whatever_the_rounds(candidates: Any) -> None:
    params = dataclasses.replace(
        STARS, max_tokens=10, acceptance="hard", target_reward=9.0, attempts_schedule="decay",
        ignore_eos=True, candidates=candidates, trace=True,
    )  # fmt: skip
    table = params.attempts_at
    many = responses_of(letter_engine(), params, 4)
    for output in many:
        assert tuple(segment.attempts for segment in output.segments) == table
    few = responses_of(letter_engine(max_rows=1), dataclasses.replace(params, candidates=1), 4)
    assert all(same(a, b) for a, b in zip(few, many, strict=True))


@pytest.mark.parametrize("form", [STARS, GIBBS], ids=["stars", "gibbs"])
def test_segments_behind_the_last_choice_are_not_scored(form: StarsParams) -> None:
    params = dataclasses.replace(
        form, segment_length=1, max_tokens=6, attempts_schedule="decay", attempts_rate=0.1,
        ignore_eos=True, trace=True,
    )  # fmt: skip
    many = 6 * (params.attempts_per_segment - 1) - 1
    assert params.attempts_at == (many + 1, 2, 1, 1, 1, 1)
    assert params.plain_from == 2
    engine = letter_engine()
    for output in responses_of(engine, params, 5):
        assert [segment.reward is None for segment in output.segments] == [False] * 2 + [True] * 4
        assert {segment.attempts for segment in output.segments[2:]} == {1}
        assert output.reward is None
    stats = engine.stats()
    assert stats["rm_jobs"] <= stats["drafted_tokens"] - 4 * 5 + 5  # r(x) as well
    plain = dataclasses.replace(params, attempts_schedule="uniform")
    assert plain.plain_from > plain.max_tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attempts_schedule": "cosine"}, "attempts_schedule must be one of 'uniform', 'decay'"),
        ({"attempts_rate": 1.0}, r"attempts_rate must be in \(0, 1\), got 1.0"),
        (
            {"method": "rejection", "attempts_schedule": "decay"},
            "attempts_schedule is no parameter",
        ),
        (
            {"attempts_schedule": "decay", "segment_length": 1, "max_tokens": 2**17},
            "at most 65536 segments .* got max_tokens=131072, that is 131072 of 1 tokens",
        ),
    ],
)
def test_bad_schedules_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StarsParams(**changes)


def test_more_ranked_tokens_than_there_are_is_refused() -> None:
    params = StarsParams(
        "args", candidates=2, max_tokens=6, top_k=0, attempts_schedule="decay", attempts_rate=0.1
    )
    (output,) = letter_engine().generate(["ab"], params, use_tqdm=False)
    assert output.error is not None
    assert "candidates must be at most the tokens that can be drawn, 4," in output.error
    assert "got 6 by attempts_schedule" in output.error
