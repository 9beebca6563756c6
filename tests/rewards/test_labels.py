"""Rewards of classifiers with several labels, and of heads of any make, against plain forwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.reward_walk import QUESTIONS, Round, Walk, text_prompt
from helpers.tiny_rewards import reward_model
from helpers.tiny_tokenizers import bpe_tokenizer, encoder_tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    PreTrainedModel,
)

from stars_fast import RewardHead
from stars_fast.errors import UnsupportedModelError
from stars_fast.rewards import Scorer, load_scorer

LM = bpe_tokenizer(400)
LABELS = {0: "safe", 1: "unsafe", 2: "unsure"}


def with_labels(family: str, tokenizer: Any, count: int = 3) -> PreTrainedModel:
    return reward_model(
        family, tokenizer, num_labels=count, id2label={i: LABELS[i] for i in range(count)}
    )


def load(model: Any, head: Any = None, **options: Any) -> Scorer:
    options = {"reward_tokenizer": LM, "num_pages": 200, "page_size": 4, **options}
    return load_scorer(model, lm_tokenizer=LM, head=head, **options)


@torch.no_grad()
def logits(model: PreTrainedModel, item: Round) -> Tensor:
    ids = [*item.prompt.token_ids, *item.job.response_ids]
    return model(input_ids=torch.tensor([ids]))[0].reshape(-1)


HEADS: list[tuple[Any, Callable[[Tensor], Any]]] = [
    (RewardHead(label="unsafe"), lambda x: x[1]),
    (RewardHead(label=2), lambda x: x[2]),
    ("label=2", lambda x: x[2]),
    (
        RewardHead(label="safe", activation="log_odds"),
        lambda x: torch.logit(x.double().softmax(0)[0]),
    ),
    (RewardHead(label="safe", activation="probability"), lambda x: x.softmax(0)[0]),
    (RewardHead(label_weights={"safe": 1, "unsafe": -1}), lambda x: x[0] - x[1]),
    (RewardHead(label_weights={"0": 0.5, 2: 2}), lambda x: 0.5 * x[0] + 2 * x[2]),
]


@pytest.mark.parametrize("number", range(len(HEADS)))
def test_labels_of_a_causal_classifier(tmp_path: Path, number: int) -> None:
    head, want = HEADS[number]
    model = with_labels("llama", LM)
    model.save_pretrained(tmp_path)
    LM.save_pretrained(tmp_path)
    walk = Walk(load(tmp_path, head, reward_tokenizer=None), LM, seed=number)
    walk.start(0, text_prompt(LM, QUESTIONS[0]))
    walk.start(1, text_prompt(LM, QUESTIONS[1]))
    walk.run(rounds=8)
    walk.check(lambda item: float(want(logits(model, item))))


@pytest.mark.parametrize("number", range(len(HEADS)))
def test_labels_of_an_encoder(number: int) -> None:
    head, want = HEADS[number]
    tokenizer = encoder_tokenizer()
    model = with_labels("bert", tokenizer)
    walk = Walk(load(model, head, reward_tokenizer=tokenizer, template="plain"), LM, seed=number)
    walk.start(0, text_prompt(LM, QUESTIONS[0]))
    walk.run(rounds=4, limit=12)

    @torch.no_grad()
    def expected(item: Round) -> float:
        encoded = tokenizer(item.prompt.text + item.job.response_text, return_tensors="pt")
        return float(want(model(**encoded).logits[0]))

    walk.check(expected)


def test_two_labels_safety_classifier_log_odds() -> None:
    """With two labels, log-odds are the difference of the logits."""
    model = with_labels("llama", LM, 2)
    walk = Walk(load(model, "label=safe,activation=log_odds"), LM)
    walk.start(0, text_prompt(LM, QUESTIONS[0]))
    walk.run(rounds=4)
    walk.check(lambda item: float(logits(model, item)[0] - logits(model, item)[1]))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (None, r"3 labels \(safe, unsafe, unsure\).*pass reward_head"),
        (RewardHead(label="sure"), r"label 'sure'; the labels of .* are 0 \(safe\), 1 \(unsafe\)"),
        (RewardHead(label=3), "label 3; the labels"),
        (RewardHead(label_weights={"safe": 1, 0: 1}), "names a label twice"),
        (RewardHead(token=3), "asks for a token, which a language model has"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_labels_that_are_not_there(head: Any, message: str, family: str) -> None:
    tokenizer = LM if family == "llama" else encoder_tokenizer()
    with pytest.raises((ValueError, UnsupportedModelError), match=message):
        load(with_labels(family, tokenizer), head, reward_tokenizer=tokenizer)


def test_one_label_has_no_odds() -> None:
    with pytest.raises(ValueError, match="log_odds.*needs two labels"):
        load(reward_model("llama", LM), RewardHead(label=0, activation="log_odds"))


def test_functions_have_no_head() -> None:
    with pytest.raises(ValueError, match="reward_head is for reward models with a head"):
        load(lambda prompts, responses: [0.0] * len(prompts), "label=0")


class ValueModel(LlamaPreTrainedModel):
    """A user's own class: a value of every token."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.v_head = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> tuple[Tensor]:
        return (self.v_head(self.model(input_ids=input_ids)[0]),)


