"""Mixtures of experts: which experts a token goes to, and their feed-forward layers.

On a GPU they run as Triton kernels; the code here is the oracle, and what runs elsewhere.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from stars_fast.ops.fused import on_kernels

GateActivation: TypeAlias = Literal["silu", "gelu_tanh", "clamped"]


class Experts(NamedTuple):
    """Feed-forward layers, one for each expert: down(act(gate(x)) * up(x)).

    Attributes
    ----------
    gate_up : Tensor
        ``[E, 2 I, H]``, or ``[E, H, 2 I]`` if `transposed`.
    down : Tensor
        ``[E, H, I]``, or ``[E, I, H]``.
    gate_up_bias, down_bias : Tensor or None
        ``[E, 2 I]`` and ``[E, H]``.
    activation : str
        ``"silu"``, ``"gelu_tanh"``, or ``"clamped"``: with g and u clamped by `limit`, g from above
        only, g sigmoid(`alpha` g) (u + 1) (GPT-OSS).
    transposed : bool
    interleaved : bool
        Whether gates are the even ones of the 2 I, or the first I.
    limit, alpha : float
        Of ``"clamped"``.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: GateActivation = "silu"
    transposed: bool = False
    interleaved: bool = False
    limit: float = 0.0
    alpha: float = 0.0

    @property
    def inner(self) -> int:
        """I."""
        return self.down.shape[1 if self.transposed else 2]


def choose_experts(logits: Tensor, count: int, *, share: bool) -> tuple[Tensor, Tensor]:
    """Return the experts of the largest logits and their weights.

    Parameters
    ----------
    logits : Tensor
        ``[T, E]``.
    count : int
        Experts of a token, at most E.
    share : bool
        Whether the weights are a softmax over the chosen ones, or over all.

    Returns
    -------
    Tensor, Tensor
        float32 and int64 ``[T, count]``, the largest first.
    """
    if on_kernels(logits):
        from stars_fast.kernels import experts as kernels

        return kernels.choose_experts(logits, count, share=share)
    weights, index = logits.float().softmax(dim=-1).topk(count, dim=-1)
    if share:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, index


def run_experts(x: Tensor, index: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """Return the weighted sum of what each token's experts make of it.

    Parameters
    ----------
    x : Tensor
        ``[T, H]``.
    index, weights : Tensor
        int64 and floating ``[T, K]``: the experts of each token.
    experts : Experts
        Of the dtype of `x`.

    Returns
    -------
    Tensor
        ``[T, H]``.
    """
    if on_kernels(x):
        from stars_fast.kernels import experts as kernels

        return kernels.run_experts(x, index, weights, experts)
    total = x.new_zeros(x.shape, dtype=torch.float32)
    for expert in range(len(experts.down)):
        token, place = torch.where(index == expert)
        if not len(token):
            continue
        both = _product(x[token], experts.gate_up, experts.gate_up_bias, expert, experts)
        made = _product(_activated(both, experts), experts.down, experts.down_bias, expert, experts)
        total.index_add_(0, token, made.float() * weights[token, place, None].float())
    return total.to(x.dtype)


def _product(
    x: Tensor, weights: Tensor, biases: Tensor | None, expert: int, experts: Experts
) -> Tensor:
    weight = weights[expert].T if experts.transposed else weights[expert]
    return F.linear(x, weight, None if biases is None else biases[expert])


def _activated(both: Tensor, experts: Experts) -> Tensor:
    if experts.interleaved:
        gate, up = both[..., ::2], both[..., 1::2]
    else:
        gate, up = both.chunk(2, dim=-1)
    if experts.activation == "silu":
        return F.silu(gate) * up
    if experts.activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    gate = gate.clamp(max=experts.limit)
    up = up.clamp(-experts.limit, experts.limit)
    return gate * torch.sigmoid(experts.alpha * gate) * (up + 1)
