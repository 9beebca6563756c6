"""The Triton attention against its PyTorch form and against attention written out."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.attention_cases import Shape, plain_attention, pools, random_batch, row_slots, tables
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stars_fast import ops
from stars_fast.ops.attention import AttentionOptions, attention_weights
from stars_fast.ops.batch import RowBatch
from stars_fast.ops.varlen import varlen_attention

kernels = pytest.importorskip("stars_fast.kernels.attention", reason="Triton is for Linux only")
plans = pytest.importorskip("stars_fast.kernels.attention_plan")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAGE_SIZE = 4
SCALING = 0.3

SHAPES = {
    "grouped": Shape(),
    "multi_head": Shape(heads=3, kv_heads=3),
    "multi_query": Shape(heads=20, kv_heads=1),  # more heads than the smallest tile has rows
    "wide_keys": Shape(heads=3, kv_heads=1, key_dim=20, value_dim=5),
    "window": Shape(window=5),
    "softcap": Shape(softcap=1.5),
    "sinks": Shape(sinks=True, window=6),
}
BATCHES = {
    "mixed": ([9, 0, 14, 3], [3, 1, 2, 1], 7),
    "one_each": ([6, 11, 2], [1, 1, 1], 4),
    "no_prefix": ([0, 0], [1, 1], 9),
    "shared": ([13, 10], [4, 4], 3),
    "far_apart": ([130, 5, 40], [2, 1, 1], 12),
}


@dataclass
class Case:
    """A batch with tensors on the device."""

    shape: Shape
    batch: RowBatch
    asked: np.ndarray
    query: Tensor
    k_pages: Tensor
    v_pages: Tensor
    sinks: Tensor | None

    @property
    def options(self) -> AttentionOptions:
        return AttentionOptions(SCALING, self.shape.window, self.shape.softcap, self.sinks)

    def plan(
        self, block_m: int = 16, split_tokens: int | None = None, *, prefix_only: bool = False
    ) -> Any:
        return plans.AttentionPlan.build(
            self.batch, self.asked, heads_per_kv=self.shape.heads // self.shape.kv_heads,
            block_m=block_m, split_tokens=split_tokens, device=DEVICE, prefix_only=prefix_only,
        )  # fmt: skip

    def run(self, block_m: int = 16, split_tokens: int | None = None) -> Tensor:
        """By the kernel."""
        plan = self.plan(block_m, split_tokens)
        return kernels.attention(self.query, self.k_pages, self.v_pages, plan, self.options)

    def own(self) -> Any:
        """Attention to each row's own tokens, all of them queries."""
        new = self.batch.new_lengths
        slots = np.concatenate([x[:n] for x, n in zip(self.batch.slots, new, strict=True)])
        keys, values = (
            pages.flatten(0, 1)[torch.from_numpy(slots).to(DEVICE)]
            for pages in (self.k_pages, self.v_pages)
        )
        own = varlen_attention(self.query, keys, values, new.tolist(), self.options)
        return kernels.OwnPart(*own)

    def cascade(self, block_m: int = 16, split_tokens: int | None = None) -> Tensor:
        """By the kernel for the prefixes, joined with the rows' own tokens."""
        plan = self.plan(block_m, split_tokens, prefix_only=True)
        return kernels.attention(
            self.query, self.k_pages, self.v_pages, plan, self.options, own=self.own()
        )

    def reference(self) -> Tensor:
        """By the PyTorch form in float32."""
        return ops.paged_attention(
            self.query.float(), self.k_pages.float(), self.v_pages.float(),
            *tables(self.batch, self.asked, DEVICE), *self.options,
        )  # fmt: skip

    def to(self, dtype: torch.dtype) -> Case:
        tensors = (self.query, self.k_pages, self.v_pages)
        query, k_pages, v_pages = (tensor.to(dtype) for tensor in tensors)
        return replace(self, query=query, k_pages=k_pages, v_pages=v_pages)


