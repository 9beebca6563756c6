"""Segments that end at clauses and sentences: the engine against the loop written out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.backends import device_of
from helpers.bpe_engine import bpe_engine, responses_of, text_reward
from helpers.tiny_lm import small_model
from helpers.tiny_tokenizers import bpe_tokenizer
from torch import Tensor

from stars_fast import Engine, StarsParams
from stars_fast.drafting.segment_ends import (
    CLAUSE,
    NONE,
    SENTENCE,
    segment_end_level,
    segment_end_levels,
)

PROMPTS = ["The film was slow at first, but", "A terrible kettle", "Not bad at all. " * 4]
PARAMS = StarsParams(
    segment_length=12,
    segment_end="clause",
    min_segment_length=2,
    max_tokens=40,
    max_attempts=4,
    target_reward=0.5,
    beta=0.6,
    candidates=1,
    temperature=1.5,
    top_k=0,
    ignore_eos=True,
)


@pytest.fixture(autouse=True)
def levels(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Borders that a random model meets often enough."""
    ids = torch.arange(small_model().config.vocab_size)
    made = torch.where(ids % 9 == 0, SENTENCE, torch.where(ids % 7 == 0, CLAUSE, NONE))
    monkeypatch.setattr("stars_fast.engine.engine.segment_end_levels", lambda *_: made)
    return made


def run(params: StarsParams = PARAMS, prompts: list[str] = PROMPTS, **options: Any) -> list[Any]:
    seeds = [50 + i for i in range(len(prompts))]
    return responses_of(bpe_engine(**options), prompts, params, seeds)


@pytest.mark.parametrize(
    ("text", "level"),
    [
        (" good", NONE), (" good.", SENTENCE), ("?!", SENTENCE), ('."', SENTENCE), ("\n", SENTENCE),
        (" a.b", NONE), (",", CLAUSE), ("); ", CLAUSE), (":", CLAUSE), ("", NONE),
        ("\u3002", SENTENCE),
    ],
)  # fmt: skip
def test_levels(text: str, level: int) -> None:
    assert segment_end_level(text) == level


def test_levels_of_a_vocabulary() -> None:
    tokenizer = bpe_tokenizer()
    levels = segment_end_levels(tokenizer, len(tokenizer) + 3)
    assert levels.shape == (len(tokenizer) + 3,)
    assert levels[-3:].tolist() == [NONE] * 3
    assert levels[tokenizer.convert_tokens_to_ids(".")] == SENTENCE
    assert levels[tokenizer.convert_tokens_to_ids(",")] == CLAUSE


@pytest.mark.parametrize("end", ["clause", "sentence"])
def test_segments_end_at_the_first_border(end: Any, levels: Tensor) -> None:
    least = {"clause": CLAUSE, "sentence": SENTENCE}[end]
    ended = 0
    for output in run(dataclasses.replace(PARAMS, segment_end=end)):
        reached = levels[output.token_ids].tolist()
        for segment in output.segments:
            inside = reached[segment.start + PARAMS.min_segment_length - 1 : segment.end]
            at_end = inside[-1] >= least
            assert all(level < least for level in inside[:-1])
            full = segment.end - segment.start == PARAMS.segment_length
            assert at_end or full or segment.end == PARAMS.max_tokens
            ended += at_end and not full
        assert output.finish_reason == "length"  # a border ends no response
    assert ended > 3


def test_the_number_of_candidates_and_the_rows_beside_change_nothing() -> None:
    want = [output.token_ids for output in run()]
    for candidates in (3, "auto"):
        got = run(dataclasses.replace(PARAMS, candidates=candidates))
        assert [output.token_ids for output in got] == want
    plain = dataclasses.replace(PARAMS, segment_end="length", min_segment_length=4)
    engine = bpe_engine()
    each = [dataclasses.replace(p, seed=50) for p in (PARAMS, plain)]
    ragged, even = engine.generate([PROMPTS[0]] * 2, each, use_tqdm=False)
    assert ragged.outputs[0].token_ids == want[0]
    assert {s.end - s.start for s in even.outputs[0].segments} == {12, 4}


def test_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    frequent = torch.where(torch.arange(400) % 3 == 0, CLAUSE, NONE)
    monkeypatch.setattr("stars_fast.engine.engine.segment_end_levels", lambda *_: frequent)
    short = dataclasses.replace(PARAMS, max_tokens=6, segment_length=3, max_attempts=2)
    model = small_model(layers=1)  # little work for the interpreter
    want = run(short, PROMPTS[:2], model=model)
    model.to(device_of("triton"))
    got = run(short, PROMPTS[:2], model=model, backend="triton")
    assert [output.segments for output in got] == [output.segments for output in want]
    # Borders were met.
    assert {s.end - s.start for output in got for s in output.segments} > {3}


def test_a_tokenizer_is_needed() -> None:
    engine = Engine(small_model(), text_reward, num_pages=100)
    with pytest.raises(ValueError, match="segment_end='clause' needs a tokenizer"):
        engine.add_request("a", [1, 2, 3], PARAMS)
