"""Every query of a batch meets each of its keys in exactly one item."""

from __future__ import annotations

import re
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stars_fast.ops.batch import RowBatch

plans = pytest.importorskip("stars_fast.kernels.attention_plan", reason="Triton is for Linux only")
CPU = torch.device("cpu")
Ints = list[int]


def tables(
    prefixes: Ints, candidates: Ints, new: Ints, queries: Ints
) -> tuple[NDArray[np.int32], ...]:
    """The first arguments of `plan_items`."""
    group = np.repeat(np.arange(len(prefixes)), candidates)
    arrays = (group, np.array(prefixes)[group], new, queries)
    return tuple(np.asarray(array, dtype=np.int32) for array in arrays)


@st.composite
def batches(draw: st.DrawFn) -> tuple[NDArray[np.int32], ...]:
    prefixes = draw(st.lists(st.integers(0, 70), min_size=1, max_size=5))
    count = len(prefixes)
    candidates = draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    rows = sum(candidates)
    new = draw(st.lists(st.integers(1, 60), min_size=rows, max_size=rows))
    queries = [draw(st.integers(1, length)) for length in new]
    return tables(prefixes, candidates, new, queries)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=batches(),
    heads_per_kv=st.sampled_from([1, 3, 4, 40]),
    block_m=st.sampled_from([16, 64]),
    split_tokens=st.sampled_from([None, 1, 16, 33]),
    prefix_only=st.booleans(),
)
def test_every_query_meets_each_key_once(
    batch: tuple[NDArray[np.int32], ...],
    heads_per_kv: int,
    block_m: int,
    split_tokens: int | None,
    prefix_only: bool,
) -> None:
    group, start, new, asked = batch
    planned = plans.plan_items(
        *batch, heads_per_kv=heads_per_kv, block_m=block_m, split_tokens=split_tokens,
        prefix_only=prefix_only,
    )  # fmt: skip
    most = max(1, block_m // heads_per_kv)
    end = np.cumsum(asked)
    query_row = np.repeat(np.arange(len(new)), asked)
    prefix: dict[int, Ints] = {query: [] for query in range(len(query_row))}
    own: Counter[int] = Counter()
    at: dict[int, Ints] = {query: [] for query in prefix}
    for g, first, count, row, end_row, begin, stop, partial in planned.items.tolist():
        assert 1 <= count <= most
        assert split_tokens is None or stop - begin <= split_tokens
        for i in range(count):
            query = first + i
            assert group[query_row[query]] == g == group[row]
            prefix[query] += range(begin, stop)
            own[query] += row <= query_row[query] < end_row
            at[query].append(partial + i if partial >= 0 else -1)
        if end_row > row:
            assert first >= end[row] - asked[row]
            assert first + count <= end[end_row - 1]
    merges = {query: rest for query, *rest in planned.merges.tolist()}
    assert len(merges) == len(planned.merges)
    used = []
    for query, row in enumerate(query_row):
        assert sorted(prefix[query]) == list(range(start[row]))
        assert own[query] == (not prefix_only)
        assert query in merges or not prefix_only
        if query in merges:
            partial, count, stride = merges[query]
            assert count > 1 or prefix_only
            assert sorted(at[query]) == [partial + k * stride for k in range(count)]
            used += at[query]
        else:
            assert at[query] == [-1]
    assert sorted(used) == list(range(planned.num_partials))


def test_rows_share_tiles_but_long_ones_do_not() -> None:
    batch = tables([8, 0], [5, 2], [3, 3, 40, 2, 2, 1, 1], [3, 3, 40, 2, 2, 1, 1])
    items = plans.plan_items(*batch, heads_per_kv=4, block_m=64, split_tokens=None).items
    tiles = sorted((row, end_row, count) for _, _, count, row, end_row, *_ in items.tolist())
    assert tiles == [(0, 2, 6), (2, 3, 8), (2, 3, 16), (2, 3, 16), (3, 5, 4), (5, 7, 2)]
    # The costliest first: the long row's last piece sees its 40 own tokens and 8 of the prefix.
    assert items[0].tolist() == [0, 38, 8, 2, 3, 0, 8, -1]


def test_many_own_tokens_have_items_of_their_own() -> None:
    batch = tables([100], [16], [128] * 16, [1] * 16)
    planned = plans.plan_items(*batch, heads_per_kv=4, block_m=64, split_tokens=512)
    rows = sorted((row, end_row, stop) for *_, row, end_row, _, stop, _ in planned.items.tolist())
    assert rows == [(0, 0, 100), (0, 4, 0), (4, 8, 0), (8, 12, 0), (12, 16, 0)]
    assert planned.num_partials == 32


def test_splits_do_not_depend_on_other_groups() -> None:
    alone = plans.plan_items(
        *tables([1300], [3], [9] * 3, [1] * 3), heads_per_kv=4, block_m=64, split_tokens=512
    )
    among = plans.plan_items(
        *tables([1300, 4000, 0], [3, 2, 4], [9, 9, 9, 40, 40, 5, 5, 5, 5], [1] * 9),
        heads_per_kv=4, block_m=64, split_tokens=512,
    )  # fmt: skip
    mine = sorted(item for item in among.items[:, :7].tolist() if item[0] == 0)
    assert mine == sorted(alone.items[:, :7].tolist())


def test_large_batches_are_planned_fast() -> None:
    rng = np.random.default_rng(0)
    candidates = [16] * 256
    new = rng.integers(1, 64, 4096).tolist()
    batch = tables(rng.integers(0, 4000, 256).tolist(), candidates, new, new)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        plans.plan_items(*batch, heads_per_kv=4, block_m=128, split_tokens=None)
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.02  # about 2 ms; the margin is for busy machines


@pytest.mark.parametrize("lengths", [[], [1]])
def test_small_batches(lengths: Ints) -> None:
    batch = tables([3], [len(lengths)], lengths, lengths)
    planned = plans.plan_items(*batch, heads_per_kv=4, block_m=16, split_tokens=512)
    assert len(planned.items) == len(lengths)
    assert planned.num_partials == len(planned.merges) == 0


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("heads_per_kv", 0, "at least 1"),
        ("block_m", 32, "one of (16, 64, 128)"),
        ("split_tokens", 0, "None or at least 1"),
    ],
)
def test_bad_parameters(name: str, value: int, allowed: str) -> None:
    options = {"heads_per_kv": 4, "block_m": 16, "split_tokens": 512, name: value}
    with pytest.raises(ValueError, match=re.escape(f"{name} must be {allowed}, got {value}")):
        plans.plan_items(*tables([3], [1], [2], [2]), **options)


