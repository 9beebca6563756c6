"""Every kind of reward model, from its directory, against plain forward passes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.reward_readings import response_ids, whole_text
from helpers.reward_walk import QUESTIONS, Walk, chat_prompt, text_prompt
from helpers.tiny_heads import (
    OBJECTIVES,
    SIZE,
    Builder,
    base_model,
    gated,
    language_model,
    linear_head,
    named,
    save,
    token_classifier,
    two_layers,
    uncertain,
)
from helpers.tiny_tokenizers import bpe_tokenizer
from torch import nn

from stars_fast import RewardHead
from stars_fast.errors import ModelLoadError, UnsupportedModelError
from stars_fast.rewards import ScoreJob, Scorer, load_scorer
from stars_fast.rewards.causal import CausalScorer
from stars_fast.rewards.kinds import KINDS

LM = bpe_tokenizer(400)
YES, NO = 50, 60

#: What writes the model, the kind that it is, and what is asked of its head.
MODELS: dict[str, tuple[Builder, str, Any]] = {
    "trl": (
        linear_head("v_head.summary", "LlamaForCausalLM", bias=True, lm_head=True),
        "value head",
        None,
    ),
    "llama-factory": (
        linear_head(
            "v_head.summary", "LlamaForCausalLM", bias=True, lm_head=True,
            head_file="value_head.safetensors",
        ),
        "value head",
        None,
    ),
    "llama-factory-v_head": (
        linear_head("v_head.summary", "LlamaForCausalLM", head_file="v_head.safetensors"),
        "value head",
        None,
    ),
    "openrlhf": (linear_head("value_head", "RewardModel"), "value head", None),
    "openrlhf-score": (linear_head("score", "RewardModel"), "value head", None),
    "beaver": (
        linear_head(
            "score_head", "LlamaForScore", bias=True, score_dim=1, do_normalize=False,
            extra=("normalizer.mean", "normalizer.var", "normalizer.count"),
        ),
        "value head",
        None,
    ),
    "eurus": (
        linear_head(
            "regression_head", "EurusRewardModel",
            auto_map={"AutoModel": "modeling_eurus_rm.EurusRewardModel"},
        ),
        "value head",
        None,
    ),
    "inf-orm": (
        two_layers("score", "llama", "INFORMForSequenceClassification"), "two-layer head", None
    ),
    "qwen2.5-math-rm": (
        two_layers("score", "qwen2", "Qwen2ForRewardModel"), "two-layer head", None
    ),
    "grm": (two_layers("v_head.summary", "llama", "GRewardModel", 16), "two-layer head", None),
    "urm": (uncertain, "attributes with weights (URM)", None),
    "armorm": (
        gated("llama", "LlamaForRewardModelWithGating"),
        "objectives with a gate (ArmoRM, QRM)",
        None,
    ),
    "qrm": (
        gated("llama", "LlamaForRewardModelWithGating31", quantiles=3),
        "objectives with a gate (ArmoRM, QRM)",
        None,
    ),
    "qrm-gemma": (
        gated("gemma2", "Gemma2ForRewardModelWithGating31", quantiles=3),
        "objectives with a gate (ArmoRM, QRM)",
        None,
    ),
    "token-classifier": (token_classifier, "token classifier", RewardHead(label="good")),
    "nemotron": (
        language_model(lambda logits: logits[0]),
        "token of a language model",
        RewardHead(token=0),
    ),
    "yes-no": (
        language_model(lambda logits: logits[YES] - logits[NO], "gemma2"),
        "token of a language model",
        f"tokens=[{YES}, {NO}]",
    ),
    "yes": (
        language_model(lambda logits: torch.logit(logits.softmax(0)[YES].double())),
        "token of a language model",
        RewardHead(token=YES, activation="log_odds"),
    ),
}  # fmt: skip


def load(folder: Path, head: Any = None, **options: Any) -> Scorer:
    return load_scorer(folder, lm_tokenizer=LM, head=head, num_pages=400, page_size=4, **options)


def chat_of(name: str) -> str:
    return "gemma" if "gemma" in name or name == "yes-no" else "llama3"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tokenizer", ["shared", "other"])
def test_rewards(tmp_path: Path, name: str, tokenizer: str) -> None:
    build, _, head = MODELS[name]
    own = bpe_tokenizer(400 if tokenizer == "shared" else 340, chat=chat_of(name))
    reference = build(tmp_path, own)
    # AutoTokenizer makes a Qwen2 tokenizer of any beside a Qwen2 model, with its own rules.
    scorer = load(tmp_path, head, reward_tokenizer=own)
    assert isinstance(scorer, CausalScorer)
    walk = Walk(scorer, LM, seed=len(name))
    walk.start(0, text_prompt(LM, QUESTIONS[0]))
    walk.start(1, chat_prompt(LM, QUESTIONS[1]))
    walk.start(2, text_prompt(LM, QUESTIONS[0]))
    walk.run(rounds=12, limit=12)
    reading = (response_ids if tokenizer == "shared" else whole_text)(own, None)
    walk.check(
        lambda item: reference(reading(item.prompt, item.job.response_ids, item.job.response_text))
    )
    assert len({round(item.reward, 3) for item in walk.rounds}) > len(walk.rounds) // 3
    for request in walk.prompts:
        scorer.finish(request)
    assert scorer.stats()["rm_pages_used"] == 0


def test_nothing_is_said_of_weights_that_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    MODELS["trl"][0](tmp_path, bpe_tokenizer(400, chat="llama3"))
    load(tmp_path)
    assert not caplog.records


def test_every_kind_is_tried() -> None:
    assert {kind for _, kind, _ in MODELS.values()} | {"sequence classifier"} == {
        kind.name for kind in KINDS
    }


@pytest.mark.parametrize("name", ["armorm", "qrm"])
def test_a_gate_survives_a_short_pool(tmp_path: Path, name: str) -> None:
    """What the gate reads is kept when its pages are given up for another request's."""
    tokenizer = bpe_tokenizer(400, chat="llama3")
    reference = MODELS[name][0](tmp_path, tokenizer)
    scorer = load_scorer(tmp_path, lm_tokenizer=LM, num_pages=30, page_size=4)
    walk = Walk(scorer, LM, seed=3)
    for request, question in enumerate(QUESTIONS * 2):
        walk.start(request, chat_prompt(LM, question), budget=30)
    walk.run(rounds=10, limit=12)
    reading = response_ids(tokenizer, None)
    walk.check(lambda item: reference(reading(item.prompt, item.job.response_ids, "")))
    assert scorer.stats()["rm_evictions"] > 0


