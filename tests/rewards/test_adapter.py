"""LoRA adapters' directories as reward models, in peft's files, against the merged formula."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.reward_walk import QUESTIONS, Round, Walk, text_prompt
from helpers.tiny_rewards import reward_model
from helpers.tiny_tokenizers import bpe_tokenizer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from stars_fast import Engine, LogRatio, RewardHead, StarsParams
from stars_fast.errors import ModelLoadError, UnsupportedModelError
from stars_fast.models.files import check_model_directory
from stars_fast.models.load import load_causal_lm
from stars_fast.rewards import ScoreJob, Scorer, load_scorer
from stars_fast.rewards.log_ratio import LogRatioScorer

LM = bpe_tokenizer(400)
RANK, ALPHA = 4, 8
PATHS = {"llama": "model.layers.{}.self_attn.q_proj", "gpt2": "transformer.h.{}.attn.c_attn"}


def load(folder: Path, head: Any = None) -> Scorer:
    return load_scorer(folder, lm_tokenizer=LM, head=head, num_pages=200, page_size=4)


def write(folder: Path, base: Path, weights: dict[str, Tensor], **fields: Any) -> None:
    """The files that peft writes."""
    folder.mkdir(exist_ok=True)
    config = {
        "peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": str(base),
        "bias": "none", "lora_alpha": ALPHA, "r": RANK, "use_dora": False, "alpha_pattern": {},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    named = {f"base_model.model.{name}": value.contiguous() for name, value in weights.items()}
    save_file(named, folder / "adapter_model.safetensors")


def adapted(model: PreTrainedModel, family: str, scale: float) -> dict[str, Tensor]:
    """A pair for each layer; `model` is changed as the pairs say."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for layer in range(2):
        path = PATHS[family].format(layer)
        target = model.get_parameter(f"{path}.weight")
        size, out = target.shape if family == "gpt2" else target.shape[::-1]
        down = 0.3 * torch.randn((RANK, size), generator=generator)
        up = 0.3 * torch.randn((out, RANK), generator=generator)
        weights[f"{path}.lora_A.weight"], weights[f"{path}.lora_B.weight"] = down, up
        change = scale * up @ down
        with torch.no_grad():
            target += change.T if family == "gpt2" else change
    return weights


