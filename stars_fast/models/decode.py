"""Attention of the decode steps of one round, on dense copies of what the round reads.

A round's prefixes do not change while it drafts. So each layer's prefixes are gathered from the
pages once per round, and a step appends one key and value per row to a dense *suffix* beside them.
A step is then a few batched products and a softmax per layer, with no gather and no loop over
rows. The new keys and values go to their pages as well, which stay the only lasting store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from stars_fast.models.probe import LayerLayout
from stars_fast.ops.attention import AttentionOptions, attention_weights
from stars_fast.ops.batch import BatchLike
from stars_fast.ops.fused import Rotary, rotate
from stars_fast.ops.tiling import Tile, prefix_slots, tile_rows

_NO_LIMIT = 1 << 30  # suffixes are read row by row, so a long block costs nothing


class Workspace:
    """Flat buffers by name that grow geometrically and serve every round again."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, numel: int, like: Tensor) -> Tensor:
        """Buffer of `numel` elements, dtype and device of `like`; finite, otherwise unspecified."""
        held = self._buffers.get(name)
        if held is None or held.numel() < numel:
            size = numel if held is None else max(numel, held.numel() * 3 // 2)
            held = like.new_zeros(size)
            self._buffers[name] = held
        return held[:numel]


@dataclass(frozen=True)
class _Dense:
    """Keys (or values) of one layer for the blocks of a tile.

    With one row per block, prefix and suffix are two parts of `whole`, so that one product reads
    both; with more, the rows of a block read its prefix together and their suffixes apart.
    """

    prefix: Tensor  # [B * kv_heads, P, dim]
    suffix: Tensor  # [B * kv_heads * b, L, dim]
    whole: Tensor | None  # [B * kv_heads, P + L, dim]
    steps: Tensor  # the suffix as [B, kv_heads, b, L, dim]


@dataclass
class _Part:
    """The rows of one tile: B blocks of b rows, with prefixes of up to P tokens."""

    blocks: int
    per_block: int
    prefix: int
    lengths: Tensor  # int64 [B], prefix tokens of each block
    ragged: bool  # some prefix is shorter than P
    empty: Tensor | None  # int64, blocks without any prefix
    gather: Tensor  # int64 [B * P], slots of the prefix tokens
    rows: Tensor | None  # int64 [B * b], rows to pick, padding included; None: all, in order
    real: Tensor | None  # int64, places in `rows` that are not padding; None: all
    keys: list[_Dense] = field(default_factory=list)
    values: list[_Dense] = field(default_factory=list)
    masks: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)


