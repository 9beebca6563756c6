"""Prompt and response together are the decoded whole, in everything that an engine shows."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from fuzz.tokenizers import tokenizer
from helpers.tiny_architectures import tiny_lm

from stars_fast import Engine, StarsParams
from stars_fast.prompts import PromptReader
from stars_fast.server.transcript import TextDeltas

FAMILIES = ["llama2", "sentencepiece_first", "unigram"]


class Reward:
    """Rewards of texts, with all that was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        self.asked += zip(prompts, responses, strict=True)
        return [float(len(response) % 7) for response in responses]


def engine(tok: Any, rewards: Any, **options: Any) -> Engine:
    model = tiny_lm("llama", vocab_size=len(tok))
    return Engine(model, rewards, tokenizer=tok, num_pages=400, page_size=8, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["stars", "best_of_n", "smc"])
def test_a_reward_function_reads_the_decoded_whole(family: str, method: str) -> None:
    tok = tokenizer(family, 420)
    rewards = Reward()
    params = StarsParams(
        max_tokens=12, temperature=3.0, seed=1, ignore_eos=True, target_reward=2.0
    ).with_method(method)
    (output,) = engine(tok, rewards).generate("the film", params, use_tqdm=False)
    assert output.error is None
    (response,) = output.outputs
    whole = tok.decode(output.prompt_token_ids + response.token_ids, skip_special_tokens=True)
    if "\ufffd" not in whole:
        assert "the film" + response.text == whole
    assert ("the film", response.text) in rewards.asked
    assert {prompt for prompt, _ in rewards.asked} == {"the film"}
    assert any(text.startswith(" ") for _, text in rewards.asked)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_that_was_shown_is_not_changed(family: str) -> None:
    """Nor does a stop text begin with a space that is not there."""
    tok = tokenizer(family, 420)
    lm = engine(tok, None)
    params = StarsParams("vanilla", max_tokens=40, temperature=3.0, segment_length=1, seed=2)
    lm.add_request("a", "the film", params)
    shown = [o.outputs[0].text for _ in range(60) if lm.has_unfinished() for o in lm.step()]
    assert len(shown) > 10
    assert all(after.startswith(before) for before, after in itertools.pairwise(shown))
    deltas = TextDeltas()
    sent = [deltas.push(text, finished=text is shown[-1]) for text in shown]
    assert "".join(sent) == shown[-1]
    space = shown[-1].index(" ")
    stop = shown[-1][space : space + 2]
    (output,) = lm.generate("the film", params.with_method("vanilla", stop=stop), use_tqdm=False)
    assert output.outputs[0].text == shown[-1][:space]


def test_a_scored_response_stands_behind_its_prompt() -> None:
    """The ids of a text that is scored are those of a continuation, not of a text of its own."""
    tok = tokenizer("llama2", 420)
    reader = PromptReader(tok, len(tok), None)
    ids = reader.response_ids(" the film")
    assert ids == tok("the film", add_special_tokens=False)["input_ids"]
    ids = reader.response_ids("the film</s>")
    assert tok.convert_ids_to_tokens(ids[0]) != "\u2581the"
    assert tok.eos_token_id not in ids


@pytest.mark.parametrize("parse_special", [False, True])
def test_special_tokens_of_a_scored_response(
    parse_special: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are text to the models like those of prompts, unless the engine is told otherwise."""
    tok = tokenizer("llama2", 420)
    lm = engine(tok, Reward(), parse_special=parse_special)
    seen: list[list[int]] = []

    def score_whole(pairs: Any) -> list[float]:
        seen.extend(ids for _, ids, _ in pairs)
        return [0.0] * len(pairs)

    monkeypatch.setattr(lm.loop, "score_whole", score_whole)
    lm.score("the film", ["good</s>"])
    assert (tok.eos_token_id in seen[0]) == parse_special


def test_an_aborted_response_has_all_of_its_text() -> None:
    tok = tokenizer("llama2", 420)
    lm = engine(tok, None)
    params = StarsParams("vanilla", max_tokens=40, temperature=3.0, segment_length=1, seed=2)
    for number in range(30):
        lm.add_request("a", "the film", params)
        for _ in range(number):
            lm.step()
        output = lm.abort("a")
        if output is None:
            break
        ids = output.outputs[0].token_ids
        whole = tok.decode(output.prompt_token_ids + ids, skip_special_tokens=True)
        assert len(ids) == number
        assert "\ufffd" in whole or "the film" + output.outputs[0].text == whole
