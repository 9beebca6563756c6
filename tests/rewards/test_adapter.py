"""LoRA adapters' directories as reward models, in peft's files, against the merged formula."""

from __future__ import annotations

import json
import math
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

from stars_fast import RewardHead
from stars_fast.errors import ModelLoadError, UnsupportedModelError
from stars_fast.models.files import check_model_directory
from stars_fast.models.load import load_causal_lm
from stars_fast.rewards import Scorer, load_scorer

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