def make_case(
    shape: Shape,
    batch: tuple[list[int], list[int], int],
    queries: str = "extend",
    *,
    page_size: int = PAGE_SIZE,
    num_pages: int = 512,
    seed: int = 0,
) -> Case:
    rng = np.random.default_rng(seed)
    prefixes, candidates, max_new = batch
    drawn = random_batch(
        rng, prefixes=prefixes, candidates=candidates, max_new=max_new, page_size=page_size,
        num_pages=num_pages,
    )  # fmt: skip
    new = drawn.new_lengths
    asked = {"extend": new, "decode": np.ones_like(new), "some": rng.integers(1, new + 1)}[queries]
    generator = torch.Generator().manual_seed(seed)
    k, v = pools(shape, drawn, page_size, num_pages, generator)
    tokens = int(asked.sum())
    # As from a model: a transposed view.
    query = torch.randn((shape.heads, tokens, shape.key_dim), generator=generator).transpose(0, 1)
    sinks = torch.randn(shape.heads, generator=generator).to(DEVICE) if shape.sinks else None
    return Case(shape, drawn, asked, query.to(DEVICE), k.to(DEVICE), v.to(DEVICE), sinks)


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("queries", ["extend", "decode", "some"])
@pytest.mark.parametrize("batch_name", BATCHES)
@pytest.mark.parametrize("shape_name", SHAPES)
def test_agrees_with_the_pytorch_form(shape_name: str, batch_name: str, queries: str) -> None:
    case = make_case(SHAPES[shape_name], BATCHES[batch_name], queries, seed=len(batch_name))
    assert_close(case.run(16, {"decode": 64}.get(queries)), case.reference())


@pytest.mark.parametrize("shape_name", SHAPES)
def test_agrees_with_attention_written_out(shape_name: str) -> None:
    case = make_case(SHAPES[shape_name], ([21, 0], [2, 1], 5), "some", seed=3)
    got = case.run(16, 8)
    at = 0
    for row, asked in enumerate(case.asked):
        slots = row_slots(case.batch, row, PAGE_SIZE)
        for i in range(asked):
            want = plain_attention(
                case.query[at + i], case.k_pages, case.v_pages, slots, len(slots) - asked + i,
                SCALING, case.shape, case.sinks,
            )  # fmt: skip
            assert_close(got[at + i].double(), want)
        at += asked


@pytest.mark.parametrize(
    ("shape_name", "prefixes", "split_tokens"),
    [
        *((name, [9, 0], 4) for name in SHAPES if name != "multi_query"),
        ("multi_query", [3], None),
        ("sinks", [0, 0], None),
        ("grouped", [37], 4),  # more parts than the merge reads at once
    ],
)
def test_cascades(shape_name: str, prefixes: list[int], split_tokens: int | None) -> None:
    """Own tokens apart, of rows that share a prefix or have none; some of one token."""
    candidates = [2, 1][: len(prefixes)]
    case = make_case(SHAPES[shape_name], (prefixes, candidates, 3), seed=1)
    assert 1 in case.batch.new_lengths
    assert_close(case.cascade(16, split_tokens), case.reference())


def test_a_cascade_leaves_texts_without_a_prefix_as_they_are() -> None:
    """To the bit, so that neighbours with a prefix change nothing."""
    case = make_case(SHAPES["grouped"], ([9, 0], [2, 1], 3)).to(torch.float16)
    fresh = torch.from_numpy(np.repeat(case.batch.row_start == 0, case.batch.new_lengths))
    got, own = case.cascade(16, 4), case.own().out
    assert torch.equal(got[fresh], own[fresh])
    assert not torch.equal(got[~fresh], own[~fresh])
    torch.testing.assert_close(got.float(), case.reference(), atol=2e-3, rtol=2e-3)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_ragged_batches(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 3), label="groups")
    sizes = st.lists(st.integers(0, 40), min_size=count, max_size=count)
    rows = st.lists(st.integers(1, 5), min_size=count, max_size=count)
    kv_heads = data.draw(st.integers(1, 2), label="kv_heads")
    shape = Shape(
        heads=kv_heads * data.draw(st.integers(1, 5), label="heads_per_kv"),
        kv_heads=kv_heads,
        key_dim=data.draw(st.integers(1, 33), label="key_dim"),
        value_dim=data.draw(st.integers(1, 33), label="value_dim"),
        window=data.draw(st.sampled_from([0, 1, 3, 17, 100]), label="window"),
        softcap=data.draw(st.sampled_from([0.0, 2.0]), label="softcap"),
        sinks=data.draw(st.booleans(), label="sinks"),
    )
    case = make_case(
        shape,
        (data.draw(sizes, label="prefixes"), data.draw(rows, label="rows"),
         data.draw(st.integers(1, 12), label="max_new")),
        data.draw(st.sampled_from(["extend", "decode", "some"]), label="queries"),
        page_size=data.draw(st.integers(1, 7), label="page_size"),
        num_pages=1024,
        seed=data.draw(st.integers(0, 99), label="seed"),
    )  # fmt: skip
    block_m = data.draw(st.sampled_from([16, 64]), label="block_m")
    split_tokens = data.draw(st.sampled_from([None, 7, 16]), label="split_tokens")
    assert_close(case.run(block_m, split_tokens), case.reference())


