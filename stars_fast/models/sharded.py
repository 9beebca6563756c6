"""What transformers' tensor-parallel plans ask of a model that is split over several ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

__all__ = ["loading_options", "local", "num_shards", "why_not_sharded"]

#: Projections whose output is attention heads, by name; a rank gets whole ones.
_HEADS = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "qkv_proj", "query_key_value")


def loading_options(size: int) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that load one rank's share of a model."""
    if size == 1:
        return {}
    return {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=size)}


def num_shards(model: PreTrainedModel) -> int:
    """Return the number of ranks that hold a loaded model together, 1 if it is whole."""
    return model.tp_size or 1


def local(weight: Tensor) -> Tensor:
    """Return this rank's part of a weight, all of it where it is whole."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def why_not_sharded(config: PreTrainedConfig, size: int) -> str:
    """Return why a model cannot be split over so many ranks, as far as it shows; empty if it can.

    Parameters
    ----------
    config
        Its configuration.
    size
        Number of ranks.
    """
    text = config.get_text_config(decoder=True)
    plan: dict[str, str] = getattr(text, "base_model_tp_plan", None) or {}
    if not plan:
        return f"transformers has no tensor-parallel plan for model type {config.model_type!r}"
    splits_heads = any(
        name.rsplit(".", 1)[-1] in _HEADS and style == "colwise" for name, style in plan.items()
    )
    if not splits_heads:
        return ""
    heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    for name, count in (("num_attention_heads", heads), ("num_key_value_heads", kv_heads)):
        if count % size:
            return (
                f"{name} must be divisible by the number of ranks, got {count} heads on {size} "
                "ranks: run as many as divide it"
            )
    return ""
