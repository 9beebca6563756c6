"""Architectures that cannot run on paged attention are refused by name and reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from helpers.tiny_architectures import CONFIGS, MAX_LENGTH, tiny_lm
from transformers import AutoModelForCausalLM, PreTrainedModel

from stars_fast.errors import ModelLoadError, UnsupportedModelError
from stars_fast.models import selfcheck
from stars_fast.models.checks import max_length
from stars_fast.models.pool import page_bytes
from stars_fast.models.probe import attention_layout
from stars_fast.models.selfcheck import check_numbers

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _bloom() -> PreTrainedModel:
    config = transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4)
    return AutoModelForCausalLM.from_config(config)


def _falcon() -> PreTrainedModel:
    config = transformers.FalconConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    )
    return AutoModelForCausalLM.from_config(config)


def _falcon_rotary() -> PreTrainedModel:
    config = transformers.FalconConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False
    )
    return AutoModelForCausalLM.from_config(config)


def _mamba() -> PreTrainedModel:
    config = transformers.MambaConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, pad_token_id=0
    )
    return AutoModelForCausalLM.from_config(config)


def _t5() -> PreTrainedModel:
    config = transformers.T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    )
    return transformers.T5ForConditionalGeneration(config)


def _qwen3_next() -> PreTrainedModel:
    config = transformers.Qwen3NextConfig(
        **SMALL,
        layer_types=["linear_attention", "full_attention"],
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    return AutoModelForCausalLM.from_config(config)


def _llama4() -> PreTrainedModel:
    config = transformers.Llama4TextConfig(**SMALL, num_local_experts=2, attention_chunk_size=8)
    return transformers.Llama4ForCausalLM(config)


def _dynamic_rope() -> PreTrainedModel:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    return AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL, rope_parameters=rope))


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "BloomForCausalLM": (_bloom, "ALiBi"),
    "FalconForCausalLM": (_falcon, "ALiBi"),
    "MambaForCausalLM": (_mamba, "recurrent state"),
    "T5ForConditionalGeneration": (_t5, "encoder-decoder"),
    "Qwen3NextForCausalLM": (_qwen3_next, "recurrent state"),
    "Llama4ForCausalLM": (_llama4, "layers of type chunked_attention"),
    "LlamaForCausalLM": (_dynamic_rope, "rope_type 'dynamic'"),
}


@pytest.mark.filterwarnings("ignore")  # of transformers, about kernels that are not installed
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_reason(name: str) -> None:
    make, reason = REFUSED[name]
    model = make().eval()
    for check in (check_numbers, lambda m: page_bytes(m, 16)):
        with pytest.raises(UnsupportedModelError, match=rf"(?s){name} \(model type .*{reason}"):
            check(model)


def test_attention_outside_the_interface_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="AttentionInterface"):
        check_numbers(_falcon_rotary().eval())


def test_not_a_transformers_model() -> None:
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        check_numbers(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


class _ChunkedLlama(transformers.LlamaForCausalLM):
    """A mask that its configuration does not mention."""


def test_a_mask_that_is_no_window_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.masking_utils import create_chunked_causal_mask
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "create_causal_mask", create_chunked_causal_mask)
    config = transformers.LlamaConfig(**SMALL, attention_chunk_size=8)
    with pytest.raises(UnsupportedModelError, match="local pattern of 8 tokens"):
        attention_layout(_ChunkedLlama(config).eval())


def test_a_window_that_the_call_does_not_name_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.masking_utils import create_sliding_window_causal_mask
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "create_causal_mask", create_sliding_window_causal_mask)
    config = transformers.LlamaConfig(**SMALL, sliding_window=5)
    layout = attention_layout(AutoModelForCausalLM.from_config(config).eval())
    assert [layer.window for layer in layout] == [5, 5]


def test_a_mask_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **_: torch.zeros(1, 1, 2, 2))
    with pytest.raises(UnsupportedModelError, match="builds its attention mask itself"):
        attention_layout(tiny_lm("llama"))


def test_an_unknown_argument_of_the_attention_call_is_refused() -> None:
    model = tiny_lm("llama")
    attention = model.model.layers[1].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: forward(*args, position_bias=1.0, **kwargs)
    with pytest.raises(UnsupportedModelError, match="its attention needs position_bias"):
        attention_layout(model)


def test_a_model_that_computes_something_else_is_refused() -> None:
    """A layer that looks at its neighbours in the batch passes every check but the numeric one."""
    model = tiny_lm("llama")
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) + x.cumsum(dim=1)
    with pytest.raises(UnsupportedModelError, match="differ from its own eager attention by"):
        check_numbers(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_supported_architectures_pass(name: str, dtype: torch.dtype) -> None:
    model = tiny_lm(name, dtype=dtype)
    state = torch.random.get_rng_state()
    before = model.config._attn_implementation
    check_numbers(model)
    assert model.config._attn_implementation == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_classifiers_pass() -> None:
    config = transformers.Qwen2Config(**SMALL, num_labels=1)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    check_numbers(model)


def test_layouts() -> None:
    windows = [layer.window for layer in attention_layout(tiny_lm("gemma2"))]
    assert windows == [7, 0, 7]
    layout = attention_layout(tiny_lm("deepseek_v3"))[0]
    assert (layout.kv_heads, layout.key_dim, layout.value_dim) == (4, 12, 6)
    assert attention_layout(tiny_lm("starcoder2"))[0].kv_heads == 1


def test_max_length() -> None:
    assert max_length(tiny_lm("gpt2")) == MAX_LENGTH
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 32,
    }
    config = transformers.Phi3Config(
        **{**SMALL, "max_position_embeddings": 128},
        original_max_position_embeddings=32,
        rope_parameters=rope,
    )
    assert max_length(AutoModelForCausalLM.from_config(config)) == 32
    assert max_length(_bloom()) is None


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lm_head.weight", torch.nan, "weights contain NaN: lm_head.weight row 7$"),
        ("model.norm.weight", torch.inf, "weights contain infinity: model.norm.weight at 7$"),
        ("model.layers.2.mlp.up_proj.weight", torch.nan, "NaN: model.layers.2.mlp.up_proj.weight"),
    ],
)
def test_weights_that_are_no_numbers_are_named(name: str, value: float, words: str) -> None:
    model = tiny_lm("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.get_parameter(name)[7] = value
    with pytest.raises(ModelLoadError, match=words):
        check_numbers(model)


@pytest.mark.parametrize(
    ("name", "changes", "run"),
    [
        ("llama", {}, 2),
        ("qwen2", {"layer_types": ["full_attention"] + ["sliding_attention"] * 7}, 2),
        ("gemma3", {"layer_types": ["sliding_attention"] * 5 + ["full_attention"] * 3}, 6),
        (
            "smollm3",
            {"no_rope_layers": [1, 1, 1, 0] * 2, "layer_types": ["full_attention"] * 8},
            4,
        ),
        ("deepseek_v3", {"first_k_dense_replace": 2}, 3),
        ("gpt2", {}, 8),  # scales its scores by the number of the layer
    ],
)
def test_the_first_layers_of_each_kind_are_compared(
    name: str, changes: dict[str, Any], run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selfcheck, "_PASSED", set())
    compared: list[int] = []
    monkeypatch.setattr(
        selfcheck, "_difference", lambda m, *_: _noted(compared, len(attention_layout(m)))
    )
    model = tiny_lm(name, num_hidden_layers=8, **changes)
    check_numbers(model)
    assert compared == [run]
    assert len(attention_layout(model)) == 8


def _noted(where: list[int], number: int) -> str:
    where.append(number)
    return ""


def test_what_has_passed_is_not_compared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "_PASSED", set())
    compared: list[int] = []
    monkeypatch.setattr(selfcheck, "_difference", lambda *_: _noted(compared, 1))
    for changes in ({}, {}, {"rms_norm_eps": 1e-3}):
        check_numbers(tiny_lm("llama", **changes))
    assert len(compared) == 2
