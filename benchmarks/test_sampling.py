"""Sampling: one token of each row, against PyTorch's operators and transformers' warpers."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from stars_fast import ops
from stars_fast.benchmarks.compare import Compare
from stars_fast.benchmarks.kernel_cases import samplers, warped
from stars_fast.ops.philox import token_noise_all

#: Temperature, top-k, top-p.
FILTERS = {
    "temperature": (0.8, 0, 1.0),
    "top-k 40": (0.8, 40, 1.0),
    "top-p 0.95": (0.8, 0, 0.95),
}
SHAPES = [
    *((rows, 32_000) for rows in (1, 4, 16, 64, 256, 1024, 4096)),
    *((64, vocabulary) for vocabulary in (8_192, 128_256, 262_144)),
]
SMALL_SHAPES = [(3, 1009)]

_SORTED_LOGITS = 1 << 26  # on a CPU: more take minutes in a peer that sorts them


@pytest.mark.sizes(("rows", "vocabulary"), full=SHAPES, small=SMALL_SHAPES)
@pytest.mark.parametrize("name", FILTERS)
def test_sample(
    compare: Compare, device: torch.device, name: str, rows: int, vocabulary: int
) -> None:
    """Logits like a language model's: most mass on few of many tokens."""
    if device.type == "cpu" and "top-p" in name and rows * vocabulary > _SORTED_LOGITS:
        pytest.skip("a peer would sort for minutes")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(rows)
    logits = 3.0 * torch.randn((rows, vocabulary), generator=generator, device=device)
    logits = logits.to(dtype)
    temperature, top_k, top_p = FILTERS[name]
    draw = (
        torch.arange(rows, device=device),
        torch.full((rows,), 7, device=device),
        torch.zeros(rows, dtype=torch.int64, device=device),
        torch.zeros(rows, dtype=torch.int64, device=device),
    )

    def ours() -> Tensor:
        return ops.sample(
            logits,
            torch.full((rows,), temperature, device=device),
            torch.full((rows,), top_k, dtype=torch.int32, device=device),
            torch.full((rows,), top_p, device=device),
            torch.zeros(rows, device=device),
            *draw,
            with_entropy=False,
        )[0]

    few = min(rows, 64)
    kept = warped(logits[:few], temperature, top_k, top_p)
    seed, position, attempt, stream = (column[:few] for column in draw)
    noise = token_noise_all(seed, position, attempt, stream, vocabulary)
    same = (ours()[:few] == (kept + noise).argmax(dim=-1)).float().mean()
    # Two roundings of logit and noise may order a near tie differently.
    assert same >= 1 - 2 / max(few, 64)
    peers = samplers([logits], temperature, top_k, top_p)
    for peer in peers.values():
        peer(0)
    compare(
        ours,
        {peer: functools.partial(job, 0) for peer, job in peers.items()},
        work={"rows": rows, "vocabulary": vocabulary},
        filter=name,
    )
