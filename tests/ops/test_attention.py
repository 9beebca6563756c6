"""The paged attention operator against attention written out row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.attention_cases import Shape, plain_attention, random_batch, row_slots, tables
from torch import Tensor

from stars_fast.ops import attention, paged_attention

SHAPES = {
    "grouped": Shape(),
    "multi_head": Shape(heads=3, kv_heads=3),
    "multi_query": Shape(heads=4, kv_heads=1),
    "wide_keys": Shape(key_dim=12, value_dim=5),
    "window": Shape(window=5),
    "softcap": Shape(softcap=1.5),
    "sinks": Shape(sinks=True, window=6),
}
PAGE_SIZE = 4
BATCHES = {
    "mixed": ([9, 0, 14, 3], [3, 1, 2, 1], 7),
    "one_each": ([6, 11, 2], [1, 1, 1], 4),
    "no_prefix": ([0, 0], [1, 1], 9),
    "shared": ([13, 10], [4, 4], 3),
    "far_apart": ([700, 5, 150], [2, 3, 1], 40),
}


def pools(shape: Shape, num_pages: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    size = (num_pages, PAGE_SIZE, shape.kv_heads)
    k = torch.randn((*size, shape.key_dim), generator=generator).to(dtype)
    v = torch.randn((*size, shape.value_dim), generator=generator).to(dtype)
    k[0], v[0] = torch.nan, torch.nan  # the null page is never read
    return k, v


@pytest.mark.parametrize("queries", ["extend", "decode", "some"])
@pytest.mark.parametrize("batch_name", BATCHES)
@pytest.mark.parametrize("shape_name", SHAPES)
def test_agrees_with_plain_attention(shape_name: str, batch_name: str, queries: str) -> None:
    shape = SHAPES[shape_name]
    prefixes, candidates, max_new = BATCHES[batch_name]
    rng = np.random.default_rng(len(batch_name))
    batch = random_batch(
        rng, prefixes=prefixes, candidates=candidates, max_new=max_new, page_size=PAGE_SIZE,
        num_pages=512,
    )  # fmt: skip
    k, v = pools(shape, 512, torch.float32)
    new = batch.new_lengths
    asked = {"extend": new, "decode": np.ones_like(new), "some": rng.integers(1, new + 1)}[queries]
    query = torch.randn((int(asked.sum()), shape.heads, shape.key_dim))
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if shape.sinks else None

    got = paged_attention(
        query, k, v, *tables(batch, asked), 0.3, shape.window, shape.softcap, sinks
    )
    at = 0
    for row in range(batch.num_rows):
        slots = row_slots(batch, row, PAGE_SIZE)
        checked = range(asked[row]) if asked[row] < 12 else (0, 11, asked[row] - 1)
        for i in checked:
            position = len(slots) - asked[row] + i
            want = plain_attention(
                query[at + i], k, v, slots, position, 0.3, shape, sinks
            )  # fmt: skip
            torch.testing.assert_close(got[at + i].double(), want, atol=2e-6, rtol=2e-6)
        at += asked[row]
    assert got.shape == (query.shape[0], shape.heads, shape.value_dim)


@pytest.mark.parametrize("shape_name", ["grouped", "softcap", "sinks"])
def test_bfloat16_rounds_no_worse_than_pytorch(shape_name: str) -> None:
    """Error at most twice that of eager attention in bfloat16, both against float32."""
    shape = SHAPES[shape_name]
    batch = random_batch(
        np.random.default_rng(0), prefixes=[40, 33], candidates=[2, 1], max_new=6,
        page_size=PAGE_SIZE, num_pages=64,
    )  # fmt: skip
    k, v = pools(shape, 64, torch.bfloat16)
    new = batch.new_lengths
    query = torch.randn(int(new.sum()), 4, 8, generator=torch.Generator().manual_seed(1))
    query = query.to(torch.bfloat16)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if shape.sinks else None
    rest = (*tables(batch, new), 0.35, shape.window, shape.softcap)
    got = paged_attention(query, k, v, *rest, sinks)
    assert got.dtype == torch.bfloat16
    want = paged_attention(query.float(), k.float(), v.float(), *rest, sinks)
    # Eager: scores and weights rounded to bfloat16, as transformers' eager attention does.
    plan = attention.plan_attention(batch, new, page_size=PAGE_SIZE, device=torch.device("cpu"))
    tile = plan.tiles[0]
    q = query[tile.query_index].transpose(1, 2)
    keys = k.flatten(0, 1)[tile.key_slots].transpose(1, 2).repeat_interleave(2, dim=1)
    values = v.flatten(0, 1)[tile.key_slots].transpose(1, 2).repeat_interleave(2, dim=1)
    scores = (q @ keys.transpose(-1, -2)) * 0.35
    weights = attention.attention_weights(
        scores,
        softcap=shape.softcap,
        mask=tile.mask(shape.window, torch.bfloat16),
        sinks=None if sinks is None else sinks.view(-1, 1, 1),
    )
    eager = torch.empty_like(got)
    eager[tile.query_index[tile.query_valid]] = (weights @ values).transpose(1, 2)[tile.query_valid]
    assert (got.float() - want).abs().max() <= 2 * (eager.float() - want).abs().max()


def test_long_rows_with_explicit_scores_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch(
        np.random.default_rng(0), prefixes=[12], candidates=[1], max_new=30, page_size=PAGE_SIZE,
        num_pages=64,
    )  # fmt: skip
    shape = SHAPES["softcap"]
    k, v = pools(shape, 64, torch.float32)
    new = batch.new_lengths
    query = torch.randn((int(new.sum()), 4, 8))
    rest = (*tables(batch, new), 0.3, 0, 1.5)
    whole = paged_attention(query, k, v, *rest)
    monkeypatch.setattr(attention, "_MAX_SCORES", 4 * 42 * 7)
    torch.testing.assert_close(paged_attention(query, k, v, *rest), whole)


def test_operator_is_well_formed() -> None:
    batch = random_batch(
        np.random.default_rng(0), prefixes=[5, 2], candidates=[2, 1], max_new=3,
        page_size=PAGE_SIZE, num_pages=32,
    )  # fmt: skip
    k, v = pools(Shape(), 32, torch.float32)
    new = batch.new_lengths
    query = torch.randn((int(new.sum()), 4, 8))
    torch.library.opcheck(
        torch.ops.stars_fast.paged_attention.default,
        (query, k, v, *tables(batch, new), 0.3),
    )
