"""The attention function `stars_paged`, registered with transformers.

transformers calls it in place of its own attention if a configuration names it. No mask function is
registered under the name, so transformers builds no mask: the batch determines which token sees
which.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from stars_fast.ops.fused import Rotary

STARS_PAGED = "stars_paged"


class LayerAttention(Protocol):
    """One forward's attention, called once per layer in the order of the layers."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        softcap: float,
        sinks: Tensor | None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """Store the new keys and values and attend.

        Parameters
        ----------
        query : Tensor
            ``[T, heads, head_dim]``, one per packed token.
        key, value : Tensor
            ``[T, kv_heads, head_dim]``.
        scaling : float
            Factor on the scores.
        softcap : float
            Soft cap on the scores, 0 is off.
        sinks : Tensor or None
            ``[heads]``, attention sinks.
        rotary : Rotary or None
            How to turn query and key first; None: that is done already. Both may be overwritten.

        Returns
        -------
        Tensor
            ``[T, heads, head_dim of value]``.
        """


def stars_paged(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    stars_attention: LayerAttention,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers' ``AttentionInterface``.

    Tokens are packed: `query`, `key` and `value` are ``[1, heads, T, head_dim]``; the result is
    ``[1, T, heads, head_dim]``. `attention_mask` and what is left in `kwargs` (the window among
    them) are known from the probe of the model, see `stars_fast.models.probe`.
    """
    attend = stars_attention
    if torch.compiler.is_compiling():
        attend = functools.partial(_outside, stars_attention)
    out = attend(
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap or 0.0,
        sinks=s_aux,
    )
    return out.unsqueeze(0), None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _outside(attention: LayerAttention, *tensors: Tensor, **options: Any) -> Tensor:
    """Attend outside of what `torch.compile` makes: the pages and the layer count are state."""
    return attention(*tensors, **options)


def attention_configs(model: PreTrainedModel) -> list[Any]:
    """Every configuration object that a module of the model reads, each once."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found.setdefault(id(config), config)
    return list(found.values())


#: By id of a model's configuration, as long as it is there.
_LOCKS: dict[int, threading.RLock] = {}


@contextlib.contextmanager
def exclusive(configs: list[Any]) -> Iterator[None]:
    """Let one thread at a time use a model that has these configurations.

    A pass may change settings and layers of the model while it runs, so passes of engines that
    share one, each on a thread of its own, are made one after the other.

    Parameters
    ----------
    configs
        See `attention_configs`. A model and its backbone have some in common, in one order.
    """
    with contextlib.ExitStack() as locks:
        for config in configs:
            locks.enter_context(_lock_of(config))
        yield


@contextlib.contextmanager
def attention_implementation(configs: list[Any], name: str) -> Iterator[None]:
    """Set the attention implementation in a model's configurations, and restore what was set.

    The public setter would also reach into sub-configurations that no module of the model reads.
    """
    with exclusive(configs):
        before = [config._attn_implementation_internal for config in configs]
        try:
            for config in configs:
                config._attn_implementation_internal = name
            yield
        finally:
            for config, value in zip(configs, before, strict=True):
                config._attn_implementation_internal = value


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Have another function in the place of a module's `forward`."""
    # Past nn.Module.__setattr__, which is meant for parameters; a library may also have set one.
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


def _lock_of(config: Any) -> threading.RLock:  # noqa: ANN401
    """Return the one lock of a configuration."""
    made = threading.RLock()
    lock = _LOCKS.setdefault(id(config), made)
    if lock is made:
        weakref.finalize(config, _LOCKS.pop, id(config))
    return lock


AttentionInterface.register(STARS_PAGED, stars_paged)
