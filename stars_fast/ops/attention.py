"""Attention of new tokens over paged keys and values, with shared prefixes.

A query of a row sees the valid prefix tokens of the row's group and the row's own new tokens up to
itself; with a sliding window, only the last `window` of those positions, its own included. The new
tokens' keys and values must be in their slots already.

`plan_attention` does what depends on the batch alone (tiles, gather indices, masks), once per
forward; `attend` is then called for each layer. `paged_attention` is both in one stateless
operator.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stars_fast.ops.backend import uses_triton
from stars_fast.ops.batch import BatchLike, RowBatch
from stars_fast.ops.tiling import IntArray, Tile, prefix_slots, tile_rows

# Rows of a block see each other's keys masked out, so blocks stay short against a usual prefix.
_MAX_BLOCK_TOKENS = 128
_MAX_SCORES = 1 << 24  # elements of a score matrix held at once (64 MiB in float32)


class AttentionOptions(NamedTuple):
    """What attention of a layer takes beside tensors and the batch.

    Attributes
    ----------
    scaling : float
        Factor on the scores.
    window : int
        Sliding window in tokens, the query's own included; 0 is off.
    softcap : float
        See `attention_weights`; 0 is off.
    sinks : Tensor or None
        ``[heads]``, see `attention_weights`.
    """

    scaling: float
    window: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None


@dataclass
class _TilePlan:
    """One tile's indices; masks are made once per window and kept."""

    query_index: Tensor  # int64 [B, Q], packed query of each tile query; padding repeats query 0
    query_valid: Tensor  # bool [B, Q]
    key_slots: Tensor  # int64 [B, S]
    query_position: Tensor  # int64 [B, Q]
    key_position: Tensor  # int64 [B, S]
    query_row: Tensor  # int64 [B, Q], row within the block
    key_row: Tensor  # int64 [B, S], row within the block; -1 prefix, -2 padding
    masks: dict[int, Tensor] = field(default_factory=dict)

    def mask(self, window: int, dtype: torch.dtype) -> Tensor:
        """Additive mask ``[B, 1, Q, S]``: 0 where a query sees a key, -inf elsewhere."""
        if window not in self.masks:
            q_row, k_row = self.query_row.unsqueeze(2), self.key_row.unsqueeze(1)
            q_pos, k_pos = self.query_position.unsqueeze(2), self.key_position.unsqueeze(1)
            seen = ((k_row == -1) | (k_row == q_row)) & (k_pos <= q_pos)
            if window > 0:
                seen &= k_pos > q_pos - window
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            self.masks[window] = mask.masked_fill_(~seen, -torch.inf).unsqueeze(1)
        return self.masks[window]


@dataclass(frozen=True)
class AttentionPlan:
    """What `attend` needs to know of a batch; valid for every layer of one forward."""

    tiles: list[_TilePlan]
    num_queries: int
    in_order: bool  # the only tile holds every query in packed order, without padding


def plan_attention(
    batch: BatchLike, query_lengths: IntArray, *, page_size: int, device: torch.device
) -> AttentionPlan:
    """Lay out the attention of a batch.

    `query_lengths`, ``[R]``, is how many of each row's new tokens, the last ones, are queries.
    """
    query_end = np.cumsum(query_lengths, dtype=np.int64)
    tiles = tile_rows(
        batch.row_group, batch.row_start, batch.new_lengths, max_block_tokens=_MAX_BLOCK_TOKENS
    )
    plans = []
    in_order = len(tiles) == 1
    for tile in tiles:
        arrays = _tile_indices(tile, batch, query_lengths, query_end, page_size)
        valid = arrays[1]
        in_order = in_order and bool(valid.all())
        q_index, q_valid, slots_, q_position, k_position, q_row, k_row = (
            torch.from_numpy(array).to(device) for array in arrays
        )
        plans.append(_TilePlan(q_index, q_valid, slots_, q_position, k_position, q_row, k_row))
    total = int(query_end[-1]) if len(query_end) else 0
    return AttentionPlan(tiles=plans, num_queries=total, in_order=in_order)


