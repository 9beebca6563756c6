"""`model.generate(custom_generate=stars_fast.hf.generate)` against the engine itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.outputs import rounds_are_whole
from helpers.tiny_lm import letter_model, letter_tokenizer
from transformers import LlamaForCausalLM

from stars_fast import Engine, StarsParams, hf
from stars_fast.errors import RequestFailedError
from stars_fast.seeds import derive_seed

END = 3
OPTIONS = {"num_pages": 200, "page_size": 4}
PARAMS = StarsParams(target_reward=0.5, segment_length=4, max_attempts=3, seed=11)


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    return [
        (text.count("a") - text.count("b")) / (1 + len(prompt))
        for prompt, text in zip(prompts, responses, strict=True)
    ]


@pytest.fixture
def model() -> LlamaForCausalLM:
    return copy.deepcopy(letter_model())


def call(model: LlamaForCausalLM, rows: list[list[int]], **options: Any) -> Any:
    """The rows padded on the left, and decoded."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[END] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    settings: dict[str, Any] = {
        "custom_generate": hf.generate, "reward_model": reward, "stars_params": PARAMS,
        "lm_tokenizer": TOKENIZER, "engine_options": OPTIONS, "do_sample": True, "top_k": 0,
        "max_new_tokens": 12, "pad_token_id": END,
    }  # fmt: skip
    return model.generate(ids, attention_mask=mask, **(settings | options))


TOKENIZER = letter_tokenizer()


