"""Tiny random language models of many architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB_SIZE = 61
MAX_LENGTH = 96
WINDOW = 7  # shorter than the prefixes of the tests

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_LENGTH,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**_GROUPED),
    "mistral": lambda: transformers.MistralConfig(**_GROUPED, sliding_window=WINDOW),
    "qwen2": lambda: transformers.Qwen2Config(
        **_GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**_GROUPED, head_dim=12),
    "gemma2": lambda: transformers.Gemma2Config(
        **_GROUPED,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        layer_types=_MIXED,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_GROUPED, head_dim=8, sliding_window=WINDOW, layer_types=_MIXED
    ),
    "phi3": lambda: transformers.Phi3Config(**_GROUPED, sliding_window=WINDOW),
    "olmo2": lambda: transformers.Olmo2Config(**_GROUPED),
    "granite": lambda: transformers.GraniteConfig(
        **_GROUPED, attention_multiplier=0.2, logits_scaling=2.0, residual_multiplier=0.7
    ),
    "smollm3": lambda: transformers.SmolLM3Config(**_GROUPED, no_rope_layers=[1, 0, 1]),
    "glm4": lambda: transformers.Glm4Config(**_GROUPED, head_dim=8),
    "opt": lambda: transformers.OPTConfig(
        **{**_COMMON, "pad_token_id": 1}, ffn_dim=48, word_embed_proj_dim=24
    ),
    "gpt2": lambda: transformers.GPT2Config(
        **_COMMON, n_inner=48, scale_attn_by_inverse_layer_idx=True
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_COMMON),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_GROUPED,
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=_MIXED,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "cohere2": lambda: transformers.Cohere2Config(
        **_GROUPED, sliding_window=WINDOW, layer_types=_MIXED
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **_GROUPED, num_local_experts=4, num_experts_per_tok=2
    ),
    "starcoder2": lambda: transformers.Starcoder2Config(
        **_COMMON, num_key_value_heads=1, sliding_window=2 * WINDOW
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(  # keys wider than values
        **_COMMON,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=2,
    ),
}


def tiny_lm(
    name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A random model of an architecture of `CONFIGS`, with some fields changed, in eval mode.

    Weights are drawn large enough that attention is far from uniform, so that a wrong mask or
    position shows.
    """
    config = CONFIGS[name]()
    for field, value in changes.items():
        setattr(config, field, value)
    # For Gemma 2, transformers 5.17 would take an attention that leaves out its softcapping.
    chosen = {"attn_implementation": "eager"} if name == "gemma2" else {}
    model = AutoModelForCausalLM.from_config(config, **chosen)
    return randomize(model, seed=seed).to(dtype)


def randomize(model: PreTrainedModel, *, seed: int) -> PreTrainedModel:
    """Draw every parameter again, independently of the global random state."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(0.1 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model.eval()
