"""What lies between a decoder layer's matrix products, each in one call.

They run as C++ on a CPU in float32 (`stars_fast.ops.cpu`) and as Triton kernels on a GPU; the code
here is the oracle, and what runs elsewhere.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from stars_fast.ops import cpu
from stars_fast.ops.backend import uses_triton
from stars_fast.ops.pages import kv_append

Activation: TypeAlias = Literal["silu", "gelu_tanh"]


class Rotary(NamedTuple):
    """Rotary position embedding (Su et al., arXiv 2104.09864) of one forward's tokens.

    Attributes
    ----------
    cos, sin : Tensor
        ``[T, D]``; products and sums are in their dtype if that is float32.
    interleaved : bool
        Whether channels 2 i and 2 i + 1 turn together, or i and i + D / 2.
    start : int
        The first channel of the D that turn; the head's others stay as they are.
    parted : bool
        Whether channels 2 i and 2 i + 1 turn together and become i and i + D / 2 (DeepSeek).
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False
    start: int = 0
    parted: bool = False


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


def rms_norm(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None = None,
    before: Norm | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Normalise over the last dimension, after a residual is added.

    Parameters
    ----------
    x : Tensor
        ``[T, D]`` or ``[T, heads, D]``.
    norm : Norm
        Weight and constants.
    residual : Tensor or None
        Of the shape of `x`.
    before : Norm or None
        Normalises `x` first, before the residual is added.
    scale : float
        Factor on what is added to the residual.

    Returns
    -------
    Tensor, Tensor
        The result, contiguous, and what was normalised: `x`, or x + residual.
    """
    if cpu.runs_on(x):
        x = _to_add(x, before, scale)
        return cpu.rms_norm(x, norm.weight, norm.eps, norm.offset, residual)
    if x.ndim == 2 and on_kernels(x):
        from stars_fast.kernels import norm as kernels

        return kernels.rms_norm(x, norm, residual, before, scale)
    x = _to_add(x, before, scale)
    if residual is not None:
        x = x + residual
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    if norm.rounds_first:
        return (norm.weight + norm.offset) * wide.to(x.dtype), x
    return (wide * (norm.weight.to(torch.float32) + norm.offset)).to(x.dtype), x


def norm_add(x: Tensor, norm: Norm | None, residual: Tensor, scale: float = 1.0) -> Tensor:
    """Return residual + scale * norm(x), ``[T, D]``."""
    if on_kernels(x):
        from stars_fast.kernels import norm as kernels

        return kernels.rms_norm(x, None, residual, norm, scale)[1]
    return residual + _to_add(x, norm, scale)


def _to_add(x: Tensor, norm: Norm | None, scale: float) -> Tensor:
    if norm is not None:
        x, _ = rms_norm(x, norm)
    return x if scale == 1.0 else x * scale


def norm_heads(
    query: Tensor, key: Tensor, query_norm: Norm | None, key_norm: Norm | None, dim: int
) -> tuple[Tensor, Tensor]:
    """Normalise queries and keys, ``[T, heads * dim]`` and ``[T, kv_heads * dim]``.

    A norm of `dim` channels is that of each head, one of more that of all of them together.
    """
    if query_norm is not None and key_norm is not None and on_kernels(query):
        by_head = len(query_norm.weight) == len(key_norm.weight) == dim
        if by_head and query_norm.rounds_first == key_norm.rounds_first:
            from stars_fast.kernels import norm as kernels

            return kernels.head_norms(query, key, query_norm, key_norm)
    return _norm_heads(query, query_norm, dim), _norm_heads(key, key_norm, dim)


def _norm_heads(x: Tensor, norm: Norm | None, dim: int) -> Tensor:
    if norm is None:
        return x
    if len(norm.weight) == dim:
        return rms_norm(x.view(len(x), -1, dim), norm)[0].flatten(1)
    return rms_norm(x, norm)[0]


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Return activation(gate) * up; both ``[T, D]``, of one row stride."""
    if cpu.runs_on(gate):
        return cpu.gated(gate, up, activation)
    if on_kernels(gate):
        from stars_fast.kernels import gated as kernels

        return kernels.gated(gate, up, activation)
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return act * up


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Return ``[T, heads, D]``, of the dtype of `x`, turned by its tokens' positions.

    It may be `x` itself.
    """
    if cpu.runs_on(x) and not rotary.start and not rotary.parted:
        return cpu.rotate(x, rotary.cos, rotary.sin, rotary.interleaved)
    begin, size = rotary.start, rotary.cos.shape[-1]
    before, turning, rest = x.tensor_split((begin, begin + size), dim=-1)
    if rotary.parted:
        turning = torch.cat((turning[..., ::2], turning[..., 1::2]), dim=-1)
    if rotary.interleaved:
        turned = torch.stack((-turning[..., 1::2], turning[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = turning.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    cos, sin = rotary.cos.unsqueeze(1), rotary.sin.unsqueeze(1)
    turning = (turning * cos + turned * sin).to(x.dtype)
    parts = [part for part in (before, turning, rest) if part.shape[-1]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def rotate_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotary: Rotary,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Turn queries and keys, store keys and values as `kv_append` does, and return the queries.

    Parameters
    ----------
    query : Tensor
        ``[T, heads, D]``.
    rotary : Rotary
        Of T tokens.
    key, value, k_pages, v_pages, slots, k_scale, v_scale
        See `stars_fast.ops.pages.kv_append`.

    Returns
    -------
    Tensor
        ``[T, heads, D]``, last stride 1.
    """
    if on_kernels(query) and query.dtype == key.dtype:
        from stars_fast.kernels import rotary as kernels

        return kernels.rotate_append(
            query, key, value, rotary, k_pages, v_pages, slots, k_scale, v_scale
        )
    kv_append(k_pages, v_pages, rotate(key, rotary), value, slots, k_scale, v_scale)
    return rotate(query, rotary)


def on_kernels(x: Tensor) -> bool:
    """Whether operators on it run as kernels here and now."""
    return uses_triton(x.device) and x.dtype in _KERNEL_DTYPES


_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
