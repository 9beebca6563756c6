"""Writing KV pages: copies of partly filled pages at a fork, and appends of new tokens.

A pool of one layer is a tensor ``[num_pages, page_size, kv_heads, head_dim]``; slot
``page * page_size + offset`` is a row of its flattened form.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stars_fast.ops.backend import uses_triton

if TYPE_CHECKING:
    from stars_fast.kernels.pages import PoolTable

_MAX_TABLES = 16  # engines of two models each, with room for those of before
_tables: dict[tuple[object, ...], PoolTable] = {}
_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


@torch.library.custom_op("stars_fast::copy_pages", mutates_args=("k_pages", "v_pages"))
def copy_pages(
    k_pages: list[Tensor], v_pages: list[Tensor], src: Tensor, dst: Tensor, count: Tensor
) -> None:
    """Copy the first ``count[i]`` tokens of page ``src[i]`` to page ``dst[i]``, in every layer.

    Changes `k_pages` and `v_pages` in place and nothing else in them.

    Parameters
    ----------
    k_pages, v_pages : list of Tensor
        One ``[num_pages, page_size, kv_heads, head_dim]`` per layer, contiguous.
    src, dst, count : Tensor
        int32 ``[C]``; ``0 <= count <= page_size``. No page is a target twice, or both a source and
        a target: the order of the copies is not defined.
    """
    if src.numel() == 0 or not k_pages:
        return
    if uses_triton(src.device):
        from stars_fast.kernels import pages as kernels

        kernels.copy_pages(_pool_table((*k_pages, *v_pages)), src, dst, count)
        return
    page_size = k_pages[0].shape[1]
    offset = torch.arange(page_size, device=src.device)
    wanted = offset < count.unsqueeze(1)
    src_slots = (src.to(torch.int64).unsqueeze(1) * page_size + offset)[wanted]
    dst_slots = (dst.to(torch.int64).unsqueeze(1) * page_size + offset)[wanted]
    for pages in (*k_pages, *v_pages):
        tokens = pages.flatten(0, 1)
        tokens[dst_slots] = tokens[src_slots]


def _pool_table(pools: tuple[Tensor, ...]) -> PoolTable:
    """Table of pools for the kernel, without the pools: they are freed though it is kept.

    To make one takes two copies to the device, for which the host waits; a model's pools never
    move. What it says depends on nothing but where they lie and how they are laid out.
    """
    from stars_fast.kernels.pages import pool_table

    key = tuple((x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for x in pools)
    table = _tables.get(key)
    if table is None:
        table = replace(pool_table(pools), pools=())
        if len(_tables) >= _MAX_TABLES:
            _tables.clear()
        _tables[key] = table
    return table


@torch.library.custom_op("stars_fast::kv_append", mutates_args=("k_pages", "v_pages"))
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

    Parameters
    ----------
    k_pages, v_pages : Tensor
        ``[num_pages, page_size, kv_heads, head_dim]``, contiguous.
    key, value : Tensor
        ``[T, kv_heads, head_dim]``; rounded to the pool's dtype.
    slots : Tensor
        int64 ``[T]``. Slot 0, on the null page, may occur many times; what it then holds is
        unspecified. Every other slot occurs at most once.
    k_scale, v_scale : Tensor or None
        float32 ``[kv_heads]``, for float8_e4m3fn pools: the key or value over its head's scale is
        stored, clamped to what the type can hold.
    """
    if uses_triton(key.device):
        from stars_fast.kernels import pages as kernels

        kernels.kv_append(k_pages, v_pages, key, value, slots, k_scale, v_scale)
        return
    for pages, new, scale in ((k_pages, key, k_scale), (v_pages, value, v_scale)):
        stored = new
        if scale is not None:
            stored = (new.to(torch.float32) / scale[:, None]).clamp_(-_FP8_MAX, _FP8_MAX)
        flat, stored = pages.flatten(0, 1), stored.to(pages.dtype)
        if pages.dtype == torch.float8_e4m3fn:  # few operators know the type: move its bytes
            flat, stored = flat.view(torch.uint8), stored.view(torch.uint8)
        flat.index_copy_(0, slots, stored)