@pytest.fixture(autouse=True)
def whole_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are compared to the bit."""
    rounds_are_whole(monkeypatch)


def expected(
    model: LlamaForCausalLM, rows: list[list[int]], repeats: int = 1, **changes: Any
) -> list[Any]:
    engine = Engine(model, reward, tokenizer=TOKENIZER, num_pages=200, page_size=4)
    changes = {
        "temperature": 1.0, "top_k": 0, "max_tokens": 12, "stop_token_ids": [END],
        "ignore_eos": True, **changes,
    }  # fmt: skip
    wanted = [row for row in rows for _ in range(repeats)]
    each = [
        StarsParams(
            target_reward=0.5, segment_length=4, max_attempts=3, seed=derive_seed(11, i), **changes
        )
        for i in range(len(wanted))
    ]
    return [output.outputs[0] for output in engine.generate(wanted, each, use_tqdm=False)]


ROWS = [[0, 1, 2, 0, 1], [1], [2, 2]]


def test_a_padded_batch_is_the_engine_s(model: LlamaForCausalLM) -> None:
    wanted = expected(model, ROWS, 2)
    # The padding is left in place, as transformers leaves it.
    found = call(model, ROWS, num_return_sequences=2, return_dict_in_generate=True)
    assert found.sequences.dtype == torch.int64
    longest = max(len(output.token_ids) for output in wanted)
    assert found.sequences.shape == (6, 5 + longest)
    for number, (row, output) in enumerate(zip(found.sequences.tolist(), wanted, strict=True)):
        prompt = ROWS[number // 2]
        assert row[5 - len(prompt) : 5] == prompt
        assert row[5 : 5 + len(output.token_ids)] == output.token_ids
        assert set(row[5 + len(output.token_ids) :]) <= {END}
    assert found.completions == wanted
    assert found.rewards.tolist() == pytest.approx([output.reward for output in wanted])
    assert len({tuple(row) for row in found.sequences.tolist()}) == 6
    plain = call(model, ROWS, num_return_sequences=2)
    assert torch.equal(plain, found.sequences)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.6},
        {"top_k": 2},
        {"top_k": 50, "temperature": 0.7},  # more than there are tokens
        {"top_p": 0.7},
        {"min_p": 0.3},
        {"temperature": 1.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1},
    ],
    ids=str,
)
def test_sampling_is_transformers_s(model: LlamaForCausalLM, changes: dict[str, Any]) -> None:
    most = {**changes, "top_k": min(changes.get("top_k", 0), 4)}
    wanted = expected(model, ROWS, **most)
    found = call(model, ROWS, return_dict_in_generate=True, **changes)
    assert found.completions == wanted
    assert wanted != expected(model, ROWS)


def test_penalties_are_transformers_s(model: LlamaForCausalLM) -> None:
    changes = {"repetition_penalty": 1.6, "sequence_bias": [[[END], 9.0]], "min_new_tokens": 4}
    wanted = expected(model, ROWS, repetition_penalty=1.6, logit_bias={END: 9.0}, min_tokens=4)
    found = call(model, ROWS, return_dict_in_generate=True, **changes)
    assert tokens(found.completions) == tokens(wanted)
    assert not any(END in ids[:4] for ids in tokens(wanted))
    assert any(END in ids for ids in tokens(wanted))
    given = {"min_length": 5 + 4, "eos_token_id": [END, 0]}
    found = call(model, ROWS, return_dict_in_generate=True, **given)
    wanted = expected(model, ROWS, min_tokens=4, stop_token_ids=[END, 0])
    assert tokens(found.completions) == tokens(wanted)


def tokens(completions: list[Any]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


def test_lengths_and_ends(model: LlamaForCausalLM) -> None:
    found = call(model, ROWS, max_new_tokens=None, max_length=11, return_dict_in_generate=True)
    assert found.completions == expected(model, ROWS, max_tokens=6)
    found = call(model, ROWS, eos_token_id=[0, 1], return_dict_in_generate=True)
    assert found.completions == expected(model, ROWS, stop_token_ids=[0, 1])
    assert {c.token_ids[-1] for c in found.completions} <= {0, 1}


def test_seeds_come_from_torch_where_none_is_given(model: LlamaForCausalLM) -> None:
    params = StarsParams(method="vanilla")
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(call(model, ROWS, reward_model=None, stars_params=params).tolist())
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_weights_may_change_between_calls(model: LlamaForCausalLM) -> None:
    rows = [[0, 1, 2, 0, 1, 2, 0, 1, 2]] * 2  # whole pages, which a cache could hold
    call(model, rows)
    kept = model.__dict__["_stars_fast_engine"].engine
    with torch.no_grad():
        for parameter in model.parameters():
            generator = torch.Generator().manual_seed(0)
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    found = call(model, rows, return_dict_in_generate=True)
    assert model.__dict__["_stars_fast_engine"].engine is kept
    assert found.completions == expected(model, rows)


def test_other_options_make_another_engine(model: LlamaForCausalLM) -> None:
    def kept() -> Engine:
        return model.__dict__["_stars_fast_engine"].engine

    call(model, ROWS)
    first = kept()
    call(model, ROWS, reward_model=lambda p, r: [0.0] * len(p))
    second = kept()
    assert second is not first
    call(model, ROWS, engine_options={**OPTIONS, "max_rows": 2})
    assert kept() is not second
    assert copy.deepcopy(model).__dict__["_stars_fast_engine"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_sample": False}, "do_sample must be True"),
        ({"no_repeat_ngram_size": 2}, "got a NoRepeatNGramLogitsProcessor"),
        ({"sequence_bias": [[[1, 2], 1.0]]}, r"sequence_bias must be of single tokens, got \[1, 2"),
        ({"stars_params": StarsParams(min_tokens=2)}, "min_tokens must be left out of stars"),
        ({"max_time": 1.0}, "got a MaxTimeCriteria"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores must be False"),
        ({"stars_params": StarsParams(temperature=0.5)}, "temperature must be left out of stars"),
        ({"stars_params": StarsParams(max_tokens=5)}, "max_tokens must be left out of stars"),
        ({"token_type_ids": torch.zeros(1, 2)}, "token_type_ids"),
        ({"stars_params": StarsParams()}, "target_reward=None needs Engine.calibrate"),
        ({"reward_model": None}, "needs a reward model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_honoured(
    model: LlamaForCausalLM, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, RequestFailedError), match=message):
        call(model, [[0, 1]], **changes)


def test_padding_on_the_right_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="attention_mask must pad on the left"):
        model.generate(
            torch.tensor([[0, 1], [0, END]]), attention_mask=torch.tensor([[1, 1], [1, 0]]),
            custom_generate=hf.generate, reward_model=reward, do_sample=True, max_new_tokens=4,
        )  # fmt: skip


def test_a_prompt_cache_that_holds_something_is_refused(model: LlamaForCausalLM) -> None:
    ids = torch.tensor([[0, 1, 2]])
    cache = model(ids[:, :2], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values must be left out"):
        call(model, [[0, 1, 2]], past_key_values=cache)


def test_a_request_that_fails_is_an_error(model: LlamaForCausalLM) -> None:
    def fails(prompts: list[str], responses: list[str]) -> list[float]:
        raise RuntimeError("no reward")

    with pytest.raises(RequestFailedError, match="row 0 of the batch.*no reward"):
        call(model, ROWS, reward_model=fails)


def test_the_engine_forgets_no_prompt_while_requests_run() -> None:
    engine = Engine(letter_model(), reward, tokenizer=TOKENIZER, num_pages=200, page_size=4)
    params = StarsParams(method="vanilla", top_k=0)
    engine.add_request("one", [0] * 8, params)
    with pytest.raises(ValueError, match="requests are unfinished"):
        engine.reset_prefix_cache()
    engine.abort("one")
    engine.generate([[0] * 9], params, use_tqdm=False)
    engine.generate([[0] * 9], params, use_tqdm=False)
    assert engine.stats()["cached_prompt_tokens"] == 8
    engine.reset_prefix_cache()
    engine.generate([[0] * 9], params, use_tqdm=False)
    assert engine.stats()["cached_prompt_tokens"] == 8