def _tile_indices(
    tile: Tile,
    batch: BatchLike,
    query_lengths: IntArray,
    query_end: IntArray,
    page_size: int,
) -> tuple[np.ndarray, ...]:
    """The fields of `_TilePlan` for one tile, in order."""
    # Padding, of rows and of keys, repeats the block's first row: masking hides finite numbers
    # only, so no block may read a key that another request wrote.
    real = tile.rows >= 0
    rows = np.where(real, tile.rows, tile.rows[:, :1])
    blocks, per_block = rows.shape
    start = batch.row_start[rows].astype(np.int64)[:, :, None]
    new = batch.new_lengths[rows].astype(np.int64)[:, :, None]
    asked = query_lengths[rows].astype(np.int64)[:, :, None]
    block_row = np.broadcast_to(np.arange(per_block)[None, :, None], (blocks, per_block, 1))

    # Queries: the last `asked` of a row's new tokens.
    step = np.arange(int(asked.max()), dtype=np.int64)
    query_valid = (step < asked) & real[:, :, None]
    query_index = np.where(query_valid, query_end[rows][:, :, None] - asked + step, 0)
    query_position = start + new - asked + np.minimum(step, asked - 1)
    query_row = np.broadcast_to(block_row, query_index.shape)

    # Keys: the group's prefix once per block, then each row's new tokens.
    own = np.arange(int(new.max()), dtype=np.int64)
    slots = batch.slots[rows]
    own_valid = (own < new) & real[:, :, None]
    own_slots = np.where(own_valid, slots[:, :, : len(own)], slots[:, :, :1])
    own_row = np.where(own_valid, block_row, -2)
    lengths = start[:, 0, 0]
    width = int(lengths.max())
    prefix = prefix_slots(batch, tile.groups, lengths, page_size, width)
    prefix = np.where(lengths[:, None] > 0, prefix, own_slots[:, 0, :1])
    position = np.arange(width, dtype=np.int64)
    prefix_row = np.where(position < lengths[:, None], -1, -2)
    prefix_position = np.broadcast_to(position, prefix.shape)

    def flat(array: np.ndarray) -> np.ndarray:
        return np.array(array.reshape(blocks, -1))  # a copy: some are read-only broadcasts

    return (
        flat(query_index),
        flat(query_valid),
        np.concatenate((prefix, flat(own_slots)), axis=1),
        flat(query_position),
        np.concatenate((prefix_position, flat(start + own)), axis=1),
        flat(query_row),
        np.concatenate((prefix_row, flat(own_row)), axis=1),
    )


def attend(
    plan: AttentionPlan,
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    options: AttentionOptions,
) -> Tensor:
    """Attention of one layer under a plan; tensors and result as in `paged_attention`."""
    k_flat, v_flat = k_pages.flatten(0, 1), v_pages.flatten(0, 1)
    outputs = []
    for tile in plan.tiles:
        q = query
        if not plan.in_order:
            q = query.index_select(0, tile.query_index.flatten())
        q = q.reshape(*tile.query_index.shape, *query.shape[1:])
        slots = tile.key_slots.flatten()
        k = k_flat.index_select(0, slots).view(*tile.key_slots.shape, *k_flat.shape[1:])
        v = v_flat.index_select(0, slots).view(*tile.key_slots.shape, *v_flat.shape[1:])
        mask = tile.mask(options.window, query.dtype)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, heads, tokens, head_dim]
        if options.softcap > 0 or options.sinks is not None:
            out = _explicit_attention(q, k, v, mask, options)
        else:
            grouped = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=options.scaling, enable_gqa=grouped
            )
        outputs.append(out.transpose(1, 2))
    if plan.in_order:
        return outputs[0].flatten(0, 1)
    result = query.new_empty((plan.num_queries, query.shape[1], v_pages.shape[-1]))
    for tile, out in zip(plan.tiles, outputs, strict=True):
        result[tile.query_index[tile.query_valid]] = out[tile.query_valid]
    return result