def eager_row(case: Case, row: int) -> Tensor:
    """A row's attention as transformers' eager one: scores and weights in the model's dtype."""
    slots = row_slots(case.batch, row, PAGE_SIZE)
    asked = int(case.asked[row])
    end = int(case.asked[: row + 1].sum())
    shape = case.shape
    per_kv = shape.heads // shape.kv_heads
    query = case.query[end - asked : end].transpose(0, 1)
    k, v = (
        pages.flatten(0, 1)[slots].transpose(0, 1).repeat_interleave(per_kv, dim=0)
        for pages in (case.k_pages, case.v_pages)
    )
    key_at = torch.arange(len(slots), device=DEVICE)
    query_at = key_at[-asked:, None]
    seen = key_at <= query_at
    if shape.window:
        seen &= key_at > query_at - shape.window
    mask = torch.zeros(seen.shape, dtype=query.dtype, device=DEVICE)
    weights = attention_weights(
        query @ k.transpose(1, 2) * SCALING,
        softcap=shape.softcap,
        mask=mask.masked_fill_(~seen, -torch.inf),
        sinks=None if case.sinks is None else case.sinks.view(-1, 1, 1),
    )
    return (weights @ v).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape_name", ["grouped", "softcap", "sinks"])
def test_rounds_no_worse_than_pytorch(shape_name: str, dtype: torch.dtype) -> None:
    """Error at most twice that of eager PyTorch in the same precision, both against float32."""
    case = make_case(SHAPES[shape_name], ([40, 33], [2, 1], 6)).to(dtype)
    want = case.reference()
    eager = torch.cat([eager_row(case, row) for row in range(case.batch.num_rows)])
    allowed = 2 * (eager.float() - want).abs().max()
    for split_tokens in (None, 16):
        got = case.run(64, split_tokens)
        assert got.dtype == dtype
        assert (got.float() - want).abs().max() <= allowed


@pytest.mark.parametrize(("splits", "window"), [(1, 0), (2, 0), (8, 30), (40, 0), (133, 30)])
def test_splits_are_merged(splits: int, window: int) -> None:
    """With the window, all but the last few splits see nothing."""
    shape = Shape(heads=2, kv_heads=1, window=window, sinks=True)
    case = make_case(shape, ([splits * 8 - 3], [3], 2), "decode")
    plan = case.plan(16, 8)
    counts = plan.merges[: int(plan.num_merges), 2]
    assert counts.tolist() == ([] if splits == 1 else [splits] * 3)
    got = kernels.attention(case.query, case.k_pages, case.v_pages, plan, case.options)
    assert_close(got, case.reference())


def test_empty_parts_without_sinks_are_merged() -> None:
    case = make_case(Shape(window=1), ([40], [2], 3), "extend")
    assert_close(case.run(16, 8), case.reference())


def test_own_tokens_of_many_rows_are_split() -> None:
    case = make_case(SHAPES["grouped"], ([10], [6], 20), "decode")
    plan = case.plan(64, 32)
    assert int(plan.num_items) > 2
    got = kernels.attention(case.query, case.k_pages, case.v_pages, plan, case.options)
    assert_close(got, case.reference())


