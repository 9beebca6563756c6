"""What each attention layer of a transformers model asks for, found by running two tokens.

The probe runs the backbone under an attention implementation of its own, whose mask function
returns a description of the mask in place of a tensor. So the windows come from the masks that the
model really builds, not from configuration fields that it may or may not obey.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from stars_fast.errors import UnsupportedModelError
from stars_fast.models.checks import unsupported
from stars_fast.models.interface import attention_configs, attention_implementation
from stars_fast.models.sharded import local

_PROBE = "stars_probe"

# Arguments of an attention call that change nothing in its result, or that the paged attention
# function obeys. An argument outside this list is refused rather than ignored.
_KNOWN_ARGUMENTS = frozenset(
    {
        "cache_position",
        "dropout",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "s_aux",
        "scaling",
        "sliding_window",
        "softcap",
        "use_cache",
    }
)


@dataclass(frozen=True)
class LayerLayout:
    """Shapes and window of one attention call, in the order of calls within a forward.

    Attributes
    ----------
    heads, kv_heads : int
        Query heads, and key and value heads.
    key_dim, value_dim : int
        Size of a key and of a value head.
    window : int
        Sliding window in tokens, a query's own position included; 0 is full attention.
    dtype : torch.dtype
        The dtype of keys and values.
    softcap : float
        Soft cap on the scores, 0 is off.
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int
    dtype: torch.dtype
    softcap: float = 0.0


@dataclass(frozen=True)
class _Mask:
    """Stands in for a mask tensor during the probe; `problem` says why it cannot be paged."""

    window: int
    problem: str = ""


def attention_layout(model: PreTrainedModel) -> list[LayerLayout]:
    """Shapes and windows of the attention calls of one forward of a model's backbone.

    Runs two tokens through the backbone, its linear layers left out: what is asked for does not
    depend on their results. Leaves the model as it was.

    Raises
    ------
    UnsupportedModelError
        If an attention call asks for what paged attention does not give; names the architecture
        and the reason.
    """
    calls: list[LayerLayout] = []
    ids = torch.zeros((1, 2), dtype=torch.int64, device=model.device)
    positions = torch.arange(2, device=model.device).unsqueeze(0)
    try:
        configs = attention_configs(model)
        with (
            torch.inference_mode(),
            attention_implementation(configs, _PROBE),
            _without_products(model),
        ):
            model.base_model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=positions,
                use_cache=False,
                stars_calls=calls,
            )
    except UnsupportedModelError as error:
        raise unsupported(model, str(error)) from None
    except Exception as error:
        raise unsupported(
            model, f"its forward does not run on a replaced attention function ({error!r})"
        ) from error
    if not calls:
        raise unsupported(model, "it makes no call through transformers' attention interface")
    return calls


@contextlib.contextmanager
def _without_products(model: nn.Module) -> Iterator[None]:
    """Have linear layers return zeros, so that their weights are not read."""
    linears = [
        module
        for module in model.modules()
        # Hooks of those that are split over ranks expect what their products return.
        if type(module) is nn.Linear
        and "forward" not in module.__dict__
        and local(module.weight) is module.weight
    ]
    try:
        for module in linears:
            module.__dict__["forward"] = functools.partial(_zeros, module.weight)
        yield
    finally:
        for module in linears:
            module.__dict__.pop("forward", None)


def _zeros(weight: Tensor, input: Tensor) -> Tensor:
    return input.new_zeros((*input.shape[:-1], weight.shape[0]), dtype=weight.dtype)


def _probe_mask(
    *, mask_function: Callable[..., Tensor], local_size: int | None = None, **kwargs: Any
) -> _Mask:
    """Describe the mask that `mask_function` stands for, by asking it about some queries."""
    window = local_size or 0
    reach = window or 64
    for query in (0, reach, 2 * reach + 3, 3 * reach + 1):
        keys = torch.arange(query + 2)
        zero = torch.zeros((), dtype=torch.int64)
        seen = mask_function(zero, zero, torch.tensor(query), keys).expand(query + 2)
        causal = keys <= query
        if not torch.equal(seen, causal & (keys > query - window) if window else causal):
            kind = f"a local pattern of {window} tokens" if window else "a pattern"
            return _Mask(window, f"its attention mask is {kind} that is not a sliding window")
    return _Mask(window)


def _probe_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    stars_calls: list[LayerLayout] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Record one attention call; the result has the right shape and no meaning."""
    if stars_calls is None:
        raise UnsupportedModelError("it does not pass keyword arguments on to its attention layers")
    unknown = sorted(k for k, v in kwargs.items() if v is not None and k not in _KNOWN_ARGUMENTS)
    if unknown:
        raise UnsupportedModelError(f"its attention needs {', '.join(unknown)}")
    if not isinstance(attention_mask, _Mask):
        raise UnsupportedModelError("it builds its attention mask itself")
    if attention_mask.problem:
        raise UnsupportedModelError(attention_mask.problem)
    if kwargs.get("is_causal") is False:
        raise UnsupportedModelError("its attention is bidirectional")
    if key.ndim != 4 or key.shape[2] != query.shape[2]:
        raise UnsupportedModelError("its layers share keys and values")
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads % kv_heads or value.shape[1] != kv_heads:
        raise UnsupportedModelError(
            f"its head counts do not group: {heads} query, {kv_heads} key, {value.shape[1]} value"
        )
    stars_calls.append(
        LayerLayout(
            heads=heads,
            kv_heads=kv_heads,
            key_dim=key.shape[-1],
            value_dim=value.shape[-1],
            window=attention_mask.window,
            dtype=value.dtype,
            softcap=kwargs.get("softcap") or 0.0,
        )
    )
    out = value.repeat_interleave(heads // kv_heads, dim=1)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_PROBE, _probe_attention)
AttentionMaskInterface.register(_PROBE, _probe_mask)