def _explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: AttentionOptions
) -> Tensor:
    """Attention with explicit scores ``[B, heads, Q, S]``, some queries at a time."""
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    k = k.unsqueeze(2)  # [B, kv_heads, 1, S, D], broadcast over the heads of a group
    v = v.unsqueeze(2)
    q = q.reshape(batch, kv_heads, heads // kv_heads, queries, -1)
    sinks = None if options.sinks is None else options.sinks.view(kv_heads, -1, 1, 1)
    step = max(1, _MAX_SCORES // max(1, batch * heads * keys))
    parts = []
    for first in range(0, queries, step):
        part = slice(first, first + step)
        scores = torch.matmul(q[..., part, :], k.transpose(-1, -2)) * options.scaling
        weights = attention_weights(
            scores,
            softcap=options.softcap,
            mask=mask[:, :, None, part],
            sinks=sinks,
        )
        parts.append(torch.matmul(weights, v))
    return torch.cat(parts, dim=-2).flatten(1, 2)


def attention_weights(
    scores: Tensor, *, softcap: float, mask: Tensor | None, sinks: Tensor | None
) -> Tensor:
    """Softmax of attention scores, in float32, returned in the dtype of `scores`.

    Parameters
    ----------
    scores : Tensor
        ``[..., S]``, scaled; overwritten.
    softcap : float
        Scores become ``softcap * tanh(scores / softcap)`` before the mask; 0 is off (Gemma 2,
        arXiv 2408.00118, section 2).
    mask : Tensor or None
        Additive, broadcast with `scores`.
    sinks : Tensor or None
        ``[..., 1]``, broadcast with `scores`: a logit that takes part in the softmax and in
        nothing else, per head (gpt-oss, arXiv 2508.10925, section 2.2).
    """
    if softcap > 0:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores = scores.add_(mask)
    if sinks is None:
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
    column = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    joint = torch.softmax(torch.cat((scores, column), dim=-1), dim=-1, dtype=torch.float32)
    return joint[..., :-1].to(scores.dtype)


@torch.library.custom_op("stars_fast::paged_attention", mutates_args=())
def paged_attention(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    group_pages: Tensor,
    padding_start: Tensor,
    padding_end: Tensor,
    row_group: Tensor,
    row_start: Tensor,
    new_lengths: Tensor,
    query_lengths: Tensor,
    slots: Tensor,
    scaling: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of the last new tokens of each row over prefix and new tokens.

    Extend is ``query_lengths == new_lengths``; step j of a decode is ``query_lengths == 1`` and
    ``new_lengths == j + 1``.

    Parameters
    ----------
    query : Tensor
        ``[T, heads, head_dim]``, row-major, ``T = query_lengths.sum()``.
    k_pages, v_pages : Tensor
        ``[num_pages, page_size, kv_heads, head_dim]``, the new tokens included; `heads` is a
        multiple of `kv_heads`, and the two head dimensions may differ.
    group_pages : Tensor
        int32 ``[G, P]``, the groups' page tables, padded with 0.
    padding_start, padding_end : Tensor
        int32 ``[G]``, table slots that hold nothing, see `stars_fast.ops.batch`.
    row_group : Tensor
        int32 ``[R]``, group of each row; rows of a group are adjacent.
    row_start : Tensor
        int32 ``[R]``, prefix tokens of the row's group = position of the row's first new token.
    new_lengths : Tensor
        int32 ``[R]``, new tokens of each row, 1 to L.
    query_lengths : Tensor
        int32 ``[R]``, how many of them, the last ones, are queries, 1 to ``new_lengths``.
    slots : Tensor
        int64 ``[R, L]``, slots of the new tokens.
    scaling, window, softcap, sinks
        As in `AttentionOptions`.

    Returns
    -------
    Tensor
        ``[T, heads, head_dim of v_pages]`` in the dtype of `query`; the softmax is in float32.
    """
    tables = (
        group_pages, padding_start, padding_end, row_group, row_start, new_lengths, slots,
    )  # fmt: skip
    batch = RowBatch(*(table.cpu().numpy() for table in tables))
    asked = query_lengths.cpu().numpy()
    options = AttentionOptions(scaling, window, softcap, sinks)
    if uses_triton(query.device):
        from stars_fast.kernels import paged_attention as kernel

        return kernel(query, k_pages, v_pages, batch, asked, options)
    plan = plan_attention(batch, asked, page_size=k_pages.shape[1], device=query.device)
    return attend(plan, query, k_pages, v_pages, options).contiguous()


@paged_attention.register_fake
def _(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    group_pages: Tensor,
    padding_start: Tensor,
    padding_end: Tensor,
    row_group: Tensor,
    row_start: Tensor,
    new_lengths: Tensor,
    query_lengths: Tensor,
    slots: Tensor,
    scaling: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[1], v_pages.shape[-1]))
