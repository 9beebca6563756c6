"""Bidirectional reward models: rewards of padded batches equal those of single texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.reward_walk import QUESTIONS, Round, Walk, chat_prompt, text_prompt
from helpers.tiny_rewards import ENCODER_CONFIGS, plain_reward, reward_model
from helpers.tiny_tokenizers import bpe_tokenizer, encoder_tokenizer

from stars_fast.errors import RewardError
from stars_fast.rewards import Prompt, ScoreJob, Scorer, load_scorer
from stars_fast.rewards.encoder import EncoderScorer, encoder_context
from stars_fast.rewards.text import make_template

LM = bpe_tokenizer(400)


def scorer_of(family: str, template: Any = None, **changes: Any) -> tuple[Scorer, Any, Any]:
    tokenizer = encoder_tokenizer()
    model = reward_model(family, tokenizer, **changes)
    scorer = load_scorer(model, lm_tokenizer=LM, reward_tokenizer=tokenizer, template=template)
    return scorer, model, tokenizer


@pytest.mark.parametrize("family", ENCODER_CONFIGS)
@pytest.mark.parametrize("template", [None, "plain", "Q: {prompt} A: {response}"])
def test_rewards(family: str, template: str | None) -> None:
    changes = {"type_vocab_size": 2} if template is None else {}
    scorer, model, tokenizer = scorer_of(family, template, **changes)
    walk = Walk(scorer, LM, seed=1)
    walk.start(0, text_prompt(LM, QUESTIONS[0]), budget=50)
    walk.start(1, chat_prompt(LM, QUESTIONS[2]), budget=50)
    walk.run(rounds=6, limit=30)

    def expected(item: Round) -> float:
        asked = item.prompt.messages[0]["content"] if item.prompt.messages else item.prompt.text
        answer = item.job.response_text
        if template is None:
            batch = tokenizer([asked], [answer])
            encoded = {name: values[0] for name, values in batch.items()}
        elif template == "plain":
            encoded = tokenizer(item.prompt.text + answer)
        else:
            encoded = tokenizer(f"Q: {asked} A: {answer}")
        return plain_reward(model, encoded["input_ids"], token_type_ids=encoded["token_type_ids"])

    walk.check(expected)


def test_batches_are_cut_by_length_and_padding_is_not_counted() -> None:
    tokenizer = encoder_tokenizer()
    model = reward_model("bert", tokenizer)
    shapes: list[torch.Size] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    scorer = EncoderScorer(
        model,
        tokenizer,
        make_template("plain", tokenizer, pairs=True),
        context=128,
        readout=lambda logits: logits[:, 0],
        max_batch_tokens=40,
    )
    scorer.start(0, Prompt("rice", [1], None), 10)
    words = [" rice" * count for count in (30, 1, 2, 8, 9, 3)]
    jobs = [ScoreJob(0, branch, [1], text) for branch, text in enumerate(words)]
    rewards = scorer.score(jobs)
    lengths = [len(tokenizer("rice" + text)["input_ids"]) for text in words]
    for text, reward in zip(words, rewards, strict=True):
        want = plain_reward(model, tokenizer("rice" + text)["input_ids"])
        assert reward == pytest.approx(want, abs=1e-4)
    batches = shapes[: scorer.stats()["rm_calls"]]
    assert all(rows == 1 or rows * width <= 40 for rows, width in batches)
    assert 1 < len(batches) < len(jobs)
    assert scorer.stats()["rm_tokens"] == sum(lengths)


def test_prompt_reward_is_computed_once_per_prompt() -> None:
    scorer, _, _ = scorer_of("bert")
    for request in (0, 1):
        scorer.start(request, Prompt("rice", [1], None), 10)
    first = scorer.score([ScoreJob(0, 0, [], "")])
    tokens = scorer.stats()["rm_tokens"]
    assert scorer.score([ScoreJob(1, 0, [], "")]) == first
    assert scorer.stats()["rm_tokens"] == tokens


def test_too_long() -> None:
    scorer, _, _ = scorer_of("bert", max_position_embeddings=24)
    prompt = Prompt("rice", [1], None)
    with pytest.raises(ValueError, match="context of 24 tokens; shorten the prompt"):
        scorer.start(0, prompt, 21)
    scorer.start(0, prompt, 10)
    long, good = scorer.score([ScoreJob(0, 0, [1], " rice" * 40), ScoreJob(0, 1, [1], "tea")])
    assert isinstance(long, ValueError)
    assert "context of 24" in str(long)
    assert isinstance(good, float)


@pytest.mark.parametrize(("family", "limit"), [("bert", 100), ("roberta", 99), ("deberta_v2", 100)])
def test_context(family: str, limit: int) -> None:
    tokenizer = encoder_tokenizer(model_max_length=int(1e30))
    model = reward_model(family, tokenizer, max_position_embeddings=100)
    assert encoder_context(model, tokenizer) == limit
    ids = [5] * limit
    assert plain_reward(model, ids) == plain_reward(model, ids)
    if family != "deberta_v2":  # whose positions are relative: the limit is that of its training
        with pytest.raises((IndexError, RuntimeError)):
            plain_reward(model, [5] * (limit + 1))
    assert encoder_context(model, encoder_tokenizer(model_max_length=64)) == 64


def test_template_function_that_raises_and_model_that_raises() -> None:
    def template(prompt: str, response: str) -> str:
        if "no" in response:
            raise KeyError("no")
        return prompt + response

    scorer, model, _ = scorer_of("bert", template)
    scorer.start(0, Prompt("rice", [1], None), 10)
    good, bad = scorer.score([ScoreJob(0, 0, [1], "yes"), ScoreJob(0, 1, [1], "no")])
    assert isinstance(good, float)
    assert isinstance(bad, ValueError)
    assert "reward_template raised KeyError: 'no'" in str(bad)

    def fail(*_: object) -> None:
        raise RuntimeError("device lost")

    model.register_forward_pre_hook(fail)
    (lost,) = scorer.score([ScoreJob(0, 2, [1], "perhaps")])
    assert isinstance(lost, RewardError)
    assert "device lost" in str(lost)


def test_not_finite_rewards_fail_alone() -> None:
    scorer, model, tokenizer = scorer_of("bert", "plain")
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("rice")["input_ids"][1]] = torch.nan
    scorer.start(0, Prompt("the", [1], None), 10)
    good, bad = scorer.score([ScoreJob(0, 0, [1], " film"), ScoreJob(0, 1, [1], " rice")])
    assert isinstance(good, float)
    assert isinstance(bad, RewardError)


def test_tokenizer_without_padding_token() -> None:
    tokenizer = encoder_tokenizer()
    model = reward_model("bert", tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        load_scorer(model, lm_tokenizer=LM, reward_tokenizer=tokenizer)
