"""What top-k and top-p keep: our kernel, vLLM's (Qrita, arXiv 2602.01518) and the law in float64.

It needs vLLM, whose kernel is interpreted as ours is.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import vllm_masks
from torch import Tensor

kernels = pytest.importorskip("stars_fast.kernels.sample", reason="Triton is for Linux only")

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("compared in the interpreter", allow_module_level=True)

FILTERS = [(40, 1.0), (1, 1.0), (5, 0.5), (40, 0.95), (0, 0.95), (0, 0.5), (0, 0.1), (200, 0.9)]


def kept_by_vllm(logits: Tensor, k: Tensor, p: Tensor, folder: Path) -> Tensor:
    torch.save({"logits": logits, "k": k, "p": p}, folder / "given")
    # As this process finds packages; a child would begin with the script's folder.
    path = os.pathsep.join(sys.path)
    subprocess.run(
        [sys.executable, "-P", vllm_masks.__file__, str(folder / "given"), str(folder / "masked")],
        env=os.environ | {"PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "ERROR"},
        check=True,
    )
    masked: Tensor = torch.load(folder / "masked")
    return masked > -torch.inf


def draw(logits: Tensor, k: Tensor, p: Tensor, attempts: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probabilities among what is kept, ``[R, attempts]`` each."""
    rows = len(logits)
    repeated = (x.repeat_interleave(attempts, dim=0) for x in (logits, k % logits.shape[1], p))
    scaled, top_k, top_p = repeated
    ones = torch.ones(len(scaled))
    zeros = torch.zeros(len(scaled), dtype=torch.int64)
    attempt = torch.arange(attempts).repeat(rows)
    token, _, truncated, _, ok = kernels.sample(
        scaled, ones, top_k.to(torch.int32), top_p, 0.0 * ones, zeros, zeros, attempt, zeros
    )
    assert ok.all()
    return token.view(rows, attempts), truncated.view(rows, attempts)


def kept_by_ours(logits: Tensor, k: Tensor, p: Tensor) -> Tensor:
    """What a draw's log-probability says was kept: entries in descending order, by their mass."""
    token, truncated = (x[:, 0] for x in draw(logits, k, p))
    wide = logits.double()
    relative = wide - wide.amax(dim=1, keepdim=True)
    mass = (relative.gather(1, token[:, None])[:, 0] - truncated.double()).exp()
    values, order = relative.sort(dim=1, descending=True)
    last = (values.exp().cumsum(dim=1) - mass[:, None]).abs().argmin(dim=1)
    return torch.zeros_like(order).scatter(
        1, order, (torch.arange(logits.shape[1]) <= last[:, None]).long()
    ) == 1  # fmt: skip


def kept_by_law(logits: Tensor, k: Tensor, p: Tensor) -> Tensor:
    """The fewest of the k most probable tokens that have p of their probability, without ties."""
    values, order = logits.double().sort(dim=1, descending=True)
    hidden = torch.arange(logits.shape[1]) >= k[:, None]
    weights = values.masked_fill(hidden, -torch.inf).softmax(dim=1)
    before = weights.cumsum(dim=1) - weights
    keep = ~hidden & ((before < p.double()[:, None]) | (p[:, None] >= 1))
    return torch.zeros_like(keep).scatter(1, order, keep)


def test_kept_sets_are_equal(tmp_path: Path) -> None:
    logits = torch.randn((3 * len(FILTERS), 300), generator=torch.Generator().manual_seed(0))
    logits[len(FILTERS) :] *= 3.0  # the rest is flat
    k = torch.tensor([k or 300 for k, _ in FILTERS] * 3, dtype=torch.int32)
    p = torch.tensor([p for _, p in FILTERS] * 3)
    law = kept_by_law(logits, k, p)
    assert torch.equal(kept_by_ours(logits, k, p), law)
    assert torch.equal(kept_by_vllm(logits.clone(), k, p, tmp_path), law)


def test_where_the_two_differ(tmp_path: Path) -> None:
    """By ties: we keep all that equal the k-th, as transformers does, and vLLM exactly k.

    top-p keeps as many with both, of equal ones the first in vLLM and the last with us.
    """
    logits = torch.zeros((2, 12))
    logits[:, ::2] = 1.0
    logits[:, 5] = 2.0
    k, p = torch.tensor([3, 12], dtype=torch.int32), torch.tensor([1.0, 0.3])
    theirs = kept_by_vllm(logits.clone(), k, p, tmp_path)
    tokens, _ = draw(logits, k, p, attempts=40)
    ours = [set(row.tolist()) for row in tokens]
    first, second = (set(row.nonzero().flatten().tolist()) for row in theirs)
    assert first == {5, 0, 2}
    assert ours[0] == {5, *range(0, 12, 2)}
    assert second == {5, 0}
    assert ours[1] == {5, 10}
