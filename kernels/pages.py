"""Kernels that write KV pages: the copies of a round, and the appends of a layer.

A pool of one layer is a tensor ``[num_pages, page_size, kv_heads, head_dim]``; slot
``page * page_size + offset`` is a row of its flattened form. Pruning and rolling back change page
tables alone and have no kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars_fast.kernels.aot import ARCHITECTURES, Variant

_COPY_BLOCK = 512  # chunks that a program moves at once: four accesses a thread
_WARPS = 4

# Bytes of an access, and the words it is made of: the widest that divides every token is used.
_CHUNKS = {16: (tl.int32, 4), 4: (tl.int32, 1), 2: (tl.int16, 1), 1: (tl.int8, 1)}
PAGE_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
}


@triton.jit
def copy_pages_kernel(  # type: ignore[no-untyped-def]
    pool_address_ptr,  # int64 [P], where each pool begins
    pool_chunks_ptr,  # int32 [P], chunks of a token in each pool
    src_ptr,  # int32 [C]
    dst_ptr,  # int32 [C]
    count_ptr,  # int32 [C]
    page_size,
    WORD: tl.constexpr,
    CHUNK: tl.constexpr,  # words that are moved by one access
    BLOCK: tl.constexpr,  # chunks
):
    """Program (i, p) makes copy i in pool p, `BLOCK` chunks at a time."""
    copy = tl.program_id(0)
    pool = tl.program_id(1)
    token_chunks = tl.load(pool_chunks_ptr + pool)
    chunks = token_chunks * tl.load(count_ptr + copy)
    page_words = (token_chunks * page_size).to(tl.int64) * CHUNK
    base = tl.load(pool_address_ptr + pool).to(tl.pointer_type(WORD))
    base = tl.multiple_of(base, CHUNK * WORD.primitive_bitwidth // 8)
    source = base + tl.load(src_ptr + copy) * page_words
    target = base + tl.load(dst_ptr + copy) * page_words
    chunk = tl.arange(0, BLOCK)[:, None]
    word = tl.arange(0, CHUNK)[None, :]
    for start in range(0, chunks, BLOCK):
        live = start + chunk < chunks
        at = (start + chunk) * CHUNK + word
        tl.store(target + at, tl.load(source + at, mask=live, other=0), mask=live)


@triton.jit
def scaled(x, scale):  # type: ignore[no-untyped-def]
    """Divide, clamp and round to what float8_e4m3fn holds, so that the cast is exact.

    Not every Triton casts to it well: some truncate, and the interpreter loses carries.
    """
    x = tl.clamp(x.to(tl.float32) / scale, -448.0, 448.0)
    bits = x.to(tl.int32, bitcast=True)
    # Three bits of mantissa, to the nearest, ties to even.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    # Below 2**-6 the steps are 2**-9: adding 1.5 * 2**14 leaves no smaller ones.
    subnormal = (x + 24576.0) - 24576.0
    return tl.where(tl.abs(x) < 0.015625, subnormal, normal)


@triton.jit
def kv_append_kernel(  # type: ignore[no-untyped-def]
    k_ptr,
    v_ptr,
    key_ptr,
    value_ptr,
    slots_ptr,  # int64 [T]
    k_scale_ptr,  # float32 [kv_heads], read where SCALED
    v_scale_ptr,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Program t writes the key and the value of token t."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    head = tl.arange(0, BLOCK_HEADS)[:, None]

    at = tl.arange(0, BLOCK_KEY)[None, :]
    live = (head < HEADS) & (at < KEY_DIM)
    key = tl.load(
        key_ptr + token * key_token_stride + head * key_head_stride + at, mask=live, other=0.0
    )
    if SCALED:
        key = scaled(key, tl.load(k_scale_ptr + head, mask=head < HEADS, other=1.0))
    into = k_ptr + slot * (HEADS * KEY_DIM) + head * KEY_DIM + at
    tl.store(into, key.to(k_ptr.dtype.element_ty), mask=live)

    at = tl.arange(0, BLOCK_VALUE)[None, :]
    live = (head < HEADS) & (at < VALUE_DIM)
    value = tl.load(
        value_ptr + token * value_token_stride + head * value_head_stride + at,
        mask=live,
        other=0.0,
    )
    if SCALED:
        value = scaled(value, tl.load(v_scale_ptr + head, mask=head < HEADS, other=1.0))
    into = v_ptr + slot * (HEADS * VALUE_DIM) + head * VALUE_DIM + at
    tl.store(into, value.to(v_ptr.dtype.element_ty), mask=live)


@dataclass(frozen=True)
class PoolTable:
    """Where the pools of all layers lie, on their device.

    Attributes
    ----------
    pools
        Themselves, so that they outlive their addresses.
    address
        int64 ``[P]``, the first byte of each pool.
    chunks
        int32 ``[P]``, chunks of one token.
    chunk_bytes
        16, 4, 2 or 1: what one access moves, the most that divides every token.
    page_size
        Page size of every pool.
    token_bytes
        Bytes of a token over all pools.
    """

    pools: tuple[Tensor, ...]
    address: Tensor
    chunks: Tensor
    chunk_bytes: int
    page_size: int
    token_bytes: int


def pool_table(pools: Sequence[Tensor]) -> PoolTable:
    """Describe pools for `copy_pages`.

    Parameters
    ----------
    pools
        The K and the V pools of every layer, each ``[num_pages, page_size, kv_heads, head_dim]``,
        contiguous, on one device; heads, head dimensions and dtypes may differ.

    Raises
    ------
    ValueError
        If there is none, or if one is not contiguous or differs in pages, page size or device.
    """
    if not pools:
        raise ValueError("pools must not be empty")
    first = pools[0]
    for number, pool in enumerate(pools):
        if pool.ndim != 4 or pool.shape[:2] != first.shape[:2] or pool.device != first.device:
            raise ValueError(
                f"pools[{number}] must be [{first.shape[0]}, {first.shape[1]}, kv_heads, head_dim] "
                f"on {first.device}, got {list(pool.shape)} on {pool.device}"
            )
        if not pool.is_contiguous():
            raise ValueError(f"pools[{number}] must be contiguous, got strides {pool.stride()}")
    token_bytes = [pool[0, 0].numel() * pool.element_size() for pool in pools]
    addresses = [pool.data_ptr() for pool in pools]
    chunk = next(size for size in _CHUNKS if all(n % size == 0 for n in (*token_bytes, *addresses)))
    return PoolTable(
        pools=tuple(pools),
        address=torch.tensor(addresses, dtype=torch.int64).to(first.device),
        chunks=torch.tensor([n // chunk for n in token_bytes], dtype=torch.int32).to(first.device),
        chunk_bytes=chunk,
        page_size=first.shape[1],
        token_bytes=sum(token_bytes),
    )


def copy_pages(table: PoolTable, src: Tensor, dst: Tensor, count: Tensor) -> None:
    """Copy the first ``count[i]`` tokens of page ``src[i]`` to page ``dst[i]`` in every pool.

    One launch for all copies, layers, keys and values; changes nothing else in the pools. Reads
    and writes ``count.sum() * table.token_bytes`` bytes each: the least there is.

    Parameters
    ----------
    table : PoolTable
        The pools.
    src, dst, count : Tensor
        int32 ``[C]``, on the device of the pools, ``0 <= count <= page_size``. No page is a target
        twice, or both a source and a target: copies run side by side. The values are not checked,
        as that would wait for the device.

    Raises
    ------
    ValueError
        If a shape, dtype or device differs.
    """
    shape = src.shape
    for name, tensor in (("src", src), ("dst", dst), ("count", count)):
        if tensor.ndim != 1 or tensor.shape != shape or tensor.dtype != torch.int32:
            raise ValueError(
                f"{name} must be int32 of shape {list(shape)[:1]}, got {tensor.dtype} of shape "
                f"{list(tensor.shape)}"
            )
        if tensor.device != table.address.device:
            raise ValueError(f"{name} must be on {table.address.device}, got {tensor.device}")
    if shape[0] == 0:
        return
    word, width = _CHUNKS[table.chunk_bytes]
    copy_pages_kernel[(shape[0], table.address.shape[0])](
        table.address,
        table.chunks,
        src.contiguous(),
        dst.contiguous(),
        count.contiguous(),
        table.page_size,
        WORD=word,
        CHUNK=width,
        BLOCK=_COPY_BLOCK,
        num_warps=_WARPS,
    )


def kv_append(
    k_pages: Tensor,
    v_pages: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write the keys and values of new tokens of one layer to their slots, in place.

    One launch; reads each key and value once and writes it once, in the dtype of the pool.

    Parameters
    ----------
    k_pages, v_pages : Tensor
        ``[num_pages, page_size, kv_heads, head_dim]``, contiguous; float32, bfloat16, float16 or
        float8_e4m3fn. The two head dimensions may differ.
    key, value : Tensor
        ``[T, kv_heads, head_dim]``, any strides but 1 for the last.
    slots : Tensor
        int64 ``[T]``. Slot 0, on the null page, may occur many times; what it then holds is
        unspecified. Every other slot occurs at most once.
    k_scale, v_scale : Tensor or None
        float32 ``[kv_heads]``, both or neither: what is stored is the key or value over its head's
        scale, clamped to what float8_e4m3fn can hold.

    Raises
    ------
    ValueError
        If a shape, dtype or device does not fit.
    """
    check_append(k_pages, v_pages, key, value, slots, k_scale, v_scale)
    tokens, heads = key.shape[:2]
    if tokens == 0:
        return
    kv_append_kernel[(tokens,)](
        k_pages,
        v_pages,
        key,
        value,
        slots.contiguous(),
        k_scale,
        v_scale,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        **_append_blocks(heads, key.shape[2], value.shape[2]),
        SCALED=k_scale is not None,
        num_warps=_WARPS,
    )


