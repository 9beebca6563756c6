"""Arguments of `sample` for the tests of its PyTorch form and of its Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from stars_fast import ops

Sample = Callable[..., tuple[Tensor, ...]]

# temperature, top_k, top_p, min_p
FILTERS = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 0, 1.0, 0.0),
    (0.8, 40, 1.0, 0.0),
    (1.3, 1, 1.0, 0.0),
    (1.0, 5, 0.8, 0.0),
    (1.0, 0, 0.9, 0.0),
    (0.5, 0, 0.3, 0.0),
    (1.0, 0, 1.0, 0.05),
    (1.5, 20, 0.95, 0.1),
    (1.0, 0, 0.7, 0.3),
    (1.0, 10_000, 0.55, 0.0),
]


@dataclass(frozen=True)
class Rows:
    """Arguments of `sample`, one entry per row."""

    logits: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    position: Tensor
    attempt: Tensor
    stream: Tensor
    live: Tensor | None = None

    def arguments(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def draw(self, sample: Sample = ops.sample) -> tuple[Tensor, ...]:
        return sample(*self.arguments())

    def pick(self, index: Tensor) -> Rows:
        return Rows(*(None if x is None else x[index] for x in self.arguments()))


def rows(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
) -> Rows:
    """Rows with the same parameters and seeds `seed`, `seed` + 1, ..."""
    n = logits.shape[0]
    return Rows(
        logits,
        torch.full((n,), temperature),
        torch.full((n,), top_k, dtype=torch.int32),
        torch.full((n,), top_p),
        torch.full((n,), min_p),
        torch.arange(seed, seed + n),
        torch.full((n,), 3),
        torch.full((n,), 1, dtype=torch.int32),
        torch.full((n,), 2, dtype=torch.int32),
    )


def row_of_each_filter(
    vocab_size: int, *, levels: int | None = None, masked: float = 0.0, seed: int = 0
) -> Rows:
    """One row for each of `FILTERS` and a greedy one.

    With `levels`, logits take that many distinct values; a share `masked` of them is -inf.
    """
    filters = [*FILTERS, (0.0, 0, 1.0, 0.0)]
    generator = torch.Generator().manual_seed(seed)
    shape = (len(filters), vocab_size)
    logits = 3 * torch.randn(shape, generator=generator)
    if levels is not None:
        logits = torch.randint(0, levels, shape, generator=generator) / 2
    hidden = torch.rand(shape, generator=generator) < masked
    hidden[:, seed % vocab_size] = False
    temperature, top_k, top_p, min_p = zip(*filters, strict=True)
    n = torch.arange(len(filters))
    return Rows(
        logits.masked_fill(hidden, -torch.inf),
        torch.tensor(temperature),
        torch.tensor(top_k, dtype=torch.int32),
        torch.tensor(top_p),
        torch.tensor(min_p),
        seed + n * 7919 - 2**62,
        n % 5,
        n % 3,
        n % 4,
    )


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    """Whether two results are equal to the bit, NaN and NaN included."""
    return all(
        torch.equal(a.nan_to_num(-9.0), b.nan_to_num(-9.0)) for a, b in zip(got, want, strict=True)
    )
