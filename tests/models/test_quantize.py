"""Models with 8-bit weights: what they compute, what stays in memory, what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_architectures import tiny_lm
from helpers.tiny_lm import small_model
from helpers.tiny_rewards import reward_model
from helpers.tiny_tokenizers import bpe_tokenizer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stars_fast import Engine, StarsParams, demo
from stars_fast.models.load import load_causal_lm
from stars_fast.models.parameters import embedding_rows, multiplied_parameters
from stars_fast.models.quantize import Int8Embedding, Int8Linear, quantize_model
from stars_fast.ops.int8 import Int8Layer, weight_rows
from stars_fast.rewards import load_scorer

GREEDY = StarsParams(method="vanilla", max_tokens=12, temperature=0, ignore_eos=True)
PROMPTS = ["The film was", "A terrible kettle", "It is late, and the"]


def rounded(model: PreTrainedModel, quantized: PreTrainedModel) -> PreTrainedModel:
    """The model in float32 with the weights that another has in bytes."""
    model = copy.deepcopy(model).float()
    whole = dict(model.named_modules())
    for name, module in quantized.named_modules():
        if isinstance(module, Int8Linear | Int8Embedding):
            target: Any = whole[name]
            width = module.in_features if isinstance(module, Int8Linear) else module.embedding_dim
            layer = Int8Layer(module.weight, module.scale)
            rows = weight_rows(layer, torch.arange(len(module.scale)), width)
            target.weight.data = rows.T if isinstance(target, Conv1D) else rows
    return model


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gemma3", {"tie_word_embeddings": True}),  # multiplies its embedding
        ("gpt2", {}),  # transposed weights
        ("opt", {}),  # embeddings narrower than hidden states
        ("qwen2", {}),  # biases
    ],
    ids=str,
)
@torch.inference_mode()
def test_computes_what_the_rounded_weights_do(family: str, changes: dict[str, Any]) -> None:
    model = tiny_lm(family, **changes).to(torch.bfloat16)
    quantized = copy.deepcopy(model)
    quantize_model(quantized)
    assert not any(type(m) in (nn.Linear, Conv1D) for m in quantized.modules())
    assert isinstance(quantized.get_input_embeddings(), Int8Embedding)
    assert quantized.dtype == torch.float32
    assert embedding_rows(quantized) == embedding_rows(model)
    ids = torch.arange(3, 23).view(2, 10)
    want = rounded(model, quantized)(ids).logits
    torch.testing.assert_close(quantized(ids).logits, want, rtol=5e-3, atol=5e-3)


def test_a_tied_head_and_embedding_share_their_bytes() -> None:
    model = tiny_lm("llama", tie_word_embeddings=True)
    before = multiplied_parameters(model)
    quantize_model(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert multiplied_parameters(model) == before


@pytest.fixture(scope="module")
def quantized() -> Engine:
    return Engine.demo(quantize="int8", num_pages=100, page_size=8)


def bytes_of(model: PreTrainedModel) -> int:
    return sum(x.untyped_storage().nbytes() for x in (*model.parameters(), *model.buffers()))


def test_the_original_weights_are_gone(quantized: Engine) -> None:
    plain, _ = load_causal_lm(demo.model_dir(), dtype="float32")
    assert bytes_of(quantized._lm.model) < 0.35 * bytes_of(plain)


def test_layers_are_fused_and_tokens_do_not_depend_on_the_batch(quantized: Engine) -> None:
    fused = quantized._lm._fused
    assert fused is not None
    assert fused.whole
    together = quantized.generate(PROMPTS, GREEDY, use_tqdm=False)
    alone = [quantized.generate([prompt], GREEDY, use_tqdm=False)[0] for prompt in PROMPTS]
    tokens = [[output.outputs[0].token_ids for output in some] for some in (together, alone)]
    assert tokens[0] == tokens[1]


def test_rewards_are_close(quantized: Engine, tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer()
    model = reward_model("llama", tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options: dict[str, Any] = {"tokenizer": tokenizer, "num_pages": 100, "reward_template": "plain"}
    stars = StarsParams(segment_length=4, max_tokens=8, max_attempts=1, beta=1.0, target_reward=0.0)
    base = tmp_path / "lm"
    small_model().save_pretrained(base)
    rewards = {}
    for quantize in ("none", "int8"):
        engine = Engine(str(base), str(tmp_path), reward_quantize=quantize, **options)
        output = engine.generate(PROMPTS, stars, use_tqdm=False)
        rewards[quantize] = [o.outputs[0].reward for o in output]
    differences = [abs(a - b) for a, b in zip(rewards["none"], rewards["int8"], strict=True)]
    assert 0 < max(differences) < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int4"}, "quantize must be one of none, int8, got 'int4'"),
        ({"reward_quantize": "fp8"}, "reward_quantize must be one of none, int8, got 'fp8'"),
        ({"dtype": "bfloat16"}, "dtype must be 'auto' or 'float32' with quantize='int8', got 'b"),
        ({"compile_model": True}, "compile_model must be off with quantize='int8', got True"),
        ({"device": "meta"}, "quantize must be 'none' for a model on meta, got 'int8'"),
    ],
    ids=str,
)
def test_what_does_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine("no/such/model", **{"quantize": "int8", **options})


def test_a_loaded_model_stays_as_it_is() -> None:
    with pytest.raises(ValueError, match="quantize must be 'none' with a loaded model, got 'int8'"):
        Engine(small_model(), quantize="int8")
    tokenizer = bpe_tokenizer()
    model = reward_model("llama", tokenizer)
    load_scorer(
        model, lm_tokenizer=tokenizer, reward_tokenizer=tokenizer, num_pages=20, quantize="int8"
    )
    assert not any(isinstance(module, Int8Linear) for module in model.modules())
