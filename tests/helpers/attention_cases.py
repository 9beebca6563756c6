"""Random batches for attention, and attention written out row by row as the oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stars_fast.ops.batch import RowBatch


@dataclass(frozen=True)
class Shape:
    """Heads and options of one attention call."""

    heads: int = 4
    kv_heads: int = 2
    key_dim: int = 8
    value_dim: int = 8
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False


def random_batch(
    rng: np.random.Generator,
    *,
    prefixes: list[int],
    candidates: list[int],
    max_new: int,
    page_size: int,
    num_pages: int,
) -> RowBatch:
    """Groups on shuffled pages, with padding in every other group that has a prefix."""
    pages = iter(rng.permutation(np.arange(1, num_pages)))

    def take(tokens: int) -> list[int]:
        return [int(next(pages)) for _ in range(-(-tokens // page_size))]

    tables, paddings = [], []
    for number, prefix in enumerate(prefixes):
        start, end = prefix, prefix
        if number % 2 == 0 and prefix > 1:
            start = int(rng.integers(1, prefix + 1))
            end = start + int(rng.integers(0, page_size))
        paddings.append((start, end))
        tables.append(take(prefix + end - start))
    group = np.repeat(np.arange(len(prefixes)), candidates)
    new = rng.integers(1, max_new + 1, len(group))
    new[rng.integers(len(group))] = max_new
    slots = np.zeros((len(group), max_new), dtype=np.int64)
    for row, count in enumerate(new):
        at = np.arange(count)
        slots[row, :count] = np.array(take(count))[at // page_size] * page_size + at % page_size
    width = max(1, *(len(table) for table in tables))
    return RowBatch(
        group_pages=np.array([t + [0] * (width - len(t)) for t in tables], dtype=np.int32),
        padding_start=np.array([h[0] for h in paddings], dtype=np.int32),
        padding_end=np.array([h[1] for h in paddings], dtype=np.int32),
        row_group=group.astype(np.int32),
        row_start=np.array(prefixes, dtype=np.int32)[group],
        new_lengths=new.astype(np.int32),
        slots=slots,
    )


def tables(
    batch: RowBatch, query_lengths: np.ndarray, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """The batch as `paged_attention` takes it."""
    arrays = (
        batch.group_pages, batch.padding_start, batch.padding_end, batch.row_group,
        batch.row_start, batch.new_lengths, query_lengths, batch.slots,
    )  # fmt: skip
    return [torch.from_numpy(array).to(device) for array in arrays]


def row_slots(batch: RowBatch, row: int, page_size: int) -> list[int]:
    """Slots of a row's prefix and new tokens, in order of position."""
    group = batch.row_group[row]
    table = batch.group_pages[group]
    padding = range(batch.padding_start[group], batch.padding_end[group])
    prefix = [
        int(table[s // page_size]) * page_size + s % page_size
        for s in range(batch.row_start[row] + len(padding))
        if s not in padding
    ]
    assert len(prefix) == batch.row_start[row]
    return prefix + batch.slots[row, : batch.new_lengths[row]].tolist()


def plain_attention(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: list[int],
    position: int,
    scaling: float,
    shape: Shape,
    sinks: Tensor | None,
) -> Tensor:
    """One query ``[heads, key_dim]`` at a position, head by head, in float64."""
    first = max(0, position + 1 - shape.window) if shape.window else 0
    seen = slots[first : position + 1]
    keys = k_pages.flatten(0, 1)[seen].double()
    values = v_pages.flatten(0, 1)[seen].double()
    out = []
    for head in range(shape.heads):
        kv_head = head // (shape.heads // shape.kv_heads)
        scores = [float(query[head].double() @ key[kv_head]) * scaling for key in keys]
        if shape.softcap:
            scores = [shape.softcap * math.tanh(s / shape.softcap) for s in scores]
        weights = torch.tensor(scores, dtype=torch.float64, device=values.device).exp()
        total = weights.sum()
        if sinks is not None:
            total = total + sinks[head].double().exp()
        out.append((weights / total) @ values[:, kv_head])
    return torch.stack(out)


def joined_parts(parts: list[tuple[Tensor, Tensor]], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Join parts of a softmax, ``[..., dim]`` and natural log-sum-exps ``[...]``, in float64.

    The merge of FlashAttention-2, arXiv 2307.08691, section 2.3; an empty part's log-sum-exp is
    -inf, and nothing but empty parts are zeros. A sink, broadcast with the log-sum-exps, is a part
    whose values are zero.
    """
    lses = torch.stack([lse.double() for _, lse in parts])
    if sinks is not None:
        lses = torch.cat((lses, sinks.double().expand(lses[:1].shape)))
    lse = lses.logsumexp(dim=0)
    weights = (lses - lse).exp().nan_to_num(0.0)
    out = sum(
        w.unsqueeze(-1) * part.double().nan_to_num(0.0)
        for w, (part, _) in zip(weights, parts, strict=False)
    )
    assert isinstance(out, Tensor)
    return out, lse


def pools(
    shape: Shape,
    batch: RowBatch,
    page_size: int,
    num_pages: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Keys and values in the slots that a batch names; NaN in all others."""
    named = {slot for row in range(batch.num_rows) for slot in row_slots(batch, row, page_size)}
    used = torch.tensor(sorted(named))
    result = []
    for dim in (shape.key_dim, shape.value_dim):
        flat = torch.full((num_pages * page_size, shape.kv_heads, dim), torch.nan)
        flat[used] = torch.randn((len(used), shape.kv_heads, dim), generator=generator)
        result.append(flat.view(num_pages, page_size, shape.kv_heads, dim))
    return result[0], result[1]
