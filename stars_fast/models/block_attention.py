"""Attention of a prefill in which the tokens of a picture see each other, later ones too.

In PyTorch, row by row and without a kernel: prefills with pictures are few, and the rounds that
follow read the pages as ever.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stars_fast.models.pool import Pools
from stars_fast.ops.batch import BatchLike
from stars_fast.ops.fused import Rotary, rotate
from stars_fast.ops.pages import kv_append
from stars_fast.ops.tiling import prefix_slots


@dataclass(frozen=True)
class _Row:
    """A row: its packed tokens, the slots before it, and which key each of its tokens may see."""

    packed: slice
    prefix: Tensor  # int64 [start]
    seen: Tensor  # bool [new, start + new]
    distance: Tensor  # int64 [new, start + new], from the key to the query


class BlockAttention:
    """The `LayerAttention` of one prefill.

    Parameters
    ----------
    pools
        The model's.
    batch
        Rows of the prefill.
    lengths
        int64 ``[R]``: tokens of each row, which may be more than those of the batch; they lie in
        the null page.
    blocks
        int64 ``[N]``: tokens of a row with the same number see each other, -1 sees earlier ones.
    slots
        int64 ``[N]``.
    """

    def __init__(
        self,
        pools: Pools,
        batch: BatchLike,
        lengths: NDArray[np.int64],
        blocks: NDArray[np.int64],
        slots: Tensor,
    ) -> None:
        self._pools = pools
        self._slots = slots
        self._layer = 0
        self._rows: list[_Row] = []
        ends = np.cumsum(lengths).tolist()
        page_size = pools.k_pages[0].shape[1]
        for row, (start, end) in enumerate(zip(batch.row_start.tolist(), ends, strict=True)):
            packed = slice(end - int(lengths[row]), end)
            group = batch.row_group[row : row + 1]
            prefix = prefix_slots(batch, group, np.array([start]), page_size, start)[0]
            query = np.arange(start, start + int(lengths[row]))[:, None]
            key = np.arange(start + int(lengths[row]))[None, :]
            own = blocks[packed]
            seen = key <= query
            seen[:, start:] |= (own[:, None] == own[None, :]) & (own[:, None] >= 0)
            arrays = (torch.from_numpy(x).to(slots.device) for x in (prefix, seen, query - key))
            self._rows.append(_Row(packed, *arrays))

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
        """Attention of the next layer, see `LayerAttention`."""
        assert sinks is None  # no model of this kind has any
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        layer, pools = self._layer, self._pools
        self._layer += 1
        window = pools.layouts[layer].window
        k_scale, v_scale = pools.k_scales[layer], pools.v_scales[layer]
        kv_append(
            pools.k_pages[layer], pools.v_pages[layer], key, value, self._slots, k_scale, v_scale
        )
        out = query.new_empty((*query.shape[:2], value.shape[2]))
        for row in self._rows:
            keys = _joined(pools.k_pages[layer], row.prefix, key[row.packed], k_scale)
            values = _joined(pools.v_pages[layer], row.prefix, value[row.packed], v_scale)
            repeats = query.shape[1] // key.shape[1]
            keys = keys.repeat_interleave(repeats, dim=1)
            values = values.repeat_interleave(repeats, dim=1)
            scores = torch.einsum("qhd,khd->hqk", query[row.packed].float(), keys) * scaling
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            seen = row.seen & (row.distance < window) if window else row.seen
            weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
            out[row.packed] = torch.einsum("hqk,khd->qhd", weights, values).to(out.dtype)
        return out


def _joined(pages: Tensor, prefix: Tensor, new: Tensor, scale: Tensor | None) -> Tensor:
    """Return keys or values of a prefix and of what follows it, ``[tokens, heads, dim]``."""
    before = pages.flatten(0, 1)[prefix].float()
    if scale is not None:
        before = before * scale.unsqueeze(-1)
    return torch.cat((before, new.float()))
