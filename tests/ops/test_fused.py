"""The operators between a layer's products: C++ on every instruction set against PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stars_fast import _cpu
from stars_fast.ops.backend import backend
from stars_fast.ops.fused import Norm, Rotary, gated, rms_norm, rotate

SETS = ("baseline", "avx2", "avx512")


def both(function: Callable[..., Any], *args: object) -> tuple[Any, Any]:
    """Return what C++ and PyTorch make of copies of the same tensors."""

    def copies() -> list[object]:
        return [x.clone() if isinstance(x, Tensor) else x for x in args]

    got = function(*copies())
    with backend("pytorch"):
        return got, function(*copies())


@pytest.mark.parametrize("dim", [1, 7, 16, 48, 576])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("behind_residual", [False, True])
def test_rms_norm(dim: int, offset: float, heads: int | None, behind_residual: bool) -> None:
    torch.manual_seed(0)
    shape = (5, dim) if heads is None else (5, heads, dim)
    x, weight = torch.randn(shape), torch.randn(dim)
    residual = torch.randn(shape) if behind_residual else None
    (got, total), (want, wanted) = both(rms_norm, x, Norm(weight, 1e-5, offset), residual)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(total, wanted, rtol=0, atol=0)


def test_rms_norm_of_a_part_of_a_product() -> None:
    """As queries lie beside keys: rows are apart."""
    product = torch.randn(4, 3 * 8 + 5)
    part = product[:, : 3 * 8].view(4, 3, 8)
    (got, _), (want, _) = both(lambda x: rms_norm(x, Norm(torch.ones(8), 1e-6)), part)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dim", [1, 30, 64])
def test_gated(activation: str, dim: int) -> None:
    both_parts = torch.randn(6, 2 * dim) * 8
    both_parts[0, 0], both_parts[1, 0] = 200.0, -200.0  # where exp has no finite result

    def run(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return gated(gate, up, activation)  # type: ignore[arg-type]

    got, want = both(run, both_parts)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=5e-6)


def test_nan_stays_nan() -> None:
    gate = torch.tensor([[torch.nan, 1.0, 2.0]])
    assert gated(gate, torch.ones(1, 3), "silu").isnan().tolist() == [[True, False, False]]
    normed, _ = rms_norm(gate, Norm(torch.ones(3), 1e-6))
    assert normed.isnan().all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "turning"), [(8, 8), (12, 12), (64, 64), (20, 6)])
def test_rotate(interleaved: bool, dim: int, turning: int) -> None:
    tables = torch.randn(4, turning), torch.randn(4, turning)
    got, want = both(rotate, torch.randn(4, 3, dim), Rotary(*tables, interleaved))
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("instruction_set", SETS)
def test_every_instruction_set(instruction_set: str) -> None:
    """This file and its neighbours, on the narrower sets that run here."""
    if SETS.index(instruction_set) >= SETS.index(_cpu.instruction_set()):
        pytest.skip(f"{_cpu.instruction_set()} is what runs here, and is tested by itself")
    others = ("ops/test_int8", "ops/test_sample_forms", "models/test_native_decode")
    tests = [__file__, *(__file__.replace("ops/test_fused", other) for other in others)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        [*command, "-k", "not every_instruction_set", "-n", "0"],
        env={**os.environ, "STARS_FAST_CPU": instruction_set, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
