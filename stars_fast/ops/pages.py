"""Writing KV pages: copies of partly filled pages at a fork, and appends of new tokens.

A pool of one layer is a tensor ``[num_pages, page_size, kv_heads, head_dim]``; slot
``page * page_size + offset`` is a row of its flattened form.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("stars_fast::copy_pages", mutates_args=("k_pages", "v_pages"))
def copy_pages(
    k_pages: list[Tensor], v_pages: list[Tensor], src: Tensor, dst: Tensor, count: Tensor
) -> None:
    """Copy the first ``count[i]`` tokens of page ``src[i]`` to page ``dst[i]``, in every layer.

    All sources are read before any destination is written. Changes `k_pages` and `v_pages` in
    place and nothing else in them.

    Parameters
    ----------
    k_pages, v_pages : list of Tensor
        One ``[num_pages, page_size, kv_heads, head_dim]`` per layer, contiguous.
    src, dst, count : Tensor
        int32 ``[C]``; `dst` holds no page twice; ``0 <= count <= page_size``.
    """
    if src.numel() == 0 or not k_pages:
        return
    page_size = k_pages[0].shape[1]
    offset = torch.arange(page_size, device=src.device)
    wanted = offset < count.unsqueeze(1)
    src_slots = (src.to(torch.int64).unsqueeze(1) * page_size + offset)[wanted]
    dst_slots = (dst.to(torch.int64).unsqueeze(1) * page_size + offset)[wanted]
    for pages in (*k_pages, *v_pages):
        tokens = pages.flatten(0, 1)
        tokens.index_copy_(0, dst_slots, tokens.index_select(0, src_slots))


@torch.library.custom_op("stars_fast::kv_append", mutates_args=("k_pages", "v_pages"))
def kv_append(k_pages: Tensor, v_pages: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Write the keys and values of new tokens of one layer to their slots, in place.

    Parameters
    ----------
    k_pages, v_pages : Tensor
        ``[num_pages, page_size, kv_heads, head_dim]``, contiguous.
    key, value : Tensor
        ``[T, kv_heads, head_dim]`` of the pool's dtype.
    slots : Tensor
        int64 ``[T]``. Slot 0, on the null page, may occur many times; what it then holds is
        unspecified. Every other slot occurs at most once.
    """
    k_pages.flatten(0, 1).index_copy_(0, slots, key)
    v_pages.flatten(0, 1).index_copy_(0, slots, value)
