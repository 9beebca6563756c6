"""Tiles hold every row once, and padding stays bounded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stars_fast.ops.batch import RowBatch
from stars_fast.ops.tiling import prefix_slots, tile_rows

group_lists = st.lists(
    st.tuples(st.integers(1, 20), st.sampled_from([0, 1, 100, 129, 1000, 9000])),
    min_size=1,
    max_size=12,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(groups=group_lists, limit=st.sampled_from([1, 32, 128, 1 << 30]), seed=st.integers(0, 99))
def test_every_row_once(groups: list[tuple[int, int]], limit: int, seed: int) -> None:
    group = np.repeat(np.arange(len(groups)), [n for n, _ in groups]).astype(np.int32)
    prefix = np.array([p for _, p in groups], dtype=np.int32)[group]
    new = np.random.default_rng(seed).integers(1, 200, len(group)).astype(np.int32)
    tiles = tile_rows(group, prefix, new, max_block_tokens=limit)
    seen = np.concatenate([tile.rows[tile.rows >= 0] for tile in tiles])
    assert sorted(seen) == list(range(len(group)))
    for tile in tiles:
        real = tile.rows >= 0
        assert real[:, 0].all()
        assert (group[tile.rows][real] == np.repeat(tile.groups, real.sum(1))).all()
        assert tile.rows.size <= 1.5 * real.sum()
        rows = tile.rows[real]
        assert tile.rows.shape[1] == 1 or tile.rows.shape[1] * new[rows].max() <= limit
        assert prefix[rows].max() <= max(128, 4 * prefix[rows].min())
        assert new[rows].max() <= max(32, 2 * new[rows].min())


def test_equal_groups_make_one_block_each() -> None:
    group = np.repeat(np.arange(5), 3)
    tiles = tile_rows(group, np.full(15, 50), np.full(15, 1), max_block_tokens=1 << 30)
    assert len(tiles) == 1
    assert tiles[0].rows.tolist() == np.arange(15).reshape(5, 3).tolist()
    assert tiles[0].groups.tolist() == [0, 1, 2, 3, 4]


def test_nothing_is_shared_of_an_empty_prefix() -> None:
    tiles = tile_rows(np.zeros(4, int), np.zeros(4, int), np.ones(4, int), max_block_tokens=128)
    assert tiles[0].rows.shape == (4, 1)


@pytest.mark.parametrize(("length", "want"), [
    (0, [0, 0, 0, 0, 0]),
    (2, [12, 13, 13, 13, 13]),
    (3, [12, 13, 20, 20, 20]),
    (5, [12, 13, 20, 21, 22]),
])  # fmt: skip
def test_prefix_slots_step_over_the_padding(length: int, want: list[int]) -> None:
    none = np.zeros(0, np.int32)
    pages, padding = np.array([[9, 9], [3, 5]]), (np.array([0, 2]), np.array([0, 4]))
    batch = RowBatch(pages, *padding, none, none, none, none)
    got = prefix_slots(batch, np.array([1]), np.array([length]), 4, 5)
    assert got.tolist() == [want]
