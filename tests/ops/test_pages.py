"""Copies and appends write what they should and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stars_fast.ops import copy_pages, kv_append


def pools(layers: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Layer i has i + 1 heads, so that layers of unequal shape are covered."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((9, 4, i + 1, 3), generator=generator).to(dtype) for i in range(layers)]


def indices(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copy_pages_per_token(dtype: torch.dtype) -> None:
    k, v = pools(3, dtype), pools(2, dtype)
    before = [x.clone() for x in (*k, *v)]
    copies = [(1, 5, 2), (1, 6, 4), (3, 7, 0), (8, 2, 1)]
    copy_pages(k, v, *(indices(*column) for column in zip(*copies, strict=True)))
    for now, old in zip((*k, *v), before, strict=True):
        want = old.clone()
        for src, dst, count in copies:
            want[dst, :count] = old[src, :count]
        assert torch.equal(now, want)


def test_sources_are_read_before_they_are_overwritten() -> None:
    k = pools(1)
    old = k[0].clone()
    copy_pages(k, [], indices(1, 2, 3), indices(2, 3, 1), indices(4, 4, 4))
    assert torch.equal(k[0][[2, 3, 1]], old[[1, 2, 3]])


def test_no_copies() -> None:
    k = pools(1)
    old = k[0].clone()
    copy_pages(k, [], indices(), indices(), indices())
    assert torch.equal(k[0], old)


def test_append() -> None:
    k, v = pools(2)[1], pools(2)[1] * 2
    before = k.clone(), v.clone()
    key = torch.arange(24.0).view(4, 2, 3)
    slots = torch.tensor([5, 0, 35, 0])
    kv_append(k, v, key, -key, slots)
    written = torch.zeros(36, dtype=torch.bool)
    written[slots] = True
    for now, old, new in ((k, before[0], key), (v, before[1], -key)):
        flat = now.flatten(0, 1)
        assert torch.equal(flat[[5, 35]], new[[0, 2]])
        assert torch.equal(flat[~written], old.flatten(0, 1)[~written])


def test_operators_are_well_formed() -> None:
    k, v = pools(2), pools(2)
    torch.library.opcheck(
        torch.ops.stars_fast.copy_pages.default, (k, v, indices(1), indices(2), indices(3))
    )
    key = torch.zeros((2, 1, 3))
    torch.library.opcheck(
        torch.ops.stars_fast.kv_append.default, (k[0], v[0], key, key, torch.tensor([5, 9]))
    )
