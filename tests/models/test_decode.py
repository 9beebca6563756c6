"""The dense attention of decode steps agrees with the stateless operator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.attention_cases import Shape, random_batch, tables

from stars_fast.models.decode import DecodeAttention, Workspace
from stars_fast.models.probe import LayerLayout
from stars_fast.ops import paged_attention

PAGE_SIZE = 4
SHAPES = {
    "grouped": Shape(),
    "wide_keys": Shape(heads=3, kv_heads=3, key_dim=12, value_dim=5),
    "window": Shape(window=5),
    "wide_window": Shape(window=12),
    "softcap": Shape(softcap=1.5, window=3),
    "sinks": Shape(sinks=True),
}
BATCHES = {
    "even": ([9, 9, 9], [1, 1, 1]),
    "shared": ([9, 9], [3, 3]),
    "ragged": ([9, 2, 14, 0], [3, 1, 2, 1]),
    "unequal_candidates": ([11, 8, 10], [5, 1, 4]),
    "far_apart": ([600, 4, 0, 140], [2, 2, 1, 3]),
    "no_prefix": ([0, 0], [2, 1]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch_name", BATCHES)
@pytest.mark.parametrize("shape_name", SHAPES)
def test_agrees_with_the_operator(shape_name: str, batch_name: str, dtype: torch.dtype) -> None:
    shape = SHAPES[shape_name]
    rng = np.random.default_rng(3)
    generator = torch.Generator().manual_seed(3)
    prefixes, candidates = BATCHES[batch_name]
    batch = random_batch(
        rng, prefixes=prefixes, candidates=candidates, max_new=8, page_size=PAGE_SIZE,
        num_pages=512,
    )  # fmt: skip

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    k = draw(512, PAGE_SIZE, shape.kv_heads, shape.key_dim)
    v = draw(512, PAGE_SIZE, shape.kv_heads, shape.value_dim)
    k[0], v[0] = torch.nan, torch.nan
    layout = LayerLayout(
        shape.heads, shape.kv_heads, shape.key_dim, shape.value_dim, shape.window, dtype
    )
    sinks = draw(shape.heads) if shape.sinks else None
    decode = DecodeAttention(batch, [layout], [k], [v], Workspace())
    rows = batch.num_rows
    for step in range(batch.max_new):
        decode.begin_step(step)
        query = draw(rows, shape.heads, shape.key_dim)
        key = draw(rows, shape.kv_heads, shape.key_dim)
        value = draw(rows, shape.kv_heads, shape.value_dim)
        got = decode(query, key, value, scaling=0.3, softcap=shape.softcap, sinks=sinks)
        live = batch.new_lengths > step
        want = paged_attention(
            query,
            k,
            v,
            *tables(
                replace(batch, new_lengths=np.minimum(batch.new_lengths, step + 1)),
                np.ones(rows, dtype=np.int32),
            ),
            0.3,
            shape.window,
            shape.softcap,
            sinks,
        )
        tolerance = 2e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got[live], want[live], atol=tolerance, rtol=tolerance)


def test_workspace_is_used_again() -> None:
    """Rounds of the same shape allocate no keys or values."""
    batch = random_batch(
        np.random.default_rng(0), prefixes=[9, 30], candidates=[2, 2], max_new=4,
        page_size=PAGE_SIZE, num_pages=64,
    )  # fmt: skip
    pool = torch.zeros(64, PAGE_SIZE, 2, 8)
    layouts = [LayerLayout(2, 2, 8, 8, 0, torch.float32)] * 2
    workspace = Workspace()

    def addresses() -> dict[str, int]:
        DecodeAttention(batch, layouts, [pool, pool], [pool, pool], workspace)
        return {name: buffer.data_ptr() for name, buffer in workspace._buffers.items()}

    assert addresses() == addresses()


def test_workspace_grows_geometrically() -> None:
    workspace = Workspace()
    like = torch.zeros(1)
    first = workspace.take("a", 100, like)
    assert workspace.take("a", 50, like).data_ptr() == first.data_ptr()
    grown = workspace.take("a", 101, like)
    assert grown.numel() == 101
    assert workspace.take("a", 150, like).data_ptr() == grown.data_ptr()