def check(scorer: Scorer, want: Any) -> None:
    walk = Walk(scorer, LM)
    walk.start(0, text_prompt(LM, QUESTIONS[0]))
    walk.start(1, text_prompt(LM, QUESTIONS[1]))
    walk.run(rounds=6)

    @torch.no_grad()
    def expected(item: Round) -> float:
        return float(want(torch.tensor([[*item.prompt.token_ids, *item.job.response_ids]])))

    walk.check(expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("stabilised", [False, True])
def test_a_classifier_on_a_language_model(tmp_path: Path, family: str, stabilised: bool) -> None:
    """The base has no head: it is the adapter's."""
    model = reward_model(family, LM)
    lm = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager")
    lm.base_model.load_state_dict(model.base_model.state_dict())
    lm.save_pretrained(tmp_path / "base")
    LM.save_pretrained(tmp_path / "base")
    weights = adapted(model, family, ALPHA / (math.sqrt(RANK) if stabilised else RANK))
    weights["score.weight"] = model.score.weight.detach()
    write(tmp_path / "adapter", tmp_path / "base", weights, use_rslora=stabilised)
    check(load(tmp_path / "adapter"), lambda ids: model(input_ids=ids).logits[0, 0])


def test_a_value_head_beside_an_adapter(tmp_path: Path) -> None:
    """LLaMA-Factory's."""
    config = reward_model("llama", LM).config
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    lm.save_pretrained(tmp_path / "base")
    weights = adapted(lm, "llama", ALPHA / RANK)
    write(tmp_path / "adapter", tmp_path / "base", weights, task_type="CAUSAL_LM")
    LM.save_pretrained(tmp_path / "adapter")
    head = {"v_head.summary.weight": torch.randn(1, 32), "v_head.summary.bias": torch.ones(1)}
    save_file(head, tmp_path / "adapter" / "value_head.safetensors")

    def value(ids: Tensor) -> Tensor:
        return lm.model(input_ids=ids)[0][0, -1] @ head["v_head.summary.weight"][0] + 1

    check(load(tmp_path / "adapter"), value)
    tokens = RewardHead(tokens=(50, 60))
    check(
        load(tmp_path / "adapter", tokens),
        lambda ids: lm(input_ids=ids).logits[0, -1, 50] - lm(input_ids=ids).logits[0, -1, 60],
    )


def tensors_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def beside_and_merged(tmp_path: Path, head: Any = None) -> tuple[Engine, Scorer]:
    """An engine whose language model is the adapter's base, and the merged adapter's scorer."""
    (tmp_path / "here").symlink_to(tmp_path / "base")  # the same directory by another name
    options = {"num_pages": 200, "page_size": 4}
    engine = Engine(tmp_path / "here", tmp_path / "adapter", reward_head=head, **options)
    return engine, load(tmp_path / "adapter", head)


def check_beside(engine: Engine, merged: Scorer) -> None:
    """One set of weights, the merged adapter's rewards, and a language model as it was."""
    lm, scorer = engine.loop.model.model, engine.loop.scorer
    assert scorer is not None
    assert scorer.module is not None
    assert {p.data_ptr() for p in scorer.module.parameters()} <= {
        p.data_ptr() for p in lm.parameters()
    }
    before, ids = tensors_of(lm), torch.tensor([[5, 6, 7, 8]])
    vanilla = StarsParams(method="vanilla", max_tokens=8, seed=1)
    drafts = engine.generate([[5, 6, 7]], vanilla)[0].outputs[0].token_ids
    bare = Engine(lm, tokenizer=LM, num_pages=60, page_size=4)
    assert drafts == bare.generate([[5, 6, 7]], vanilla)[0].outputs[0].token_ids
    with torch.no_grad():
        logits = lm(input_ids=ids).logits
    walk = Walk(scorer, LM)
    walk.start(0, text_prompt(LM, QUESTIONS[0]))
    walk.run(rounds=5)

    def expected(item: Round) -> float:
        handle = 1000 + walk.rounds.index(item)
        merged.start(handle, item.prompt, 60)
        (reward,) = merged.score([replace(item.job, request=handle)])
        assert isinstance(reward, float)
        return reward

    walk.check(expected)
    assert len({item.reward for item in walk.rounds}) > 3
    with torch.no_grad():
        assert torch.equal(lm(input_ids=ids).logits, logits)
    assert all(torch.equal(before[name], value) for name, value in lm.state_dict().items())
    assert drafts == engine.generate([[5, 6, 7]], vanilla)[0].outputs[0].token_ids


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_classifier_beside_the_language_model(tmp_path: Path, family: str) -> None:
    model = reward_model(family, LM)
    lm = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager").eval()
    lm.save_pretrained(tmp_path / "base")
    LM.save_pretrained(tmp_path / "base")
    weights = adapted(lm, family, ALPHA / RANK)
    weights["score.weight"] = model.score.weight.detach()
    write(tmp_path / "adapter", tmp_path / "base", weights)
    check_beside(*beside_and_merged(tmp_path))
    # Whole weights of the backbone cannot lie beside it: the base is loaded again.
    name = "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
    weights[name] = 2 * lm.get_input_embeddings().weight.detach()
    write(tmp_path / "adapter", tmp_path / "base", weights)
    again = Engine(tmp_path / "base", tmp_path / "adapter", num_pages=60, page_size=4)
    merged = load(tmp_path / "adapter")
    values = [engine_score(again), score_of(merged)]
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    assert again.loop.scorer is not None
    assert again.loop.scorer.module is not None
    assert again.loop.scorer.module.base_model is not again.loop.model.model.base_model


def engine_score(engine: Engine) -> float:
    (value,) = engine.score([QUESTIONS[0]], [" Rinse it"])
    return value


def score_of(scorer: Scorer) -> float:
    scorer.start(0, text_prompt(LM, QUESTIONS[0]), 20)
    ids = LM(" Rinse it", add_special_tokens=False)["input_ids"]
    (value,) = scorer.score([ScoreJob(0, 0, ids, " Rinse it")])
    assert isinstance(value, float)
    return value


def test_language_models_beside_themselves(tmp_path: Path) -> None:
    """The adapter of a value head, of a verdict, and of a policy whose reference is the base."""
    config = reward_model("llama", LM).config
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    lm.save_pretrained(tmp_path / "base")
    LM.save_pretrained(tmp_path / "base")
    weights = adapted(lm, "llama", ALPHA / RANK)
    folder = tmp_path / "adapter"
    write(folder, tmp_path / "base", weights, task_type="CAUSAL_LM")
    save_file({"v_head.summary.weight": torch.randn(1, 32)}, folder / "value_head.safetensors")
    check_beside(*beside_and_merged(tmp_path))
    verdict = RewardHead(tokens=(50, 60))
    engine = Engine(tmp_path / "base", folder, reward_head=verdict, num_pages=60, page_size=4)
    assert engine_score(engine) == pytest.approx(score_of(load(folder, verdict)), abs=1e-4)
    options = {"num_pages": 60, "page_size": 4}
    shared = Engine(tmp_path / "base", LogRatio(folder), **options)
    scorer = shared.loop.scorer
    assert isinstance(scorer, LogRatioScorer)
    assert scorer._policy.module is scorer._reference.module is shared.loop.model.model
    apart = Engine(tmp_path / "base", LogRatio(folder, tmp_path / "base"), **options)
    merged = Engine(
        lm, LogRatio(lm, tmp_path / "base"), tokenizer=LM, reward_tokenizer=LM, **options
    )
    values = [engine_score(engine) for engine in (shared, apart, merged)]
    assert values == pytest.approx([values[2]] * 3, abs=1e-4)
    assert abs(values[2]) > 0.1
    guided = Engine(tmp_path / "base", guide=folder, **options)
    assert guided.loop.model.beside[0].model is guided.loop.model.model  # type: ignore[union-attr]
    params = StarsParams(method="vanilla", max_tokens=12, seed=2, guide_weight=2.0, ignore_eos=True)
    drawn = [
        engine.generate([[5, 6, 7]], params, use_tqdm=False)[0].outputs[0]
        for engine in (guided, Engine(tmp_path / "base", guide=lm, **options))
    ]
    assert drawn[0].token_ids == drawn[1].token_ids
    assert drawn[0].logprobs == pytest.approx(drawn[1].logprobs, abs=1e-4)


def test_what_is_refused(tmp_path: Path) -> None:
    model = reward_model("llama", LM)
    base, folder = tmp_path / "base", tmp_path / "adapter"
    model.save_pretrained(base)
    LM.save_pretrained(base)
    weights = adapted(model, "llama", 1.0)
    path = PATHS["llama"].format(0)

    def refused(match: str, error: type[Exception], weights: Any = weights, **fields: Any) -> None:
        write(folder, fields.pop("base", base), weights, **fields)
        with pytest.raises(error, match=match):
            load(folder)

    refused("LOHA", UnsupportedModelError, peft_type="LOHA")
    refused("bias='all'", UnsupportedModelError, bias="all")
    refused("has use_dora set", UnsupportedModelError, use_dora=True)
    refused("task_type 'QUESTION_ANS'", UnsupportedModelError, task_type="QUESTION_ANS")
    refused("does not name its base", ModelLoadError, base_model_name_or_path=None)
    refused("no tokenizer|nowhere", ModelLoadError, base=tmp_path / "nowhere")
    one = {f"{path}.lora_A.weight": weights[f"{path}.lora_A.weight"]}
    refused("adapts model.layers.0", ModelLoadError, one)
    refused("magnitude", ModelLoadError, {f"{path}.lora_magnitude_vector": torch.ones(32)})
    wrong = {**one, f"{path}.lora_B.weight": torch.ones(8, RANK)}
    refused(r"by \(8, 32\), and its base", ModelLoadError, wrong)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"adapter_model\.safetensors cannot be read"):
        load(folder)


