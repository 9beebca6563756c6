"""What lies between a decoder layer's matrix products, each in one call.

`rms_norm`, `gated` and `rotate` run as C++ on a CPU in float32 (`stars_fast.ops.cpu`); the code
here is the oracle, and what runs elsewhere.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from stars_fast.ops import cpu

Activation: TypeAlias = Literal["silu", "gelu_tanh"]


class Rotary(NamedTuple):
    """Rotary position embedding (Su et al., arXiv 2104.09864) of one forward's tokens.

    Attributes
    ----------
    cos, sin : Tensor
        ``[T, D]``, D at most the head's channels; those behind stay as they are.
    interleaved : bool
        Whether channels 2 i and 2 i + 1 turn together, or i and i + D / 2.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False


class Norm(NamedTuple):
    """Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467, equation 4).

    Attributes
    ----------
    weight : Tensor
        ``[D]``.
    eps : float
        Added to the mean square.
    offset : float
        Added to the weight, 1 in Gemma.
    rounds_first : bool
        Whether the result is rounded to the input's dtype before the weight is applied.
    """

    weight: Tensor
    eps: float
    offset: float = 0.0
    rounds_first: bool = True


def rms_norm(x: Tensor, norm: Norm, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Normalise over the last dimension, after a residual is added.

    Parameters
    ----------
    x : Tensor
        ``[T, D]`` or ``[T, heads, D]``.
    norm : Norm
        Weight and constants.
    residual : Tensor or None
        Of the shape of `x`.

    Returns
    -------
    Tensor, Tensor
        The result, contiguous, and what was normalised: `x`, or x + residual.
    """
    if cpu.runs_on(x):
        return cpu.rms_norm(x, norm.weight, norm.eps, norm.offset, residual)
    if residual is not None:
        x = x + residual
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    if norm.rounds_first:
        return (norm.weight + norm.offset) * wide.to(x.dtype), x
    return (wide * (norm.weight.to(torch.float32) + norm.offset)).to(x.dtype), x


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Return activation(gate) * up; both ``[T, D]``, of one row stride."""
    if cpu.runs_on(gate):
        return cpu.gated(gate, up, activation)
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return act * up


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Return ``[T, heads, D]`` turned by the positions of its tokens; it may be `x` itself."""
    if cpu.runs_on(x):
        return cpu.rotate(x, rotary.cos, rotary.sin, rotary.interleaved)
    size = rotary.cos.shape[-1]
    turning, rest = x[..., :size], x[..., size:]
    if rotary.interleaved:
        turned = torch.stack((-turning[..., 1::2], turning[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = turning.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    cos, sin = rotary.cos.unsqueeze(1), rotary.sin.unsqueeze(1)
    turning = turning * cos + turned * sin
    return turning if not rest.shape[-1] else torch.cat((turning, rest), dim=-1)