def decode_capacity(**changed: int) -> object:
    sizes = {"rows": 8, "groups": 3, "pages": 12, "own": 6, "max_prefix": 60, **changed}
    return plans.PlanCapacity.of_decode(**sizes, heads_per_kv=4, block_m=16, split_tokens=16)


def on_pages(pages: np.ndarray, batch: tuple[np.ndarray, ...], slots: np.ndarray) -> RowBatch:
    """Rows of `tables` on pages without prompt padding."""
    group, start, new, _ = batch
    none = np.zeros(len(pages), np.int32)
    return RowBatch(pages, none, none, group, start, new, slots)


def test_rounds_within_the_capacity_fit() -> None:
    rng = np.random.default_rng(0)
    plan = plans.AttentionPlan.allocate(
        decode_capacity(), heads_per_kv=4, block_m=16, split_tokens=16, device=CPU
    )
    address = plan.items.data_ptr()
    for _ in range(50):
        groups = int(rng.integers(1, 4))
        candidates = [int(n) for n in rng.multinomial(8 - groups, [1 / groups] * groups) + 1]
        rows = sum(candidates)
        new = rng.integers(1, 7, rows)
        _, start, new, _ = batch = tables(
            rng.integers(0, 61, groups).tolist(), candidates, new.tolist(), [1] * rows
        )
        pages = rng.integers(1, 99, (groups, 4)).astype(np.int32)
        slots = rng.integers(0, 99, (rows, int(new.max())))
        own = np.zeros(rows, dtype=np.int32)
        plan.write(on_pages(pages, batch, slots), batch[3], query_own=own)
        covered = np.zeros(8, dtype=int)
        for first, count in plan.items[: int(plan.num_items), 1:3].tolist():
            covered[first : first + count] += 1
        assert (covered >= 1).all()
        assert plan.items.data_ptr() == address
        assert plan.slots[:rows, : slots.shape[1]].tolist() == slots.tolist()
        assert not plan.slots[rows:].any()
        assert not plan.slots[:, slots.shape[1] :].any()
        assert plan.row_start[:rows].tolist() == start.tolist()
        assert plan.group_pages[: pages.size].tolist() == pages.ravel().tolist()


@pytest.mark.parametrize("field", ["rows", "groups", "pages", "own"])
def test_rounds_past_the_capacity_are_refused(field: str) -> None:
    plan = plans.AttentionPlan.allocate(
        decode_capacity(**{field: 1}), heads_per_kv=4, block_m=16, split_tokens=16, device=CPU
    )
    batch = tables([20, 3], [2, 1], [4, 4, 4], [1, 1, 1])
    pages, slots = np.ones((2, 4), np.int32), np.ones((3, 4), np.int64)
    with pytest.raises(ValueError, match=r"must be at most 1 in this plan, got [2348]"):
        plan.write(on_pages(pages, batch, slots), batch[3])
    assert not plan.buffer.any()


def test_long_prefixes_past_the_capacity_are_refused() -> None:
    plan = plans.AttentionPlan.allocate(
        decode_capacity(max_prefix=16), heads_per_kv=4, block_m=16, split_tokens=16, device=CPU
    )
    batch = tables([600], [3], [4, 4, 4], [1, 1, 1])
    pages, slots = np.ones((1, 4), np.int32), np.ones((3, 4), np.int64)
    with pytest.raises(ValueError, match="items must be at most"):
        plan.write(on_pages(pages, batch, slots), batch[3])