class Wrapped(nn.Module):
    """What peft's `PeftModel` is to us: a module around the model in which the adapter is."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.base_model = model

    def get_base_model(self) -> nn.Module:
        return self.base_model


class Lora(nn.Module):
    """A linear layer with an adapter that is not merged, as peft puts it in place."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.down = nn.Linear(layer.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, layer.out_features, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base_layer(hidden) + self.up(self.down(hidden))


def test_a_model_that_peft_wraps() -> None:
    model = reward_model("llama", LM)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Lora(layer.self_attn.q_proj)
    wrapped = load_scorer(
        Wrapped(model.eval()), lm_tokenizer=LM, reward_tokenizer=LM, num_pages=200, page_size=4
    )
    check(wrapped, lambda ids: model(input_ids=ids).logits[0, 0])


def test_a_language_model_that_peft_wraps() -> None:
    config = reward_model("llama", LM).config
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert load_causal_lm(Wrapped(lm))[0] is lm


def test_a_language_model_with_an_adapter(tmp_path: Path) -> None:
    config = reward_model("llama", LM).config
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    lm.save_pretrained(tmp_path / "base")
    LM.save_pretrained(tmp_path / "base")
    weights = adapted(lm, "llama", ALPHA / RANK)
    folder = tmp_path / "adapter"
    write(folder, tmp_path / "base", weights, task_type="CAUSAL_LM")
    check_model_directory(folder)
    model, tokenizer = load_causal_lm(folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, lm(input_ids=ids).logits)
    assert tokenizer is not None
    assert tokenizer.get_vocab() == LM.get_vocab()
    with pytest.raises(UnsupportedModelError, match="cannot be tensor-parallel: merge it"):
        load_causal_lm(folder, num_ranks=2)
    write(folder, tmp_path / "base", weights)
    with pytest.raises(UnsupportedModelError, match="task_type 'SEQ_CLS': no language model"):
        load_causal_lm(folder)
    write(folder, tmp_path / "nowhere", weights, task_type="CAUSAL_LM")
    with pytest.raises(ModelLoadError, match="nowhere' does not exist"):
        check_model_directory(folder)
    with pytest.raises(ModelLoadError, match=r"the base of adapter .*nowhere' does not exist"):
        load_causal_lm(folder)