def test_results_do_not_depend_on_other_groups() -> None:
    """To the bit."""
    case = make_case(SHAPES["grouped"], ([50, 30, 9], [2, 3, 4], 6), "decode")
    together = case.run(64, 16)
    batch = case.batch
    for group, rows in enumerate((slice(0, 2), slice(2, 5), slice(5, 9))):
        alone = RowBatch(
            group_pages=batch.group_pages[group : group + 1],
            padding_start=batch.padding_start[group : group + 1],
            padding_end=batch.padding_end[group : group + 1],
            row_group=np.zeros_like(batch.row_group[rows]),
            row_start=batch.row_start[rows],
            new_lengths=batch.new_lengths[rows],
            slots=batch.slots[rows],
        )
        one = replace(case, batch=alone, asked=case.asked[rows], query=case.query[rows])
        assert torch.equal(one.run(64, 16), together[rows])


def test_large_pool() -> None:
    """32768 pages and element offsets past 2**31; only the pages in use are ever touched."""
    page_size, num_pages, kv_heads, dim = 128, 32768, 2, 256
    shape = Shape(heads=2, kv_heads=kv_heads, key_dim=dim, value_dim=dim)
    case = make_case(shape, ([20], [2], 3), "decode", page_size=page_size, num_pages=8)
    shift = num_pages - 8
    far = []
    for pages in (case.k_pages, case.v_pages):
        pool = torch.empty((num_pages, *pages.shape[1:]), dtype=torch.float16, device=DEVICE)
        pool[shift:] = pages
        far.append(pool)
    assert far[0].numel() == 2**31
    batch = replace(
        case.batch,
        group_pages=case.batch.group_pages + np.int32(shift),
        slots=case.batch.slots + shift * page_size,
    )
    near = case.to(torch.float16)
    case = replace(near, batch=batch, k_pages=far[0], v_pages=far[1])
    assert torch.equal(case.run(16, 16), near.run(16, 16))


def test_replays_while_the_counter_moves() -> None:
    """One plan, `query_own` advanced on the device, gives what fresh plans give at each step."""
    case = make_case(Shape(window=9, sinks=True), ([21, 0, 6], [3, 1, 2], 5), "decode", seed=1)
    batch, rows = case.batch, case.batch.num_rows
    generator = torch.Generator().manual_seed(0)
    capacity = plans.PlanCapacity.of_decode(
        rows=rows + 3, groups=4, pages=64, own=8, max_prefix=40, heads_per_kv=2, block_m=16,
        split_tokens=8,
    )  # fmt: skip
    plan = plans.AttentionPlan.allocate(
        capacity, heads_per_kv=2, block_m=16, split_tokens=8, device=DEVICE
    )
    for _ in range(2):  # the second time over what the first left
        plan.write(case.batch, case.asked, query_own=np.zeros(rows, dtype=np.int32))
        for step in range(batch.max_new):
            query = torch.randn((rows + 3, 4, 8), generator=generator).to(DEVICE)
            got = kernels.attention(query, case.k_pages, case.v_pages, plan, case.options)
            assert torch.isfinite(got).all()
            assert not got[rows:].any()
            # Rows that have ended go on, to no purpose.
            new = np.minimum(batch.new_lengths, step + 1)
            live = torch.from_numpy(batch.new_lengths > step)
            fresh = replace(case, batch=replace(batch, new_lengths=new), query=query[:rows])
            assert_close(got[:rows][live], fresh.reference()[live])
            plan.query_own.add_(1)


def test_later_tokens_are_not_read() -> None:
    """Slots that a decode step has not written yet may hold NaN."""
    case = make_case(SHAPES["grouped"], ([5], [2], 4), "decode")
    later = torch.from_numpy(case.batch.slots[:, 1:].ravel())
    for pages in (case.k_pages, case.v_pages):
        pages.flatten(0, 1)[later[later > 0]] = torch.nan
    first = replace(case, batch=replace(case.batch, new_lengths=np.ones(2, np.int32)))
    plan = case.plan()
    plan.query_own.copy_(torch.tensor([0, 0]))
    got = kernels.attention(case.query, case.k_pages, case.v_pages, plan, case.options)
    assert_close(got, first.reference())