class DecodeAttention:
    """The `LayerAttention` of one round; call `begin_step` before each step's forward.

    Reads the pages once, when made; each step writes its tokens to the batch's slots.

    Parameters
    ----------
    batch : BatchLike
        Not read after construction.
    layouts : list of LayerLayout
        One per layer.
    k_pages, v_pages : list of Tensor
        Pools ``[num_pages, page_size, kv_heads, head_dim]``, one per layer.
    workspace : Workspace
        Belongs to this round until the next one is made from it.
    """

    def __init__(
        self,
        batch: BatchLike,
        layouts: Sequence[LayerLayout],
        k_pages: list[Tensor],
        v_pages: list[Tensor],
        workspace: Workspace,
    ) -> None:
        self._layouts = layouts
        self._k_pages = [pages.flatten(0, 1) for pages in k_pages]  # by slot
        self._v_pages = [pages.flatten(0, 1) for pages in v_pages]
        device = k_pages[0].device
        self._slots = torch.from_numpy(batch.slots.T.copy()).to(device)  # [L, R]
        tiles = tile_rows(
            batch.row_group, batch.row_start, np.ones_like(batch.row_start),
            max_block_tokens=_NO_LIMIT,
        )  # fmt: skip
        page_size = k_pages[0].shape[1]
        self._parts = [_part(tile, batch, page_size, len(tiles) == 1, device) for tile in tiles]
        for number, part in enumerate(self._parts):
            for layer in range(len(layouts)):
                for name, pages, dense in (
                    ("k", k_pages[layer], part.keys),
                    ("v", v_pages[layer], part.values),
                ):
                    dense.append(
                        _load(part, f"{name}/{layer}/{number}", pages, batch.max_new, workspace)
                    )
        self._step = 0
        self._layer = 0

    def begin_step(self, step: int) -> None:
        """Start step `step`, counted from 0, of the round; steps run in order."""
        self._step = step
        self._layer = 0
        for part in self._parts:
            part.masks.clear()

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
        """Attention of the next layer, see `LayerAttention`; one query per row."""
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        layer = self._layer
        self._layer += 1
        k_pages, v_pages = self._k_pages[layer], self._v_pages[layer]
        key, value = key.to(k_pages.dtype), value.to(v_pages.dtype)
        slots = self._slots[self._step]
        k_pages.index_copy_(0, slots, key)
        v_pages.index_copy_(0, slots, value)
        options = AttentionOptions(scaling, self._layouts[layer].window, softcap, sinks)
        result = None
        for part in self._parts:
            if part.rows is None:
                return self._attend(part, layer, query, key, value, options)
            q, k, v = (x.index_select(0, part.rows) for x in (query, key, value))
            out = self._attend(part, layer, q, k, v, options)
            if result is None:
                result = out.new_empty((query.shape[0], *out.shape[1:]))
            if part.real is None:
                result.index_copy_(0, part.rows, out)
            else:
                rows = part.rows.index_select(0, part.real)
                result.index_copy_(0, rows, out.index_select(0, part.real))
        assert result is not None  # a batch has at least one row
        return result

    def _attend(
        self,
        part: _Part,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
    ) -> Tensor:
        """Append to a part's suffixes and attend; ``[B * b, heads, dim]`` in and out."""
        blocks, per_block, step = part.blocks, part.per_block, self._step
        keys, values = part.keys[layer], part.values[layer]
        rows, heads, dim = query.shape
        kv_heads = key.shape[1]
        group = heads // kv_heads
        by_block = (blocks, per_block, kv_heads)
        keys.steps[:, :, :, step] = key.reshape(*by_block, -1).transpose(1, 2)
        values.steps[:, :, :, step] = value.reshape(*by_block, -1).transpose(1, 2)

        scaling, window, softcap, sinks = options
        # The window ends at the query's own token: `step + 1` suffix tokens come first.
        first = step + 1 - window if 0 < window <= step + 1 else 0
        with_prefix = part.prefix > 0 and not 0 < window <= step + 1
        own = slice(first, step + 1)
        query = query.reshape(*by_block, group, dim).transpose(1, 2)  # [B, kv_heads, b, group, D]
        query = query.reshape(blocks * kv_heads, per_block * group, dim)
        mask = self._mask(part, window, kv_heads) if with_prefix else None
        column = None
        if sinks is not None:
            column = sinks.view(kv_heads, 1, group).expand(blocks, kv_heads, per_block, group)
            column = column.reshape(blocks * kv_heads, per_block * group, 1)

        if keys.whole is not None and values.whole is not None:
            if with_prefix:
                own = slice(0, part.prefix + step + 1)
                k, v = keys.whole[:, own], values.whole[:, own]
            else:
                k, v = keys.suffix[:, own], values.suffix[:, own]
            scores = _scores(query, k, scaling)
            weights = attention_weights(scores, softcap=softcap, mask=mask, sinks=column)
            out = torch.bmm(weights, v)
        else:
            by_row = (blocks * kv_heads * per_block, group)
            k, v = keys.suffix[:, own], values.suffix[:, own]
            scores = _scores(query.reshape(*by_row, dim), k, scaling)
            scores = scores.view(blocks * kv_heads, per_block * group, -1)
            if with_prefix:
                scores = torch.cat((_scores(query, keys.prefix, scaling), scores), dim=-1)
            weights = attention_weights(scores, softcap=softcap, mask=mask, sinks=column)
            own_weights = weights[..., part.prefix :] if with_prefix else weights
            out = torch.bmm(own_weights.reshape(*by_row, -1), v)
            out = out.view(blocks * kv_heads, per_block * group, -1)
            if with_prefix:
                out.baddbmm_(weights[..., : part.prefix], values.prefix)
        out = out.view(blocks, kv_heads, per_block, group, -1).transpose(1, 2)
        return out.reshape(rows, heads, -1)

    def _mask(self, part: _Part, window: int, kv_heads: int) -> Tensor | None:
        """Additive mask ``[B * kv_heads, 1, P + step + 1]`` of this step, None if all is seen."""
        spare = 0 if window == 0 else max(0, part.prefix + self._step + 1 - window)
        if not (part.ragged or spare):
            return None
        if (window, kv_heads) not in part.masks:
            position = torch.arange(part.prefix, device=part.lengths.device)
            length = part.lengths.unsqueeze(1)
            seen = position < length
            if window > 0:
                seen &= position > length + (self._step - window)
            mask = self._k_pages[0].new_zeros((part.blocks, part.prefix + self._step + 1))
            mask[:, : part.prefix].masked_fill_(~seen, -torch.inf)
            part.masks[window, kv_heads] = mask.repeat_interleave(kv_heads, dim=0).unsqueeze(1)
        return part.masks[window, kv_heads]


