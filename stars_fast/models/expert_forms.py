"""Forms of a mixture of experts' parts, as `models.fusion` looks for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from stars_fast.ops.experts import Experts, GateActivation, choose_experts, run_experts

__all__ = ["experts_forms", "router_forms"]

_MOST_EXPERTS = 1024  # a program of a kernel looks at all of them
_MOST_PAIRS = 8192  # of a token and an expert: each is compared with all others


def router_forms(module: nn.Module) -> Iterator[Callable[..., Any]]:
    """Logits, and a softmax of them over all experts or over those that are chosen."""
    weight, count = getattr(module, "weight", None), getattr(module, "top_k", None)
    names = {name for name, _ in itertools.chain(module.named_parameters(), module.named_buffers())}
    if not isinstance(weight, Tensor) or weight.ndim != 2 or type(count) is not int:
        return
    if names - {"weight", "bias"} or not 1 <= count <= len(weight) <= _MOST_EXPERTS:
        return
    bias = getattr(module, "bias", None)
    for share in (True, False):
        yield _router_form(weight, bias, count, share=share)


def _router_form(
    weight: Tensor, bias: Tensor | None, count: int, *, share: bool
) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden_states.reshape(-1, weight.shape[1]), weight, bias)
        return logits, *choose_experts(logits, count, share=share)

    return forward


def experts_forms(module: nn.Module) -> Iterator[Callable[..., Tensor]]:
    """All experts' weights in two tensors, in each layout and with each activation."""
    names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    up, down, up_bias, down_bias = (getattr(module, name, None) for name in names)
    if {name for name, _ in module.named_parameters()} - set(names):
        return
    if not isinstance(up, Tensor) or not isinstance(down, Tensor) or up.ndim != 3 != down.ndim:
        return
    limit, alpha = getattr(module, "limit", None), getattr(module, "alpha", None)
    activations: list[GateActivation] = ["silu", "gelu_tanh"]
    if isinstance(limit, float) and isinstance(alpha, float):
        activations.insert(0, "clamped")
    own = type(module).forward.__get__(module)
    for transposed, interleaved, activation in itertools.product(
        (False, True), (False, True), activations
    ):
        hidden, inner = (down.shape[2], down.shape[1]) if transposed else down.shape[1:]
        wanted = (len(down), hidden, 2 * inner) if transposed else (len(down), 2 * inner, hidden)
        if up.shape == wanted and len(down) <= _MOST_EXPERTS:
            experts = Experts(
                up, down, up_bias, down_bias, activation, transposed, interleaved,
                limit or 0.0, alpha or 0.0,
            )  # fmt: skip
            yield _experts_form(experts, own)


def _experts_form(experts: Experts, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    tensors = experts.gate_up, experts.down, experts.gate_up_bias, experts.down_bias
    fits = all(tensor is None or tensor.is_contiguous() for tensor in tensors)

    def forward(hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        # Long passes, of prompts, are for products that are made for them.
        if not fits or index.numel() > _MOST_PAIRS:
            return own(hidden_states, index, weights)
        return run_experts(hidden_states, index, weights, experts)

    return forward