@pytest.mark.parametrize("dim", [8, 130])
def test_large_tiles(dim: int) -> None:
    """In one piece, and in the parts that wide heads need."""
    shape = Shape(key_dim=dim, value_dim=dim, heads=6, softcap=3.0)
    case = make_case(shape, ([20, 3], [3, 1], 50)).to(torch.float16)
    got = case.run(128)
    torch.testing.assert_close(got.float(), case.reference(), atol=2e-3, rtol=2e-3)


def test_tiles_follow_the_queries() -> None:
    choose = kernels.choose_tiles
    blocks = [choose(n, 4, 128, torch.bfloat16).block_m for n in (1, 4, 5, 16, 17)]
    assert blocks == [16, 16, 64, 64, 128]
    assert choose(999, 4, 256, torch.bfloat16) == (64, None)
    assert choose(8, 4, 64, torch.float32) == (16, kernels.SPLIT_TOKENS)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float8_pages(dtype: torch.dtype, scaled: bool) -> None:
    case = make_case(SHAPES["grouped"], ([18, 7], [2, 1], 3)).to(dtype)
    stored = [pages.to(torch.float8_e4m3fn) for pages in (case.k_pages, case.v_pages)]
    scales = [torch.tensor([0.5, 3.0]), torch.tensor([2.0, 0.25])] if scaled else [None, None]
    plan = case.plan(16, 8)
    k_scale, v_scale = (x if x is None else x.to(DEVICE) for x in scales)
    got = kernels.attention(
        case.query, *stored, plan, case.options, k_scale=k_scale, v_scale=v_scale
    )
    k, v = (
        pages.float() * (1.0 if scale is None else scale.to(DEVICE)[:, None])
        for pages, scale in zip(stored, scales, strict=True)
    )
    want = replace(case, query=case.query.float(), k_pages=k, v_pages=v).reference()
    tolerance = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got.float(), want, atol=tolerance, rtol=tolerance)


def test_every_float8_value() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = values[torch.isfinite(values.float())]
    dim = len(values)
    v = values.view(1, 1, 1, dim).repeat(2, 1, 1, 1)
    group = np.zeros(1, np.int32)
    page, slot = np.zeros((1, 1), np.int32), np.ones((1, 1), np.int64)
    plan = plans.AttentionPlan.build(
        RowBatch(page, group, group, group, group, group + 1, slot), group + 1,
        heads_per_kv=1, block_m=16, split_tokens=None, device=DEVICE,
    )  # fmt: skip
    query = torch.ones((1, 1, dim), device=DEVICE)
    got = kernels.attention(
        query, torch.zeros_like(v).to(DEVICE), v.to(DEVICE), plan, AttentionOptions(1.0)
    )
    assert torch.equal(got[0, 0].cpu(), values.float())


def test_convenience_form() -> None:
    for batch in (BATCHES["mixed"], ([600], [3], 2)):
        case = make_case(SHAPES["sinks"], batch)
        got = kernels.paged_attention(
            case.query, case.k_pages, case.v_pages, case.batch, case.asked, case.options
        )
        assert_close(got, case.reference())