def check_append(
    k_pages: Tensor,
    v_pages: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments of `kv_append` fit each other."""
    tokens, heads = key.shape[:2]
    for name, tensor, pages in (("key", key, k_pages), ("value", value, v_pages)):
        want = (tokens, *pages.shape[2:])
        if tensor.shape != want or tensor.stride(-1) != 1 or tensor.device != pages.device:
            raise ValueError(
                f"{name} must have shape {list(want)}, last stride 1, on {pages.device}; got "
                f"{list(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"
            )
        if not pages.is_contiguous() or pages.dtype not in PAGE_TYPES:
            raise ValueError(
                f"{name[0]}_pages must be contiguous, of {', '.join(map(str, PAGE_TYPES))}; got "
                f"strides {pages.stride()} of {pages.dtype}"
            )
    if slots.shape != (tokens,) or slots.dtype != torch.int64:
        raise ValueError(
            f"slots must be int64 of shape [{tokens}], got {slots.dtype} of {list(slots.shape)}"
        )
    if (k_scale is None) != (v_scale is None):
        raise ValueError("k_scale and v_scale go together: one of them is None")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None and (scale.shape != (heads,) or scale.dtype != torch.float32):
            raise ValueError(
                f"{name} must be float32 of shape [{heads}], got {scale.dtype} of "
                f"{list(scale.shape)}"
            )


def _append_blocks(heads: int, key_dim: int, value_dim: int) -> dict[str, int]:
    return {
        "HEADS": heads,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_HEADS": triton.next_power_of_2(heads),
        "BLOCK_KEY": triton.next_power_of_2(key_dim),
        "BLOCK_VALUE": triton.next_power_of_2(value_dim),
    }


def variants() -> list[Variant]:
    """Every form that the launchers choose, for 8 heads of 64, 128 and 256."""
    found = []
    for size, (word, width) in _CHUNKS.items():
        found.append(
            Variant(
                f"copy_pages {size}-byte accesses",
                copy_pages_kernel,
                {
                    "pool_address_ptr": "*i64",
                    **dict.fromkeys(("pool_chunks_ptr", "src_ptr", "dst_ptr", "count_ptr"), "*i32"),
                    "page_size": "i32",
                    **dict.fromkeys(("WORD", "CHUNK", "BLOCK"), "constexpr"),
                },
                {"WORD": word, "CHUNK": width, "BLOCK": _COPY_BLOCK},
                num_warps=_WARPS,
            )
        )
    strides = ("key_token", "key_head", "value_token", "value_head")
    for dtype, stored in (
        *((dtype, dtype) for dtype in PAGE_TYPES if dtype != torch.float8_e4m3fn),
        (torch.bfloat16, torch.float8_e4m3fn),
    ):
        for dim in (64, 128, 256):
            is_scaled = stored != dtype
            scale = "*fp32" if is_scaled else "constexpr"
            found.append(
                Variant(
                    f"kv_append {PAGE_TYPES[dtype]} to {PAGE_TYPES[stored]}, 8 heads of {dim}",
                    kv_append_kernel,
                    {
                        **dict.fromkeys(("k_ptr", "v_ptr"), f"*{PAGE_TYPES[stored]}"),
                        **dict.fromkeys(("key_ptr", "value_ptr"), f"*{PAGE_TYPES[dtype]}"),
                        "slots_ptr": "*i64",
                        "k_scale_ptr": scale,
                        "v_scale_ptr": scale,
                        **{f"{name}_stride": "i32" for name in strides},
                        **dict.fromkeys(_append_blocks(8, dim, dim), "constexpr"),
                        "SCALED": "constexpr",
                    },
                    {
                        **_append_blocks(8, dim, dim),
                        "SCALED": is_scaled,
                        **({} if is_scaled else {"k_scale_ptr": None, "v_scale_ptr": None}),
                    },
                    num_warps=_WARPS,
                    capabilities=(90, 100) if is_scaled else ARCHITECTURES,
                    aligned=frozenset(
                        {"k_ptr", "v_ptr", "key_ptr", "value_ptr"}
                        | {f"{name}_stride" for name in strides}
                    ),
                )
            )
    return found
