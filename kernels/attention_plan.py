"""Which program of the attention kernel does what: planned on the host, kept on the device.

Packed queries lie row after row, and rows of a group are adjacent. A *tile* is consecutive queries
of rows of one group, as many as share one matrix product: short rows together, a long row in
pieces of its own. The group's prefix is cut into *splits* of a fixed number of tokens. An *item*
is one tile with one split of its prefix, with its rows' own tokens, or with both. A tile of one
item is written out directly; otherwise each item writes a *partial* (the normalised output and its
log-sum-exp) per query, and a *merge* joins the partials of a query. A plan of the prefixes alone
leaves the rows' own tokens to others, whose result every query's merge takes in.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from stars_fast.ops.batch import BatchLike

IntArray = NDArray[np.integer]

#: Rows of the matrix product of a tile: queries times the query heads of a KV head.
BLOCK_ROWS = (16, 64, 128)


@dataclass(frozen=True)
class Items:
    """Work lists of one batch.

    Attributes
    ----------
    items
        int32 ``[W, 8]``, the costliest first: group, first packed query, number of queries, first
        row, end row (equal: without the rows' own tokens), prefix begin, prefix end, first partial
        or -1. The i-th query's partial is the first plus i.
    merges
        int32 ``[X, 4]``: packed query, its first partial, number of partials, distance between
        them.
    num_partials
        Partials of all items.
    """

    items: NDArray[np.int32]
    merges: NDArray[np.int32]
    num_partials: int


def plan_items(
    row_group: IntArray,
    row_start: IntArray,
    new_lengths: IntArray,
    query_lengths: IntArray,
    *,
    heads_per_kv: int,
    block_m: int,
    split_tokens: int | None,
    prefix_only: bool = False,
) -> Items:
    """Cut a batch into items; every query meets each of its keys in exactly one.

    Parameters
    ----------
    row_group, row_start, new_lengths, query_lengths : ndarray
        ``[R]``, as in `stars_fast.ops.paged_attention`. Of a round of decode steps,
        `new_lengths` are those at its end.
    heads_per_kv : int
        Query heads of a KV head.
    block_m : int
        One of `BLOCK_ROWS`.
    split_tokens : int or None
        Prefix tokens of a split; None does not split. A tile whose rows' own tokens are more than
        that has items for them alone, some rows each.
    prefix_only : bool
        No item has own tokens, each has partials, and each query a merge, of none where its row has
        no prefix.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """
    block_q = queries_per_tile(heads_per_kv, block_m)
    if split_tokens is not None and split_tokens < 1:
        raise ValueError(f"split_tokens must be None or at least 1, got {split_tokens}")
    if len(row_group) == 0:
        return Items(np.zeros((0, 8), np.int32), np.zeros((0, 4), np.int32), 0)
    query_end = np.cumsum(query_lengths, dtype=np.int64)
    query_begin = query_end - query_lengths
    row, end_row = _tile_rows(row_group, query_lengths, query_end, block_q)
    longest = np.maximum.reduceat(new_lengths, row).astype(np.int64)

    pieces = np.where(end_row - row == 1, -(-query_lengths[row] // block_q), 1)
    piece = _ragged_arange(pieces)
    row, end_row, longest = (np.repeat(x, pieces) for x in (row, end_row, longest))
    query = query_begin[row] + piece * block_q
    queries = np.minimum(query_end[end_row - 1] - query, block_q)
    # A piece of a long row sees its own tokens up to its last query.
    longest -= query_end[end_row - 1] - query - queries

    prefix = row_start[row].astype(np.int64)
    split = int(prefix.max()) + 1 if split_tokens is None else split_tokens
    splits = -(-prefix // split)
    rows_per_item = np.full_like(row, len(row_group))
    if split_tokens is not None:
        rows_per_item = np.maximum(1, split_tokens // longest)
    own_items = -(-(end_row - row) // rows_per_item)
    apart = (own_items > 1) | prefix_only
    own_items *= apart & (not prefix_only)
    prefix_items = np.where(apart, splits, np.maximum(1, splits))
    partials = prefix_items + (own_items > 0)
    if not prefix_only:
        partials = np.where(partials > 1, partials, 0)
    base = np.cumsum(partials * queries) - partials * queries

    # Items with a split of the prefix; the last also has the own tokens, unless they are apart.
    tile = np.repeat(np.arange(len(row)), prefix_items)
    number = _ragged_arange(prefix_items)
    own = ~apart[tile] & (number == prefix_items[tile] - 1)
    begin = number * split
    end = np.minimum(begin + split, prefix[tile])
    last_row = np.where(own, end_row[tile], row[tile])
    at = np.where(partials[tile] > 0, base[tile] + number * queries[tile], -1)
    cost = end - begin + own * (end_row - row)[tile] * longest[tile]
    columns = [
        (row_group[row[tile]], query[tile], queries[tile], row[tile], last_row, begin, end, at)
    ]

    # Items with some rows' own tokens alone.
    tile = np.repeat(np.arange(len(row)), own_items)
    first = row[tile] + _ragged_arange(own_items) * rows_per_item[tile]
    last = np.minimum(first + rows_per_item[tile], end_row[tile])
    begin = query_begin[first]
    done = prefix_items[tile] * queries[tile] + begin - query[tile]
    at = np.where(partials[tile] > 0, base[tile] + done, -1)
    none = np.zeros_like(first)
    columns.append(
        (row_group[first], begin, query_end[last - 1] - begin, first, last, none, none, at)
    )
    cost = np.concatenate((cost, (last - first) * longest[tile]))

    items = np.concatenate([np.stack(x, axis=1) for x in columns])
    joined = np.where((partials > 0) | prefix_only, queries, 0)
    merged = np.repeat(np.arange(len(row)), joined)
    rank = _ragged_arange(joined)
    merges = np.stack(
        (query[merged] + rank, base[merged] + rank, partials[merged], queries[merged]), axis=1
    )
    return Items(
        items=items[np.argsort(-cost, kind="stable")].astype(np.int32),
        merges=merges.astype(np.int32),
        num_partials=int((partials * queries).sum()),
    )


def queries_per_tile(heads_per_kv: int, block_m: int) -> int:
    """Queries of a full tile; with more heads than rows, a tile of one query is done in parts."""
    if block_m not in BLOCK_ROWS:
        raise ValueError(f"block_m must be one of {BLOCK_ROWS}, got {block_m}")
    if heads_per_kv < 1:
        raise ValueError(f"heads_per_kv must be at least 1, got {heads_per_kv}")
    return max(1, block_m // heads_per_kv)


def _tile_rows(
    row_group: IntArray, query_lengths: IntArray, query_end: IntArray, block_q: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and end row of each tile; a row of more than `block_q` queries is alone."""
    rows = len(row_group)
    long = query_lengths > block_q
    cut = np.ones(rows + 1, dtype=bool)
    cut[1:-1] = (row_group[1:] != row_group[:-1]) | long[1:] | long[:-1]
    cuts = np.flatnonzero(cut)
    next_cut = cuts[np.searchsorted(cuts, np.arange(rows), side="right")]
    fits = np.searchsorted(query_end, query_end - query_lengths + block_q, side="right")
    end = np.where(long, np.arange(1, rows + 1), np.minimum(next_cut, fits)).tolist()
    first, at = [], 0
    while at < rows:
        first.append(at)
        at = end[at]
    begin = np.array(first, dtype=np.int64)
    return begin, np.append(begin[1:], rows)


def _ragged_arange(lengths: IntArray) -> NDArray[np.int64]:
    """``[0 .. lengths[0]-1, 0 .. lengths[1]-1, ...]``."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


@dataclass(frozen=True)
class PlanCapacity:
    """Most of each thing that a plan's buffers hold.

    Attributes
    ----------
    queries, rows, groups
        T, R and G.
    pages
        Entries of all page tables, G times P.
    own
        L, new tokens of a row.
    items, merges, partials
        See `Items`; `items` includes those of padding queries.
    """

    queries: int
    rows: int
    groups: int
    pages: int
    own: int
    items: int
    merges: int
    partials: int

    @classmethod
    def of_decode(
        cls,
        *,
        rows: int,
        groups: int,
        pages: int,
        own: int,
        max_prefix: int,
        heads_per_kv: int,
        block_m: int,
        split_tokens: int | None,
    ) -> PlanCapacity:
        """Enough for any round of up to `rows` rows with one query each.

        `max_prefix` is the longest prefix in tokens; the others as in `PlanCapacity` and
        `plan_items`.
        """
        block_q = queries_per_tile(heads_per_kv, block_m)
        splits = 1 if split_tokens is None else -(-max_prefix // split_tokens) + 1
        # Every group begins a tile, and so may the rows that no group needed.
        tiles = min(rows, groups + rows // block_q + 1)
        return cls(
            queries=rows,
            rows=rows,
            groups=groups,
            pages=pages,
            own=own,
            items=tiles * splits + rows,
            merges=rows,
            partials=rows * splits if splits > 1 else 0,
        )


@dataclass(frozen=True)
class AttentionPlan:
    """The batch of an attention call as the kernel reads it: device tensors of fixed capacity.

    The tensors are views of one buffer and never move, so a CUDA graph that captured a call stays
    valid over `write`. Between writes, device code may advance `query_own` (a decode step adds
    one): a query sees its row's own tokens up to that index.

    Attributes
    ----------
    heads_per_kv, block_m, split_tokens, prefix_only
        As in `plan_items`.
    capacity : PlanCapacity
    buffer : Tensor
        int32, holds all others.
    items, num_items, merges, num_merges : Tensor
        See `Items`; int32 ``[W, 8]``, ``[1]``, ``[X, 4]``, ``[1]``.
    group_pages, page_offset : Tensor
        int32 ``[pages]``, the groups' page tables, and int32 ``[G]``, where each begins.
    padding_start, padding_end : Tensor
        int32 ``[G]``.
    row_start, row_query : Tensor
        int32 ``[R]``; the latter is the row's last packed query.
    slots : Tensor
        int64 ``[R, L]``.
    query_row, query_own : Tensor
        int32 ``[T]``, row of each packed query and its index among the row's own tokens.
    """

    heads_per_kv: int
    block_m: int
    split_tokens: int | None
    capacity: PlanCapacity
    buffer: Tensor
    items: Tensor
    num_items: Tensor
    merges: Tensor
    num_merges: Tensor
    group_pages: Tensor
    page_offset: Tensor
    padding_start: Tensor
    padding_end: Tensor
    row_start: Tensor
    row_query: Tensor
    slots: Tensor
    query_row: Tensor
    query_own: Tensor
    prefix_only: bool = False

    @classmethod
    def allocate(
        cls,
        capacity: PlanCapacity,
        *,
        heads_per_kv: int,
        block_m: int,
        split_tokens: int | None,
        device: torch.device,
        prefix_only: bool = False,
    ) -> AttentionPlan:
        """Return a plan without work, for `write`."""
        queries_per_tile(heads_per_kv, block_m)
        size = sum(_aligned(count) for count in _layout(capacity).values())
        buffer = torch.zeros(size, dtype=torch.int32, device=device)
        return cls(
            heads_per_kv=heads_per_kv,
            block_m=block_m,
            split_tokens=split_tokens,
            prefix_only=prefix_only,
            capacity=capacity,
            buffer=buffer,
            **_views(buffer, capacity),
        )

    @classmethod
    def build(
        cls,
        batch: BatchLike,
        query_lengths: IntArray,
        *,
        heads_per_kv: int,
        block_m: int,
        split_tokens: int | None,
        device: torch.device,
        prefix_only: bool = False,
    ) -> AttentionPlan:
        """Return a plan that just holds one batch, the last `query_lengths` tokens of each row.

        Raises
        ------
        ValueError
            As `plan_items`.
        """
        items = plan_items(
            batch.row_group, batch.row_start, batch.new_lengths, query_lengths,
            heads_per_kv=heads_per_kv, block_m=block_m, split_tokens=split_tokens,
            prefix_only=prefix_only,
        )  # fmt: skip
        capacity = PlanCapacity(
            queries=int(query_lengths.sum()),
            rows=batch.num_rows,
            groups=batch.num_groups,
            pages=batch.group_pages.size,
            own=batch.max_new,
            items=len(items.items),
            merges=len(items.merges),
            partials=items.num_partials,
        )
        plan = cls.allocate(
            capacity, heads_per_kv=heads_per_kv, block_m=block_m, split_tokens=split_tokens,
            device=device, prefix_only=prefix_only,
        )  # fmt: skip
        plan._store(items, batch, query_lengths, None)
        return plan

    def write(
        self,
        batch: BatchLike,
        query_lengths: IntArray,
        *,
        query_own: IntArray | None = None,
    ) -> None:
        """Replace the batch, in stream order; queries past it get an output of zeros.

        Parameters
        ----------
        batch : BatchLike
            Its new tokens include those that `query_own` will reach.
        query_lengths : ndarray
            ``[R]``, how many of each row's new tokens, the last ones, are queries.
        query_own : ndarray or None
            ``[T]``, index of each query among its row's own tokens, to begin with; None is the
            row's last ones.

        Raises
        ------
        ValueError
            If the batch exceeds the capacity; the plan is unchanged then.
        """
        items = plan_items(
            batch.row_group, batch.row_start, batch.new_lengths, query_lengths,
            heads_per_kv=self.heads_per_kv, block_m=self.block_m, split_tokens=self.split_tokens,
            prefix_only=self.prefix_only,
        )  # fmt: skip
        self._store(items, batch, query_lengths, query_own)

    def _store(
        self,
        items: Items,
        batch: BatchLike,
        query_lengths: IntArray,
        query_own: IntArray | None,
    ) -> None:
        """Write a planned batch through one copy to the device."""
        rows, groups = batch.num_rows, batch.num_groups
        row_query = np.cumsum(query_lengths, dtype=np.int64) - 1
        queries = int(row_query[-1]) + 1 if rows else 0
        work = np.concatenate((items.items, self._padding(queries)))
        held = PlanCapacity(
            queries=queries,
            rows=rows,
            groups=groups,
            pages=batch.group_pages.size,
            own=batch.max_new,
            items=len(work),
            merges=len(items.merges),
            partials=items.num_partials,
        )
        for field in fields(held):
            count, most = getattr(held, field.name), getattr(self.capacity, field.name)
            if count > most:
                raise ValueError(f"{field.name} must be at most {most} in this plan, got {count}")
        if query_own is None:
            query_own = _ragged_arange(query_lengths)
            query_own += np.repeat(batch.new_lengths - query_lengths, query_lengths)

        # A buffer of its own for each write: an earlier one may still be on its way. PyTorch's
        # pool of pinned memory hands none out again before its copy is done.
        pinned = self.buffer.device.type == "cuda"
        staging = torch.zeros(self.buffer.shape, dtype=torch.int32, pin_memory=pinned)
        views = {name: view.numpy() for name, view in _views(staging, self.capacity).items()}
        views["items"][: len(work)] = work
        views["num_items"][0] = len(work)
        views["merges"][: held.merges] = items.merges
        views["num_merges"][0] = held.merges
        views["group_pages"][: held.pages] = batch.group_pages.ravel()
        views["page_offset"][:groups] = np.arange(groups) * batch.group_pages.shape[1]
        views["padding_start"][:groups] = batch.padding_start
        views["padding_end"][:groups] = batch.padding_end
        views["row_start"][:rows] = batch.row_start
        views["row_query"][:rows] = row_query
        views["slots"][:rows, : held.own] = batch.slots
        views["query_row"][:queries] = np.repeat(np.arange(rows), query_lengths)
        views["query_own"][:queries] = query_own
        self.buffer.copy_(staging, non_blocking=True)

    def _padding(self, queries: int) -> NDArray[np.int32]:
        """Items that see nothing, for the queries of the capacity past the first ones."""
        step = queries_per_tile(self.heads_per_kv, self.block_m)
        first = np.arange(queries, self.capacity.queries, step)
        items = np.zeros((len(first), 8), dtype=np.int32)
        items[:, 1] = first
        items[:, 2] = np.minimum(step, self.capacity.queries - first)
        items[:, 7] = -1
        return items


def _layout(capacity: PlanCapacity) -> dict[str, int]:
    """Length of each array of a plan in int32 words, in the order of the buffer."""
    return {
        "slots": 2 * capacity.rows * capacity.own,
        "items": 8 * capacity.items,
        "num_items": 1,
        "merges": 4 * capacity.merges,
        "num_merges": 1,
        "group_pages": capacity.pages,
        "page_offset": capacity.groups,
        "padding_start": capacity.groups,
        "padding_end": capacity.groups,
        "row_start": capacity.rows,
        "row_query": capacity.rows,
        "query_row": capacity.queries,
        "query_own": capacity.queries,
    }


def _aligned(count: int) -> int:
    """Words that an array takes: Triton recompiles for pointers not aligned to 16 bytes."""
    return -(-count // 4) * 4


def _views(buffer: Tensor, capacity: PlanCapacity) -> dict[str, Tensor]:
    """The arrays of a plan within its buffer."""
    views, at = {}, 0
    for name, count in _layout(capacity).items():
        views[name] = buffer[at : at + count]
        at += _aligned(count)
    views["slots"] = views["slots"].view(torch.int64).view(capacity.rows, capacity.own)
    views["items"] = views["items"].view(-1, 8)
    views["merges"] = views["merges"].view(-1, 4)
    return views