def _scores(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Scaled scores ``[N, queries, keys]`` in one call; with beta 0 its first input is unused."""
    return torch.baddbmm(query[:, :1, :1], query, keys.transpose(1, 2), beta=0, alpha=scaling)


def _part(tile: Tile, batch: BatchLike, page_size: int, only: bool, device: torch.device) -> _Part:
    """Indices of a tile; `only` says that it holds every row of the batch."""
    first = tile.rows[:, 0]
    lengths = batch.row_start[first].astype(np.int64)
    longest = int(lengths.max())
    slots = prefix_slots(batch, tile.groups, lengths, page_size, longest)
    real = (tile.rows >= 0).ravel()
    rows = np.where(tile.rows >= 0, tile.rows, first[:, None]).ravel()
    empty = np.flatnonzero(lengths == 0)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return _Part(
        blocks=tile.rows.shape[0],
        per_block=tile.rows.shape[1],
        prefix=longest,
        lengths=tensor(lengths),
        ragged=bool((lengths < longest).any()),
        empty=tensor(empty) if longest and len(empty) else None,
        gather=tensor(slots.ravel()),
        rows=None if only and real.all() else tensor(rows),
        real=None if real.all() else tensor(np.flatnonzero(real)),
    )


def _load(part: _Part, name: str, pages: Tensor, max_new: int, workspace: Workspace) -> _Dense:
    """Dense form of one layer's keys or values: the prefix gathered, room for the suffix."""
    kv_heads, dim = pages.shape[2:]
    batch = part.blocks * kv_heads
    new = part.per_block * max_new
    buffer = workspace.take(name, batch * (part.prefix + new) * dim, pages)
    whole = None
    if part.per_block == 1:
        whole = buffer.view(batch, part.prefix + max_new, dim)
        prefix, suffix = whole[:, : part.prefix], whole[:, part.prefix :]
    else:
        split = batch * part.prefix * dim
        prefix = buffer[:split].view(batch, part.prefix, dim)
        suffix = buffer[split:].view(batch * part.per_block, max_new, dim)
    if part.prefix:
        scratch = workspace.take("gather", part.gather.numel() * kv_heads * dim, pages)
        scratch = scratch.view(-1, kv_heads, dim)
        torch.index_select(pages.flatten(0, 1), 0, part.gather, out=scratch)
        by_head = scratch.view(part.blocks, part.prefix, kv_heads, dim).transpose(1, 2)
        by_block = prefix.view(part.blocks, kv_heads, part.prefix, dim)
        by_block.copy_(by_head)
        if part.empty is not None:
            # Masking hides finite numbers only, and the null page may hold anything.
            by_block.index_fill_(0, part.empty, 0.0)
    steps = suffix.view(part.blocks, kv_heads, part.per_block, max_new, dim)
    return _Dense(prefix=prefix, suffix=suffix, whole=whole, steps=steps)
