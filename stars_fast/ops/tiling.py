"""Arranging ragged rows into few dense tiles, so that attention needs no loop over rows.

A *row* has new tokens and reads the prefix of its *group*. A *block* is up to `b` rows of one
group that read the prefix together; a *tile* is a set of blocks of the same `b`, computed as one
dense batch. Rows of very different lengths go to different tiles, so that padding costs at most a
constant factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stars_fast.ops.batch import BatchLike

IntArray = NDArray[np.integer]

_MAX_PADDING = 1.5  # computed rows per real row
_SHORT_PREFIX = 128  # prefixes up to here share a tile; beyond, those within a factor of 4
_SHORT_NEW = 32  # likewise for new tokens, within a factor of 2, as their cost is quadratic


@dataclass(frozen=True)
class Tile:
    """Rows computed as one dense batch.

    Attributes
    ----------
    rows : ndarray
        int64 ``[B, b]``, row numbers; -1 is padding.
    groups : ndarray
        int64 ``[B]``, the group whose prefix each block reads.
    """

    rows: NDArray[np.int64]
    groups: NDArray[np.int64]


def tile_rows(
    row_group: IntArray, prefix: IntArray, new: IntArray, *, max_block_tokens: int
) -> list[Tile]:
    """Arrange rows into tiles.

    Parameters
    ----------
    row_group : ndarray
        ``[R]``, group of each row; rows of a group are adjacent.
    prefix : ndarray
        ``[R]``, valid prefix tokens of each row's group.
    new : ndarray
        ``[R]``, new tokens of each row, >= 1.
    max_block_tokens : int
        Largest number of rows per block times new tokens per row (one row is always allowed).

    Returns
    -------
    list of Tile
        Every row in exactly one tile, in ascending order within each.
    """
    prefix_class = np.ceil(np.log2(np.maximum(prefix, _SHORT_PREFIX) / _SHORT_PREFIX) / 2)
    new_class = np.ceil(np.log2(np.maximum(new, _SHORT_NEW) / _SHORT_NEW))
    # Classes stay far below 64, so one number holds both.
    tile_class = (prefix_class * 64 + new_class).astype(np.int64)
    tiles = []
    for number in np.unique(tile_class):
        rows = np.flatnonzero(tile_class == number)
        limit = max(1, max_block_tokens // int(new[rows].max()))
        # An empty prefix has nothing to share.
        tiles.append(_blocks(rows, row_group[rows], limit if prefix[rows].any() else 1))
    return tiles


def _blocks(rows: NDArray[np.int64], group: IntArray, limit: int) -> Tile:
    """Cut the rows of one tile into blocks of at most `limit` rows of one group."""
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    counts = np.diff(starts, append=len(rows))
    size = int(min(counts.max(), limit))
    while size > 1 and (-(-counts // size)).sum() * size > _MAX_PADDING * len(rows):
        size //= 2
    blocks_per_group = -(-counts // size)
    block_groups = np.repeat(group[starts], blocks_per_group).astype(np.int64)
    rank = np.arange(len(rows)) - np.repeat(starts, counts)
    first_block = np.cumsum(blocks_per_group) - blocks_per_group
    out = np.full((len(block_groups), size), -1, dtype=np.int64)
    out[np.repeat(first_block, counts) + rank // size, rank % size] = rows
    return Tile(rows=out, groups=block_groups)


def prefix_slots(
    batch: BatchLike, groups: IntArray, lengths: IntArray, page_size: int, width: int
) -> NDArray[np.int64]:
    """Slots of the prefix tokens of some groups, in order of position.

    Parameters
    ----------
    batch : BatchLike
        Its groups' page tables and padding are read.
    groups : ndarray
        ``[B]``, the groups wanted.
    lengths : ndarray
        ``[B]``, valid prefix tokens of each.
    page_size : int
        Tokens per page.
    width : int
        Number of positions, at least ``lengths.max()``.

    Returns
    -------
    ndarray
        int64 ``[B, width]``. Past a group's own length its last token is repeated, so that
        padding never reads what another request wrote; an empty prefix gives slot 0.
    """
    if width == 0:
        return np.zeros((len(groups), 0), dtype=np.int64)
    last = np.maximum(lengths.astype(np.int64) - 1, 0)[:, None]
    position = np.minimum(np.arange(width, dtype=np.int64)[None, :], last)
    start = batch.padding_start[groups].astype(np.int64)[:, None]
    gap = batch.padding_end[groups].astype(np.int64)[:, None] - start
    index = np.where(lengths[:, None] > 0, position + np.where(position >= start, gap, 0), 0)
    tables = batch.group_pages[groups].astype(np.int64)
    page = np.take_along_axis(tables, index // page_size, axis=1)
    return np.where(lengths[:, None] > 0, page * page_size + index % page_size, 0)
