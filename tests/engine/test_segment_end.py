"""Segments that end at clauses, sentences and steps: the engine against the loop written out."""

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


#: Two letters that the random model's tokens put together in many ways.
_LETTERS = bpe_tokenizer().convert_tokens_to_ids(["e", "ee", "te", "er", "ce", "he"])
STEPS = dataclasses.replace(
    PARAMS, segment_end="step", step_text="ee", logit_bias=dict.fromkeys(_LETTERS, 4.0)
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


@pytest.mark.parametrize("least", [1, 3])
def test_segments_end_behind_steps_in_whatever_tokens(least: int) -> None:
    ends: set[tuple[str, ...]] = set()
    tokenizer = bpe_tokenizer()
    for output in run(dataclasses.replace(STEPS, min_segment_length=least)):
        ids = output.token_ids
        texts = [tokenizer.decode([token], skip_special_tokens=True) for token in ids]
        steps = ["".join(texts[:end]).count("ee") for end in range(len(texts) + 1)]
        for segment in output.segments:
            inside = [steps[i] > steps[i - 1] for i in range(segment.start + 1, segment.end + 1)]
            assert not any(inside[least - 1 : -1])
            full = segment.end - segment.start == PARAMS.segment_length
            assert inside[-1] or full or segment.end == PARAMS.max_tokens
            if inside[-1]:
                ends.add(("", *texts)[segment.end - 1 : segment.end + 1])
        assert output.finish_reason == "length"
    assert any("ee" in last for _, last in ends)  # in one token
    assert any("ee" not in last for _, last in ends)  # in two


def test_a_step_that_ends_before_the_stop_token_ends_no_response() -> None:
    """What was drawn behind a step is not there, an end of the response included."""
    ended = dataclasses.replace(STEPS, min_segment_length=1, stop_token_ids=_LETTERS[3:])
    for output in run(ended):
        assert all(token not in _LETTERS[3:] for token in output.token_ids[:-1])
        assert output.finish_reason == "stop"
        assert output.token_ids[-1] in _LETTERS[3:]


@pytest.mark.parametrize("params", [PARAMS, STEPS], ids=["clause", "step"])
def test_the_number_of_candidates_and_the_rows_beside_change_nothing(params: StarsParams) -> None:
    want = [output.token_ids for output in run(params)]
    for candidates in (3, "auto"):
        got = run(dataclasses.replace(params, candidates=candidates))
        assert [output.token_ids for output in got] == want
    plain = dataclasses.replace(PARAMS, segment_end="length", min_segment_length=4)
    engine = bpe_engine()
    each = [dataclasses.replace(p, seed=50) for p in (params, plain)]
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


@pytest.mark.parametrize("end", ["clause", "step"])
def test_a_tokenizer_is_needed(end: Any) -> None:
    engine = Engine(small_model(), text_reward, num_pages=100)
    with pytest.raises(ValueError, match=f"segment_end='{end}' needs a tokenizer"):
        engine.add_request("a", [1, 2, 3], dataclasses.replace(PARAMS, segment_end=end))


@pytest.mark.parametrize("text", ["", 3, None, "\ud800"])
def test_a_step_text_is_text(text: Any) -> None:
    with pytest.raises(ValueError, match="step_text"):
        StarsParams(segment_end="step", step_text=text)