def test_no_queries() -> None:
    case = make_case(SHAPES["grouped"], ([3], [1], 1))
    empty = np.zeros(0, dtype=np.int32)
    plan = plans.AttentionPlan.build(
        RowBatch(np.zeros((0, 1), np.int32), *[empty] * 5, np.zeros((0, 1), np.int64)), empty,
        heads_per_kv=2, block_m=16, split_tokens=None, device=DEVICE,
    )  # fmt: skip
    out = kernels.attention(case.query[:0], case.k_pages, case.v_pages, plan, AttentionOptions(1.0))
    assert out.shape == (0, 4, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(2, 4)}, "query must be [T, heads, head_dim]"),
        ({"query": torch.zeros(1, 8, 4).transpose(1, 2)}, "a last stride of 1"),
        ({"query": torch.zeros(1, 4, 8).double()}, "query must be one of"),
        ({"query": torch.zeros(1, 4, 9)}, "query must have head_dim 8 as k_pages, got 9"),
        ({"query": torch.zeros(1, 6, 8)}, "plan must be for 1 queries and 3 heads per KV head"),
        ({"query": torch.zeros(2, 4, 8)}, "plan must be for 2 queries and 2 heads per KV head"),
        ({"k_pages": torch.zeros(3, 4, 16)}, "k_pages must be [num_pages"),
        ({"v_pages": torch.zeros(3, 4, 8, 2).transpose(2, 3)}, "v_pages must be [num_pages"),
        ({"k_pages": torch.zeros(3, 4, 2, 8).half()}, "k_pages must be torch.float32"),
        ({"v_pages": torch.zeros(2, 4, 2, 8)}, "v_pages must agree with k_pages"),
        ({"v_pages": torch.zeros(3, 4, 2, 300)}, "v_pages must have a head_dim up to 256, got 300"),
        ({"scaling": float("inf")}, "scaling must be finite, got inf"),
        ({"window": -1}, "window must be 0 (off) or more, got -1"),
        ({"softcap": -1.0}, "softcap must be 0 (off) or more, and finite, got -1.0"),
        ({"sinks": torch.zeros(3)}, "sinks must be contiguous of shape (4,), got (3,)"),
        ({"k_scale": torch.ones(2)}, "k_scale and v_scale must be given together"),
        ({"k_scale": torch.ones(2), "v_scale": torch.ones(2)}, "k_scale must be None for pages of"),
        ({"k_pages": torch.zeros(3, 4, 2, 8, device="meta")}, "k_pages must be on"),
    ],
)  # fmt: skip
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    case = make_case(SHAPES["grouped"], ([3], [1], 1), num_pages=8)
    changes = {
        name: value.to(DEVICE)
        if isinstance(value, Tensor) and value.device.type == "cpu"
        else value
        for name, value in changes.items()
    }
    arguments = {
        "query": torch.zeros(1, 4, 8, device=DEVICE),
        "k_pages": torch.zeros(3, 4, 2, 8, device=DEVICE),
        "v_pages": torch.zeros(3, 4, 2, 8, device=DEVICE),
        "plan": case.plan(),
        **changes,
    }
    given = {name: arguments.pop(name) for name in AttentionOptions._fields if name in arguments}
    arguments["options"] = AttentionOptions(**{"scaling": 1.0, **given})
    with pytest.raises(ValueError, match=re.escape(message)):
        kernels.attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": False}, "own must be given with a plan of the prefixes alone and with no other"),
        ({"own": None}, "own must be given with a plan of the prefixes alone and with no other"),
        ({"out": torch.zeros(1, 4, 7)}, "own.out must be torch.float32 of shape (1, 4, 8)"),
        ({"out": torch.zeros(1, 8, 4).transpose(1, 2)}, "own.out must be torch.float32 of shape"),
        ({"lse": torch.zeros(1, 4)}, "own.lse must be torch.float32 of shape (4, 1)"),
        ({"lse": torch.zeros(4, 1).half()}, "own.lse must be torch.float32 of shape (4, 1)"),
    ],
)  # fmt: skip
def test_bad_own_parts(changes: dict[str, Any], message: str) -> None:
    case = make_case(SHAPES["grouped"], ([3], [1], 1), num_pages=8)
    parts = {"out": torch.zeros(1, 4, 8), "lse": torch.zeros(4, 1), **changes}
    own = kernels.OwnPart(parts["out"].to(DEVICE), parts["lse"].to(DEVICE))
    with pytest.raises(ValueError, match=re.escape(message)):
        kernels.attention(
            case.query,
            case.k_pages,
            case.v_pages,
            case.plan(prefix_only=changes.get("plan", True)),
            case.options,
            own=changes.get("own", own),
        )


def test_bad_scales() -> None:
    case = make_case(SHAPES["grouped"], ([3], [1], 1), num_pages=8)
    k, v = (pages.to(torch.float8_e4m3fn) for pages in (case.k_pages, case.v_pages))
    ones = torch.ones(3, device=DEVICE)
    with pytest.raises(ValueError, match=r"k_scale must be float32 of shape \(2,\)"):
        kernels.attention(
            case.query, k, v, case.plan(), AttentionOptions(1.0), k_scale=ones, v_scale=ones
        )
