"""RMSNorm, with the residual stream and a norm in front of it, in one launch.

The kernels of `stars_fast.ops.fused`: a row is read once and stays in registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars_fast.kernels.aot import Variant
from stars_fast.kernels.rounding import rounded
from stars_fast.kernels.sample import DTYPES

if TYPE_CHECKING:
    from stars_fast.ops.fused import Norm

_ELEMENTS = 1024  # of a program that normalises heads
_WIDE = 2048  # channels from which a row takes more warps


@triton.jit
def _normalised(  # type: ignore[no-untyped-def]
    x,  # [ROWS, BLOCK], 0 past the last channel
    weight_ptr,
    at,
    live,
    eps,
    offset,
    DIM: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    dtype: tl.constexpr,  # of the input
):
    """See `stars_fast.ops.fused.rms_norm`, step by step as PyTorch rounds it."""
    wide = x.to(tl.float32)
    # A division of Triton's own may be approximate; that of the square root is not.
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, axis=1) / DIM + eps)
    wide = wide * scale[:, None]
    weight = tl.load(weight_ptr + at, mask=live, other=0.0)
    if ROUNDS_FIRST:
        # Both roundings are those of an operator on tensors of these types.
        weight = rounded(weight.to(tl.float32) + offset, weight_ptr.dtype.element_ty)
        return rounded(wide, dtype).to(tl.float32) * weight.to(tl.float32)
    return wide * (weight.to(tl.float32) + offset)


@triton.jit
def rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,
    before_ptr,  # [DIM], the weight of the norm of x itself
    weight_ptr,  # [DIM], that of the norm of the sum
    total_ptr,  # out, the sum
    out_ptr,  # out
    x_stride,
    residual_stride,
    before_eps,
    before_offset,
    eps,
    offset,
    scale,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BEFORE: tl.constexpr,
    SCALED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BEHIND: tl.constexpr,
    BEFORE_ROUNDS_FIRST: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
):
    """Program t: norm x, scale it, add the residual, store the sum, norm it; each where asked."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)[None, :]
    live = at < DIM
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + token * x_stride + at, mask=live, other=0.0)
    if BEFORE:
        normed = _normalised(
            x, before_ptr, at, live, before_eps, before_offset, DIM, BEFORE_ROUNDS_FIRST, dtype
        )
        x = rounded(normed, dtype)
    if SCALED:
        x = rounded(x.to(tl.float32) * scale, dtype)
    if RESIDUAL:
        residual = tl.load(residual_ptr + token * residual_stride + at, mask=live, other=0.0)
        x = rounded(x.to(tl.float32) + residual.to(tl.float32), dtype)
        tl.store(total_ptr + token * DIM + at, x, mask=live)
    if BEHIND:
        normed = _normalised(x, weight_ptr, at, live, eps, offset, DIM, ROUNDS_FIRST, dtype)
        tl.store(out_ptr + token * DIM + at, rounded(normed, out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _norm_heads(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    out_ptr,
    token,
    block,
    token_stride,
    eps,
    offset,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
):
    head = block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    live = (head < HEADS) & (at < DIM)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + token * token_stride + head * DIM + at, mask=live, other=0.0)
    normed = _normalised(x, weight_ptr, at, at < DIM, eps, offset, DIM, ROUNDS_FIRST, dtype)
    into = out_ptr + (token * HEADS + head) * DIM + at
    tl.store(into, rounded(normed, out_ptr.dtype.element_ty), mask=live)


@triton.jit
def head_norms_kernel(  # type: ignore[no-untyped-def]
    query_ptr,
    key_ptr,
    query_weight_ptr,
    key_weight_ptr,
    query_out_ptr,
    key_out_ptr,
    query_stride,
    key_stride,
    query_eps,
    query_offset,
    key_eps,
    key_offset,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
):
    """Program (t, b): a block of heads of token t, those of the queries first."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    query_blocks: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    if block < query_blocks:
        _norm_heads(
            query_ptr, query_weight_ptr, query_out_ptr, token, block, query_stride, query_eps,
            query_offset, HEADS, DIM, BLOCK_HEADS, BLOCK, ROUNDS_FIRST,
        )  # fmt: skip
    else:
        _norm_heads(
            key_ptr, key_weight_ptr, key_out_ptr, token, block - query_blocks, key_stride, key_eps,
            key_offset, KV_HEADS, DIM, BLOCK_HEADS, BLOCK, ROUNDS_FIRST,
        )  # fmt: skip


def rms_norm(
    x: Tensor,
    norm: Norm | None,
    residual: Tensor | None = None,
    before: Norm | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Norm rows, one launch; see `stars_fast.ops.fused.rms_norm` and `norm_add`.

    Reads each input once and writes each result once.

    Parameters
    ----------
    x : Tensor
        float32, bfloat16 or float16 ``[T, D]``, last stride 1.
    norm : Norm or None
        None: no norm of the sum is wanted.
    residual : Tensor or None
        Of the shape and dtype of `x`, last stride 1.
    before : Norm or None
        Applied to `x` before `residual` is added.
    scale : float
        Factor on `x` or what `before` makes of it; needs `residual`, unless it is 1.

    Returns
    -------
    Tensor, Tensor
        The normed sum, and the sum; the same without `norm`.

    Raises
    ------
    ValueError
        If a shape, a stride, a dtype or a device does not fit.
    """
    dtype, dim = x.dtype, x.shape[-1]
    _check("x", x)
    if residual is not None:
        _check("residual", residual)
        if residual.shape != x.shape or residual.dtype != dtype:
            raise ValueError(
                f"residual must be {dtype} of shape {list(x.shape)}, got {residual.dtype} of "
                f"{list(residual.shape)}"
            )
    for name, asked in (("norm", norm), ("before", before)):
        if asked is not None:
            _check_weight(name, asked, x)
    total = x if residual is None else x.new_empty(x.shape)
    out = total
    if norm is not None:
        out = x.new_empty(x.shape, dtype=_result(norm, x))
    if len(x):
        rms_norm_kernel[(len(x),)](
            x,
            residual,
            None if before is None else before.weight,
            None if norm is None else norm.weight,
            total,
            out,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            0.0 if before is None else before.eps,
            0.0 if before is None else before.offset,
            0.0 if norm is None else norm.eps,
            0.0 if norm is None else norm.offset,
            float(scale),
            DIM=dim,
            BLOCK=triton.next_power_of_2(dim),
            BEFORE=before is not None,
            SCALED=scale != 1.0,
            RESIDUAL=residual is not None,
            BEHIND=norm is not None,
            BEFORE_ROUNDS_FIRST=before is not None and before.rounds_first,
            ROUNDS_FIRST=norm is not None and norm.rounds_first,
            num_warps=_warps(dim),
        )
    return out, total


def head_norms(
    query: Tensor, key: Tensor, query_norm: Norm, key_norm: Norm
) -> tuple[Tensor, Tensor]:
    """Norm each head of queries and keys, one launch.

    Parameters
    ----------
    query, key : Tensor
        float32, bfloat16 or float16 ``[T, heads * D]`` and ``[T, kv_heads * D]``, last stride 1.
    query_norm, key_norm : Norm
        Of D channels; both round first, or neither does.

    Returns
    -------
    Tensor, Tensor
        Contiguous, of the shapes of the input.

    Raises
    ------
    ValueError
        If a shape, a stride, a dtype or a device does not fit.
    """
    dim = len(query_norm.weight)
    for name, x, norm in (("query", query, query_norm), ("key", key, key_norm)):
        _check(name, x)
        if x.shape[1] % dim or len(x) != len(query) or len(norm.weight) != dim:
            raise ValueError(
                f"{name} must be heads of {dim} channels of {len(query)} tokens, got "
                f"{list(x.shape)} and {len(norm.weight)} weights"
            )
        _check_weight(f"{name}_norm", norm, x.view(len(x), -1, dim))
    if query_norm.rounds_first != key_norm.rounds_first:
        raise ValueError("query_norm and key_norm must round at the same place")
    outs = [
        x.new_empty(x.shape, dtype=_result(norm, x))
        for x, norm in ((query, query_norm), (key, key_norm))
    ]
    sizes = _head_blocks(query.shape[1] // dim, key.shape[1] // dim, dim)
    blocks = sum(-(-sizes[name] // sizes["BLOCK_HEADS"]) for name in ("HEADS", "KV_HEADS"))
    if len(query):
        head_norms_kernel[(len(query), blocks)](
            query,
            key,
            query_norm.weight,
            key_norm.weight,
            *outs,
            query.stride(0),
            key.stride(0),
            query_norm.eps,
            query_norm.offset,
            key_norm.eps,
            key_norm.offset,
            **sizes,
            ROUNDS_FIRST=query_norm.rounds_first,
        )
    return outs[0], outs[1]


def _result(norm: Norm, x: Tensor) -> torch.dtype:
    return torch.promote_types(norm.weight.dtype, x.dtype) if norm.rounds_first else x.dtype


def _warps(dim: int) -> int:
    return 4 if dim <= _WIDE else 8


def _head_blocks(heads: int, kv_heads: int, dim: int) -> dict[str, int]:
    block = triton.next_power_of_2(dim)
    most = triton.next_power_of_2(max(heads, kv_heads))
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "DIM": dim,
        "BLOCK_HEADS": max(1, min(most, _ELEMENTS // block)),
        "BLOCK": block,
    }


def _check(name: str, x: Tensor) -> None:
    if x.ndim != 2 or x.stride(-1) != 1 or x.dtype not in DTYPES:
        raise ValueError(
            f"{name} must have 2 dimensions, last stride 1 and a dtype of "
            f"{', '.join(map(str, DTYPES))}; got {list(x.shape)}, strides {x.stride()}, {x.dtype}"
        )


def _check_weight(name: str, norm: Norm, x: Tensor) -> None:
    weight = norm.weight
    if weight.shape != x.shape[-1:] or weight.stride(0) != 1 or weight.device != x.device:
        raise ValueError(
            f"{name}.weight must have shape {list(x.shape[-1:])}, stride 1, on {x.device}; got "
            f"{list(weight.shape)}, stride {weight.stride()}, on {weight.device}"
        )


def variants() -> list[Variant]:
    """The forms for usual widths and heads, as Llama, Gemma and Qwen have them."""
    found = []
    for dtype in DTYPES.values():
        for dim in (2048, 4096, 8192):
            for name, before, residual, rounds_first in (
                ("alone", False, False, True),
                ("behind a residual", False, True, True),
                ("between two norms", True, True, False),
            ):
                pointers = {
                    "x_ptr": f"*{dtype}",
                    "residual_ptr": f"*{dtype}" if residual else "constexpr",
                    "before_ptr": f"*{dtype}" if before else "constexpr",
                    **dict.fromkeys(("weight_ptr", "total_ptr", "out_ptr"), f"*{dtype}"),
                }
                flags = {
                    "DIM": dim,
                    "BLOCK": triton.next_power_of_2(dim),
                    "BEFORE": before,
                    "SCALED": False,
                    "RESIDUAL": residual,
                    "BEHIND": True,
                    "BEFORE_ROUNDS_FIRST": rounds_first,
                    "ROUNDS_FIRST": rounds_first,
                }
                none = {name: None for name, kind in pointers.items() if kind == "constexpr"}
                found.append(
                    Variant(
                        f"rms_norm {dtype} {name}, {dim} channels",
                        rms_norm_kernel,
                        {
                            **pointers,
                            **dict.fromkeys(("x_stride", "residual_stride"), "i32"),
                            **dict.fromkeys(
                                ("before_eps", "before_offset", "eps", "offset", "scale"), "fp32"
                            ),
                            **dict.fromkeys(flags, "constexpr"),
                        },
                        {**flags, **none},
                        num_warps=_warps(dim),
                        aligned=frozenset({*pointers, "x_stride", "residual_stride"} - none.keys()),
                    )
                )
        for dim in (64, 128, 256):
            pointers = dict.fromkeys(
                (
                    "query_ptr", "key_ptr", "query_weight_ptr", "key_weight_ptr", "query_out_ptr",
                    "key_out_ptr",
                ),
                f"*{dtype}",
            )  # fmt: skip
            strides = dict.fromkeys(("query_stride", "key_stride"), "i32")
            numbers = dict.fromkeys(("query_eps", "query_offset", "key_eps", "key_offset"), "fp32")
            flags = {**_head_blocks(32, 8, dim), "ROUNDS_FIRST": True}
            found.append(
                Variant(
                    f"head_norms {dtype}, 32 heads of {dim}",
                    head_norms_kernel,
                    {**pointers, **strides, **numbers, **dict.fromkeys(flags, "constexpr")},
                    flags,
                    aligned=frozenset({*pointers, *strides}),
                )
            )
    return found