def test_a_gate_reads_a_prompt_that_runs_in_pieces(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer(400, chat="llama3")
    reference = MODELS["armorm"][0](tmp_path, tokenizer)
    loaded = load(tmp_path)
    assert isinstance(loaded, CausalScorer)
    scorer = CausalScorer(
        loaded.model, loaded._reading, loaded._source, num_pages=400, page_size=4,
        max_batch_tokens=8,
    )  # fmt: skip
    walk = Walk(scorer, LM, seed=4)
    walk.start(0, text_prompt(LM, QUESTIONS[0]))
    walk.run(rounds=6)
    reading = response_ids(tokenizer, None)
    walk.check(lambda item: reference(reading(item.prompt, item.job.response_ids, "")))


def test_a_gate_needs_the_chat_template(tmp_path: Path) -> None:
    MODELS["armorm"][0](tmp_path, bpe_tokenizer(400, chat="llama3"))
    scorer = load(tmp_path, template="plain")
    with pytest.raises(ValueError, match="gate.*reward_template='chat'"):
        scorer.start(0, text_prompt(LM, QUESTIONS[0]), 10)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("armorm", RewardHead(label=2)),
        ("qrm", RewardHead(label_weights={0: 1.0, 4: -0.5})),
        ("urm", RewardHead(label=1)),
    ],
)
def test_objectives_without_the_gate(tmp_path: Path, name: str, head: RewardHead) -> None:
    tokenizer = bpe_tokenizer(400, chat="llama3")
    MODELS[name][0](tmp_path, tokenizer)
    scorer = load(tmp_path, head, template="plain")
    prompt = text_prompt(LM, QUESTIONS[0])
    scorer.start(0, prompt, 10)
    (reward,) = scorer.score([ScoreJob(0, 0, [50, 51], "")])
    base = base_model("llama", tokenizer)
    with torch.no_grad():
        hidden = base(input_ids=torch.tensor([[*prompt.token_ids, 50, 51]]))[0][0, -1]
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "model.safetensors")
    if name == "urm":
        means = (weights["score.weight"] @ hidden)[::2]
        assert reward == pytest.approx(float(means[1]), abs=1e-4)
        return
    found = (weights["regression_layer.weight"] @ hidden).view(OBJECTIVES, -1).mean(1)
    want = found[2] if name == "armorm" else found[0] - 0.5 * found[4]
    assert reward == pytest.approx(float(want), abs=1e-4)


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_what_is_refused(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer(400, chat="llama3")
    base = base_model("llama", tokenizer)

    def refused(match: str, error: type[Exception], head: Any = None) -> None:
        with pytest.raises(error, match=match):
            load(tmp_path, head)

    # InternLM2's reward model: transformers has no such backbone.
    head = {"v_head.weight": torch.zeros(1, SIZE)}
    code = {"auto_map": {"AutoModel": "modeling_internlm2.InternLM2ForRewardModel"}}
    save(tmp_path, base, tokenizer, head, "InternLM2ForRewardModel", **code)
    edit_config(tmp_path, model_type="internlm2")
    refused(
        "InternLM2ForRewardModel, of model type 'internlm2'.*RemoteReward", UnsupportedModelError
    )

    # A backbone that is not all there, and weights that nothing reads.
    weights = {**head, "model.extra.weight": torch.zeros(1)}
    save(tmp_path, base, tokenizer, weights, "RewardModel")
    refused(r"nothing here reads \((model\.)?extra\.weight\)", ModelLoadError)
    edit_config(tmp_path, num_hidden_layers=3)
    refused(r"no weights for layers\.2", ModelLoadError)

    # Somebody's own code that looks like a value head may be more than that.
    save(tmp_path, base, tokenizer, head, "BidirectionalReward", **code)
    refused("BidirectionalReward, which needs its own remote code", UnsupportedModelError)

    # Two layers, and what is between them is not known.
    layers = nn.Sequential(nn.Linear(SIZE, 8), nn.Tanh(), nn.Linear(8, 1))
    save(tmp_path, base, tokenizer, named("score", layers), "SomeReward", **code)
    refused("SomeReward, which needs its own remote code", UnsupportedModelError)

    save(tmp_path, base, tokenizer, head, "LlamaForScore", do_normalize=True)
    refused("do_normalize", UnsupportedModelError)


def test_tokens_that_are_not_one(tmp_path: Path) -> None:
    MODELS["nemotron"][0](tmp_path, bpe_tokenizer(400, chat="llama3"))
    for head, match in (
        (None, "is a language model"),
        (RewardHead(label=0), "is a language model"),
        (RewardHead(token="Yes, indeed"), r"is \d+ tokens of the reward model"),
        (RewardHead(token=401), re.escape("must lie in [0, 401), got 401")),
        (RewardHead(tokens=(5, 5)), "must differ"),
    ):
        with pytest.raises((ValueError, UnsupportedModelError), match=match):
            load(tmp_path, head)