def loaded(name: str) -> PreTrainedModel:
    model = reward_model("llama", LM)
    if name == "two layers":
        model.score = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 1))
    elif name == "norm":
        model.score = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 1))
    elif name == "value of every token":
        model.config._attn_implementation = "eager"
        model = ValueModel(model.config).eval()
    return model


@pytest.mark.parametrize("name", ["linear", "two layers", "norm", "value of every token"])
def test_any_module_on_the_last_hidden_state(name: str) -> None:
    model = loaded(name)
    walk = Walk(load(model), LM, seed=len(name))
    walk.start(0, text_prompt(LM, QUESTIONS[0]))
    walk.start(1, text_prompt(LM, QUESTIONS[1]))
    walk.run(rounds=8)
    walk.check(lambda item: float(logits(model, item)[-1]))


def test_a_head_that_reads_more_than_one_token() -> None:
    model = reward_model("llama", LM)

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 1)

        def forward(self, hidden: Tensor) -> Tensor:
            return self.linear(hidden - hidden.mean(dim=-2, keepdim=True))

    model.score = Mean()
    with pytest.raises(UnsupportedModelError, match="is not its layer 'score' applied to the last"):
        load(model)


def test_a_loaded_language_model() -> None:
    classifier = reward_model("llama", LM)
    config = LlamaConfig.from_dict(classifier.config.to_dict())
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert isinstance(model, LlamaForCausalLM)
    walk = Walk(load(model, RewardHead(tokens=(50, 60))), LM)
    walk.start(0, text_prompt(LM, QUESTIONS[0]))
    walk.run(rounds=6)

    @torch.no_grad()
    def expected(item: Round) -> float:
        ids = [*item.prompt.token_ids, *item.job.response_ids]
        last = model(input_ids=torch.tensor([ids])).logits[0, -1]
        return float(last[50] - last[60])

    walk.check(expected)


def test_a_verdict_behind_the_response() -> None:
    """The token is read behind the template: a question after the response."""
    config = LlamaConfig.from_dict(reward_model("llama", LM).config.to_dict())
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    template = "{prompt}{response}\nNot bad?"
    scorer = load(model, 'tokens=[" and", " it"]', template=template, reward_tokenizer=LM)
    walk = Walk(scorer, LM)
    walk.start(0, text_prompt(LM, QUESTIONS[0]))
    walk.run(rounds=6)
    prompt = LM(QUESTIONS[0])["input_ids"]
    question = LM("a\nNot bad?", add_special_tokens=False)["input_ids"][1:]
    good, bad = (LM(text, add_special_tokens=False)["input_ids"][0] for text in (" and", " it"))

    @torch.no_grad()
    def expected(item: Round) -> float:
        ids = [*prompt, *item.job.response_ids, *question]
        last = model(input_ids=torch.tensor([ids])).logits[0, -1]
        return float(last[good] - last[bad])

    walk.check(expected)
