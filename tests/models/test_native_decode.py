"""The attention of decode steps in C++ agrees with the dense one in PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.attention_cases import Shape, random_batch
from torch import Tensor

from stars_fast import _cpu
from stars_fast.models.decode import DecodeAttention, Workspace
from stars_fast.models.native_decode import NativeDecode
from stars_fast.models.pool import Pools
from stars_fast.models.probe import LayerLayout
from stars_fast.ops.cpu import attend_step
from stars_fast.ops.fused import Rotary

PAGE_SIZE = 4
SHAPES = {
    "grouped": Shape(),
    "wide_keys": Shape(heads=3, kv_heads=3, key_dim=12, value_dim=5),
    "five_queries": Shape(heads=10, kv_heads=2, key_dim=16, value_dim=16),
    "window": Shape(window=5),
    "wide_window": Shape(window=12),
    "softcap": Shape(softcap=1.5, window=3),
    "sinks": Shape(sinks=True),
}
BATCHES = {
    "shared": ([9, 9], [3, 3]),
    "ragged": ([9, 2, 14, 0], [3, 1, 2, 1]),
    "far_apart": ([600, 4, 0, 140], [2, 2, 1, 3]),
    "many": ([40], [19]),
}


def pools_of(shape: Shape, generator: torch.Generator) -> Pools:
    layout = LayerLayout(
        shape.heads, shape.kv_heads, shape.key_dim, shape.value_dim, shape.window, torch.float32
    )
    pools = Pools.allocate([layout], num_pages=512, page_size=PAGE_SIZE, device=torch.device("cpu"))
    for pages in (*pools.k_pages, *pools.v_pages):
        pages.normal_(generator=generator)
    return pools


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("batch_name", BATCHES)
@pytest.mark.parametrize("shape_name", SHAPES)
def test_agrees_with_the_dense_form(shape_name: str, batch_name: str, rotary: bool) -> None:
    shape = SHAPES[shape_name]
    generator = torch.Generator().manual_seed(3)
    prefixes, candidates = BATCHES[batch_name]
    batch = random_batch(
        np.random.default_rng(3), prefixes=prefixes, candidates=candidates, max_new=6,
        page_size=PAGE_SIZE, num_pages=512,
    )  # fmt: skip

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    pools = pools_of(shape, generator)
    copies = [pages.clone() for pages in (pools.k_pages[0], pools.v_pages[0])]
    native = NativeDecode(batch, pools)
    dense = DecodeAttention(batch, pools.layouts, [copies[0]], [copies[1]], Workspace())
    sinks = draw(shape.heads) if shape.sinks else None
    rows = batch.num_rows
    for step in range(batch.max_new):
        turn = None
        if rotary:
            size = shape.key_dim // 4 * 2  # some channels stay
            turn = Rotary(draw(rows, size), draw(rows, size))
        whole = draw(rows, (shape.heads + shape.kv_heads) * shape.key_dim)
        value = draw(rows, shape.kv_heads, shape.value_dim)
        results = []
        for attention in (dense, native):
            query, key = whole.clone().split(
                [shape.heads * shape.key_dim, shape.kv_heads * shape.key_dim], dim=1
            )
            attention.begin_step(step)
            results.append(
                attention(
                    query.view(rows, shape.heads, -1),
                    key.view(rows, shape.kv_heads, -1),
                    value,
                    scaling=0.3,
                    softcap=shape.softcap,
                    sinks=sinks,
                    rotary=turn,
                )
            )
        live = batch.new_lengths > step
        want, got = results
        torch.testing.assert_close(got[live], want[live], atol=3e-6, rtol=3e-6)
        for pages, copied in zip((pools.k_pages[0], pools.v_pages[0]), copies, strict=True):
            torch.testing.assert_close(pages[1:], copied[1:], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("prefix", [0, 5, 126, 127, 128, 250])
@pytest.mark.parametrize("shape_name", ["grouped", "five_queries", "wide_window", "sinks"])
def test_sums_are_the_same_wherever_the_round_began(shape_name: str, prefix: int) -> None:
    """Bit for bit: a segment may go on in another round, when it does is told by the clock."""
    shape, new = SHAPES[shape_name], 9
    generator = torch.Generator().manual_seed(1)
    pools = pools_of(shape, generator)
    whole = np.arange(PAGE_SIZE, PAGE_SIZE + prefix + new, dtype=np.int32)  # slots of one text
    sizes = [(shape.heads, shape.key_dim), (shape.kv_heads, shape.key_dim)]
    sizes.append((shape.kv_heads, shape.value_dim))
    drawn = [[torch.randn(2, *size, generator=generator) for size in sizes] for _ in range(new)]

    def attend(begun: int) -> Tensor:
        """Two equal rows; the result of the last step of a round that begins after `begun`."""
        own = np.stack([whole[prefix + begun :]] * 2)
        round_ = _cpu.Round(
            whole[: prefix + begun], np.array([0, prefix + begun]), np.zeros(2, np.int32), own
        )
        out = torch.empty(2, shape.heads, shape.value_dim)
        for step, (query, key, value) in enumerate(drawn[begun:]):
            same = [x[:1].repeat(2, 1, 1) for x in (key, value)]
            attend_step(
                round_, step, (query.clone(), *same, out),
                (pools.k_pages[0], pools.v_pages[0]), scaling=0.3, softcap=0.0,
                window=shape.window or 0, rotary=None,
                sinks=torch.linspace(-1, 1, shape.heads) if shape.sinks else None,
            )  # fmt: skip
        return out

    wanted = attend(0)
    for begun in (1, 2, 3, 4, 8):
        assert torch.equal(attend(begun), wanted), begun


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Bit for bit, so that a request's rewards and tokens are those that it has alone."""
    shape = Shape()
    generator = torch.Generator().manual_seed(0)
    pools = pools_of(shape, generator)
    batch = random_batch(
        np.random.default_rng(0), prefixes=[30, 9], candidates=[18, 2], max_new=2,
        page_size=PAGE_SIZE, num_pages=512,
    )  # fmt: skip
    sizes = [(shape.heads, shape.key_dim), (shape.kv_heads, shape.key_dim)]
    sizes.append((shape.kv_heads, shape.value_dim))
    tensors = [torch.randn(batch.num_rows, *size, generator=generator) for size in sizes]

    def attend(rows: list[int]) -> Tensor:
        part = random_batch(
            np.random.default_rng(0), prefixes=[30, 9], candidates=[18, 2], max_new=2,
            page_size=PAGE_SIZE, num_pages=512,
        )  # fmt: skip
        for name in ("row_group", "row_start", "new_lengths", "slots"):
            object.__setattr__(part, name, getattr(part, name)[rows])
        native = NativeDecode(part, pools)
        native.begin_step(0)
        return native(*(x[rows] for x in tensors), scaling=0.3, softcap=0.0, sinks=None)

    together = attend(list(range(batch.num_rows)))
    for row in (0, 17, 19):
        assert torch.equal(attend([row])[0], together[row])
