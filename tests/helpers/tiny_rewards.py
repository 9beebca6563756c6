"""Small reward models with random weights, one per family that people use."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
    RobertaConfig,
)

_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}

CAUSAL_CONFIGS: dict[str, Any] = {
    "llama": (LlamaConfig, _DECODER),
    "qwen2": (Qwen2Config, _DECODER),
    "mistral": (MistralConfig, {**_DECODER, "sliding_window": 12}),
    "gemma2": (Gemma2Config, {**_DECODER, "head_dim": 8, "sliding_window": 12}),
    "gpt_neox": (
        GPTNeoXConfig,
        {k: v for k, v in _DECODER.items() if k != "num_key_value_heads"},
    ),
    "opt": (
        OPTConfig,
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 16,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
        },
    ),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
}
ENCODER_CONFIGS: dict[str, Any] = {
    "bert": (BertConfig, _ENCODER),
    "roberta": (RobertaConfig, _ENCODER),
    "deberta_v2": (
        DebertaV2Config,
        {
            **_ENCODER,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_buckets": 16,
            "pooler_hidden_size": 32,
        },
    ),
}


def reward_model(
    family: str, tokenizer: Any, *, num_labels: int = 1, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A classifier of one family over the tokenizer's vocabulary, its rewards of order one."""
    config_class, fields = {**CAUSAL_CONFIGS, **ENCODER_CONFIGS}[family]
    special = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = config_class(**{**fields, **special, "num_labels": num_labels, **changes})
    # Large enough that attention matters: with transformers' 0.02 a tiny model hardly mixes tokens.
    config.initializer_range = config.init_std = 0.3
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # Eager: some versions of transformers leave Gemma 2's soft cap out under sdpa.
        attention = {"attn_implementation": "eager"} if family in CAUSAL_CONFIGS else {}
        model = AutoModelForSequenceClassification.from_config(config, **attention)
    return model.eval()


@torch.no_grad()
def plain_reward(model: PreTrainedModel, ids: list[int], **inputs: Any) -> float:
    """The reward by transformers' own forward pass on one unpadded sequence."""
    extra = {name: torch.tensor([value]) for name, value in inputs.items()}
    return float(model(input_ids=torch.tensor([ids]), **extra).logits[0, 0])
