"""Rotary embedding of queries and keys, and the append of keys and values, in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars_fast.kernels.aot import ARCHITECTURES, Variant
from stars_fast.kernels.pages import PAGE_TYPES, check_append, scaled
from stars_fast.kernels.rounding import rounded
from stars_fast.kernels.sample import DTYPES

if TYPE_CHECKING:
    from stars_fast.ops.fused import Rotary

_ELEMENTS = 1024  # of a program's tile
# Which channels turn together: 0, those a half apart; 1, neighbours; 2, neighbours, which come out
# a half apart.


@triton.jit
def _turned(  # type: ignore[no-untyped-def]
    x_ptr,  # of the token
    head_stride,
    cos_ptr,  # of the token
    sin_ptr,
    head,
    at,
    live,
    START: tl.constexpr,  # the first channel that turns
    SIZE: tl.constexpr,  # channels that turn
    ORDER: tl.constexpr,  # see above
):
    """A tile of heads, turned; each product is rounded, as PyTorch does."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    wide: tl.constexpr = cos_ptr.dtype.element_ty  # of the products
    turn = at - START
    turns = (turn >= 0) & (turn < SIZE)
    own = turn
    if ORDER == 1:
        partner = turn ^ 1
        first = (turn & 1) == 0
    else:
        first = turn < SIZE // 2
        partner = tl.where(first, turn + SIZE // 2, turn - SIZE // 2)
    if ORDER == 2:
        own = tl.where(first, 2 * turn, 2 * turn - SIZE + 1)
        partner = own ^ 1
    here = x_ptr + head * head_stride
    x = tl.load(here + tl.where(turns, START + own, at), mask=live, other=0.0)
    other = tl.load(here + START + partner, mask=live & turns, other=0.0).to(tl.float32)
    other = tl.where(first, -other, other)
    cos = tl.load(cos_ptr + turn, mask=turns, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + turn, mask=turns, other=0.0).to(tl.float32)
    one = rounded(x.to(tl.float32) * cos, wide).to(tl.float32)
    two = rounded(other * sin, wide).to(tl.float32)
    return tl.where(turns, rounded(one + two, dtype), x)


@triton.jit
def rotate_append_kernel(  # type: ignore[no-untyped-def]
    query_ptr,
    key_ptr,
    value_ptr,
    cos_ptr,  # [T, SIZE], rows `turn_stride` apart
    sin_ptr,
    slots_ptr,  # int64 [T]
    out_ptr,  # [T, heads, KEY_DIM]
    k_ptr,
    v_ptr,
    k_scale_ptr,  # float32 [kv_heads], read where SCALED
    v_scale_ptr,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    turn_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    START: tl.constexpr,
    SIZE: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Program (t, b): a block of the query heads of token t, then blocks of its KV heads."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    query_blocks: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    cos_ptr += token * turn_stride
    sin_ptr += token * turn_stride
    at = tl.arange(0, BLOCK_KEY)[None, :]
    if block < query_blocks:
        head = block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
        live = (head < HEADS) & (at < KEY_DIM)
        query = _turned(
            query_ptr + token * query_token_stride, query_head_stride, cos_ptr, sin_ptr, head, at,
            live, START, SIZE, ORDER,
        )  # fmt: skip
        tl.store(out_ptr + (token * HEADS + head) * KEY_DIM + at, query, mask=live)
    else:
        slot = tl.load(slots_ptr + token)
        head = (block - query_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
        live = (head < KV_HEADS) & (at < KEY_DIM)
        key = _turned(
            key_ptr + token * key_token_stride, key_head_stride, cos_ptr, sin_ptr, head, at, live,
            START, SIZE, ORDER,
        )  # fmt: skip
        if SCALED:
            key = scaled(key, tl.load(k_scale_ptr + head, mask=head < KV_HEADS, other=1.0))
        into = k_ptr + (slot * KV_HEADS + head) * KEY_DIM + at
        tl.store(into, key.to(k_ptr.dtype.element_ty), mask=live)

        channel = tl.arange(0, BLOCK_VALUE)[None, :]
        there = (head < KV_HEADS) & (channel < VALUE_DIM)
        value = tl.load(
            value_ptr + token * value_token_stride + head * value_head_stride + channel,
            mask=there,
            other=0.0,
        )
        if SCALED:
            value = scaled(value, tl.load(v_scale_ptr + head, mask=head < KV_HEADS, other=1.0))
        into = v_ptr + (slot * KV_HEADS + head) * VALUE_DIM + channel
        tl.store(into, value.to(v_ptr.dtype.element_ty), mask=there)


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
    """Turn queries and keys, and write keys and values to their slots; return the queries.

    One launch; reads each input once, tables once a block of heads, and writes each result once.

    Parameters
    ----------
    query : Tensor
        float32, bfloat16 or float16 ``[T, heads, D]``, any strides but 1 for the last.
    rotary : Rotary
        Tables for all T tokens, of the dtype of `query` or float32.
    key, value, k_pages, v_pages, slots, k_scale, v_scale
        See `stars_fast.kernels.pages.kv_append`; `key` of the dtype of `query`.

    Returns
    -------
    Tensor
        ``[T, heads, D]``, contiguous.

    Raises
    ------
    ValueError
        If a shape, a stride, a dtype or a device does not fit.
    """
    check_append(k_pages, v_pages, key, value, slots, k_scale, v_scale)
    tokens, heads, dim = query.shape
    if (tokens, dim) != (key.shape[0], key.shape[2]) or query.stride(-1) != 1:
        raise ValueError(
            f"query must have shape [{key.shape[0]}, heads, {key.shape[2]}], last stride 1; got "
            f"{list(query.shape)}, strides {query.stride()}"
        )
    if query.dtype not in DTYPES or key.dtype != query.dtype:
        raise ValueError(
            f"query and key must have one dtype of {', '.join(map(str, DTYPES))}; got "
            f"{query.dtype} and {key.dtype}"
        )
    cos, sin = rotary.cos, rotary.sin
    size, most = cos.shape[-1], dim - rotary.start
    if not 0 <= rotary.start <= dim:
        raise ValueError(f"rotary.start must be in [0, {dim}], got {rotary.start}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (tokens, size) or size > most or size % 2:
            raise ValueError(
                f"rotary.{name} must be [{tokens}, an even number up to {most}], got "
                f"{list(table.shape)}"
            )
        if table.dtype not in (query.dtype, torch.float32):
            raise ValueError(
                f"rotary.{name} must be {query.dtype} or torch.float32, got {table.dtype}"
            )
    out = query.new_empty(query.shape)
    if not tokens:
        return out
    if cos.stride() != sin.stride() or cos.stride(1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    sizes = _blocks(heads, key.shape[1], dim, value.shape[2])
    blocks = sum(-(-sizes[name] // sizes["BLOCK_HEADS"]) for name in ("HEADS", "KV_HEADS"))
    rotate_append_kernel[(tokens, blocks)](
        query,
        key,
        value,
        cos,
        sin,
        slots.contiguous(),
        out,
        k_pages,
        v_pages,
        k_scale,
        v_scale,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        cos.stride(0),
        START=rotary.start,
        SIZE=size,
        ORDER=2 if rotary.parted else int(rotary.interleaved),
        **sizes,
        SCALED=k_scale is not None,
    )
    return out


def _blocks(heads: int, kv_heads: int, key_dim: int, value_dim: int) -> dict[str, int]:
    key, value = (triton.next_power_of_2(dim) for dim in (key_dim, value_dim))
    most = triton.next_power_of_2(max(heads, kv_heads))
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_HEADS": max(1, min(most, _ELEMENTS // max(key, value))),
        "BLOCK_KEY": key,
        "BLOCK_VALUE": value,
    }


def variants() -> list[Variant]:
    """The forms for 32 heads and 8 KV heads of 64, 128 and 256, all of whose channels turn.

    And for DeepSeek's 128 heads of 192, the last 64 of whose channels do.
    """
    found = []
    strides = ("query_token", "query_head", "key_token", "key_head", "value_token", "value_head")
    for dtype, stored in (
        *((dtype, dtype) for dtype in DTYPES),
        (torch.bfloat16, torch.float8_e4m3fn),
    ):
        is_scaled = stored != dtype
        scale = "*fp32" if is_scaled else "constexpr"
        read = ("query_ptr", "key_ptr", "value_ptr", "cos_ptr", "sin_ptr")
        for heads, kv_heads, dim, start, order in (
            *((32, 8, dim, 0, 0) for dim in (64, 128, 256)),
            (128, 128, 192, 128, 2),
        ):
            flags = {
                **_blocks(heads, kv_heads, dim, start or dim),
                "START": start,
                "SIZE": dim - start,
                "ORDER": order,
                "SCALED": is_scaled,
            }
            of = f"{heads} heads of {dim}"
            found.append(
                Variant(
                    f"rotate_append {DTYPES[dtype]} to {PAGE_TYPES[stored]}, {of}",
                    rotate_append_kernel,
                    {
                        **dict.fromkeys(read, f"*{DTYPES[dtype]}"),
                        "slots_ptr": "*i64",
                        "out_ptr": f"*{DTYPES[dtype]}",
                        **dict.fromkeys(("k_ptr", "v_ptr"), f"*{PAGE_TYPES[stored]}"),
                        "k_scale_ptr": scale,
                        "v_scale_ptr": scale,
                        **{f"{name}_stride": "i32" for name in strides},
                        "turn_stride": "i32",
                        **dict.fromkeys(
                            (
                                "HEADS", "KV_HEADS", "KEY_DIM", "VALUE_DIM", "START", "SIZE",
                                "ORDER", "BLOCK_HEADS", "BLOCK_KEY", "BLOCK_VALUE", "SCALED",
                            ),
                            "constexpr",
                        ),
                    },
                    {
                        **flags,
                        **({} if is_scaled else {"k_scale_ptr": None, "v_scale_ptr": None}),
                    },
                    capabilities=(90, 100) if is_scaled else ARCHITECTURES,
                    aligned=frozenset(
                        {*read, "slots_ptr", "out_ptr", "k_ptr", "v_ptr", "turn_stride"}
                        | {f"{name}_stride" for name in strides}
                    ),
                )
            )  # fmt: skip
    return found
