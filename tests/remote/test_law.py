"""Responses drawn by calls follow the closed form of STARS, by tokens and by text."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("httpx", reason="needs httpx, of the extra remote")

from helpers.letter_law import (
    EOS,
    PROMPT,
    Tokens,
    model_law,
    p_value,
    stars_law,
)
from helpers.tiny_lm import LETTERS

from stars_fast import StarsParams

REQUESTS = 400
BY_TEXT = 80  # of those
PARAMS = StarsParams(
    segment_length=2,
    max_tokens=4,
    max_attempts=3,
    target_reward=0.5,
    alpha=0.7,
    beta=0.3,
    temperature=1.0,
    top_k=0,
)


def response_of(output: Any) -> Tokens:
    """The tokens, from text and finish reason alone: without an end the four letters are all."""
    assert output.error is None
    (completion,) = output.outputs
    ends = (EOS,) if completion.finish_reason == "stop" else ()
    return tuple(LETTERS.index(letter) for letter in completion.text) + ends


def drawn(connect: Any, tokens: bool, requests: int) -> list[Any]:
    engine = connect(tokens=tokens, seed=0)
    params = replace(PARAMS, candidates=2)
    outputs: list[Any] = engine.generate([PROMPT] * requests, params, use_tqdm=False)
    return outputs


def test_matches_stars_law(connect: Any) -> None:
    """By tokens; by text, the same responses: seeds are those of the requests."""
    outputs = drawn(connect, True, REQUESTS)
    responses = [response_of(output) for output in outputs]
    assert responses == [tuple(output.outputs[0].token_ids) for output in outputs]
    by_text = [response_of(output) for output in drawn(connect, False, BY_TEXT)]
    assert by_text == responses[:BY_TEXT]
    counts = Counter(responses)
    assert p_value(counts, stars_law(PARAMS)) > 1e-3
    # And not that of a slightly different algorithm.
    for other in ({"max_attempts": 1}, {"beta": 1.0}, {"target_reward": 1.2}):
        assert p_value(counts, stars_law(replace(PARAMS, **other))) < 1e-3, other
    assert p_value(counts, model_law(PARAMS.max_tokens)) < 1e-9
