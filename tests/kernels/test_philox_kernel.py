"""The Triton Philox4x32-10 against the published answers and the PyTorch form."""

from __future__ import annotations

import pytest
import torch
from helpers.philox_vectors import PHILOX4X32_10

from stars_fast import ops

kernels = pytest.importorskip("stars_fast.kernels.philox", reason="Triton is for Linux only")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def words(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return kernels.philox4x32(counter.to(DEVICE), key.to(DEVICE)).cpu()


def test_known_answers() -> None:
    counters, keys, want = (list(column) for column in zip(*PHILOX4X32_10, strict=True))
    assert words(torch.tensor(counters), torch.tensor(keys)).tolist() == [list(w) for w in want]


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 1000])
def test_bits_of_the_pytorch_form(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    counter = torch.randint(0, 2**32, (n, 4), generator=generator)
    key = torch.randint(0, 2**32, (n, 2), generator=generator)
    assert torch.equal(words(counter, key), ops.philox4x32(counter, key))


def test_strided_arguments() -> None:
    counter = torch.randint(0, 2**32, (4, 9)).T
    key = torch.randint(0, 2**32, (2, 9)).T
    assert torch.equal(words(counter, key), ops.philox4x32(counter, key))


@pytest.mark.parametrize(
    ("counter", "key", "name"),
    [
        (torch.zeros(3, 3, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64), "counter"),
        (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64), "key"),
        (torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.int64), "counter"),
        (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int32), "key"),
    ],
)
def test_bad_arguments(counter: torch.Tensor, key: torch.Tensor, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be int64 of shape \(3, "):
        kernels.philox4x32(counter, key)
