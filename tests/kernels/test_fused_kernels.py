"""Kernels of what lies between a layer's products, against PyTorch's forms of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stars_fast.ops.backend import backend
from stars_fast.ops.fused import (
    Activation,
    Norm,
    Rotary,
    gated,
    norm_add,
    norm_heads,
    rms_norm,
    rotate_append,
)

pytest.importorskip("triton", reason="Triton is for Linux only")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def close(got: Tensor, want: Tensor) -> None:
    """Equal up to the sums' order: a step of the type's last place, where it has few."""
    exact = got.dtype == torch.float32
    step = 0.0 if exact else torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, want, rtol=2e-6 if exact else step, atol=2e-6 + step / 4)


def both(function: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """What kernels and PyTorch make of the same tensors."""
    with backend("triton"):
        got = function(*args)
    with backend("pytorch"):
        return got, function(*args)


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("dim", "offset", "rounds_first"), [(7, 0.0, True), (48, 1.0, False)])
@pytest.mark.parametrize("parts", ["alone", "residual", "between", "add"])
def test_norms(dtype: torch.dtype, dim: int, offset: float, rounds_first: bool, parts: str) -> None:
    """Of rows that lie apart, as parts of a product do."""
    x = randn(3, 2 * dim, dtype=dtype)[:, :dim] * 3
    residual = randn(3, dim, dtype=dtype, seed=1)
    norm, before = (
        Norm(randn(dim, dtype=dtype, seed=seed), 1e-5, offset, rounds_first) for seed in (2, 3)
    )
    if parts == "add":
        close(*both(norm_add, x, norm, residual))
        close(*both(norm_add, x, None, residual, 0.37))
        return
    args = {"alone": (), "residual": (residual,), "between": (residual, before, 0.37)}[parts]
    (got, total), (want, wanted) = both(rms_norm, x, norm, *args)
    close(got, want)
    close(total, wanted)
    assert got.is_contiguous()


def test_a_weight_in_float32_gives_what_pytorch_gives() -> None:
    x = randn(3, 12, dtype=torch.bfloat16)
    norm = Norm(randn(12, dtype=torch.float32), 1e-6)
    (got, _), (want, _) = both(rms_norm, x, norm)
    assert got.dtype == want.dtype == torch.float32
    close(got, want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 12), (9, 3, 8), (1, 1, 1000)])
def test_norms_of_heads(dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    product = randn(2, (heads + 2 * kv_heads) * dim, dtype=dtype)
    query, key, _ = product.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
    norms = [Norm(randn(dim, dtype=dtype, seed=seed), 1e-6, 1.0, False) for seed in (1, 2)]
    for got, want in zip(*both(norm_heads, query, key, *norms, dim), strict=True):
        close(got, want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dim", [5, 1030])
def test_gates(dtype: torch.dtype, activation: Activation, dim: int) -> None:
    product = randn(2, 2 * dim, dtype=dtype) * 6
    product[0, 0], product[1, 0] = 90.0, -90.0  # where exp has no finite result
    gate, up = product.chunk(2, dim=1)
    close(*both(gated, gate, up, activation))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("stored", ["same", "fp8"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim", "turning", "order", "wide"),
    [
        (4, 2, 8, 8, 8, {}, False),
        (5, 1, 12, 6, 4, {"interleaved": True}, False),
        (9, 3, 20, 24, 6, {}, True),
        (3, 3, 12, 8, 4, {"start": 8, "parted": True}, False),
        (2, 2, 9, 6, 6, {"start": 1, "parted": True}, True),
        (3, 1, 11, 8, 6, {"start": 3}, False),
    ],
)
def test_rotation_and_append(
    dtype: torch.dtype,
    stored: str,
    heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int,
    turning: int,
    order: dict[str, Any],
    wide: bool,
) -> None:
    """Queries, keys and values as parts of one product; slots that occur twice are page 0's."""
    tokens = 4
    sizes = [heads * dim, kv_heads * dim, kv_heads * value_dim]
    parts = (randn(tokens, sum(sizes), dtype=dtype) * 4).split(sizes, dim=1)
    inputs = [x.view(tokens, -1, d) for x, d in zip(parts, (dim, dim, value_dim), strict=True)]
    table = torch.float32 if wide else dtype
    rotary = Rotary(*(randn(tokens, turning, dtype=table, seed=s) for s in (1, 2)), **order)
    slots = torch.tensor([5, 0, 11, 0], device=DEVICE)
    scales = []
    if stored == "fp8":
        scales = [torch.rand(kv_heads, device=DEVICE) + 0.01 for _ in range(2)]

    def run() -> tuple[Tensor, ...]:
        kept = torch.float8_e4m3fn if stored == "fp8" else dtype
        pools = [torch.zeros((3, 4, kv_heads, d), device=DEVICE).to(kept) for d in (dim, value_dim)]
        query = rotate_append(*inputs, rotary, *pools, slots, *scales)
        return query, *(pool.flatten(0, 1)[1:].float() for pool in pools)

    got, want = both(run)
    close(got[0], want[0])
    for mine, other in zip(got[1:], want[1:], strict=True):
        if stored == "fp8":  # a difference in the last place may round to another value
            torch.testing.assert_close(mine, other, rtol=0.126, atol=2**-9)
            assert (mine != other).sum() <= 2
        else:
            close(mine.to(dtype), other.to(dtype))
        assert mine[4].any()
        assert mine[10].any()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x: rms_norm(x.t(), Norm(x[0], 1e-6)), "x must have 2 dimensions, last stride 1"),
        (lambda x: rms_norm(x, Norm(x[0, :3], 1e-6)), r"norm.weight must have shape \[4\]"),
        (lambda x: norm_add(x, Norm(x[0], 1e-6), x[:1]), r"residual must be .* of shape \[2, 4\]"),
        (
            lambda x: norm_heads(x, x[:1], *(Norm(x[0], 1e-6),) * 2, 4),
            "key must be heads of 4 channels of 2 tokens",
        ),
        (lambda x: gated(x, x[:, :2], "silu"), r"up must be \[T, D\]"),
        (lambda x: gated(x, x, "relu"), "activation must be one of"),  # type: ignore[arg-type]
        (
            lambda x: rotate_append(
                *(x.view(2, 1, 4),) * 3,
                Rotary(x[:1], x),
                *(x.new_zeros(1, 4, 1, 4),) * 2,
                torch.zeros(2, dtype=torch.int64, device=DEVICE),
            ),
            "rotary.cos must be .2, an even number up to 4",
        ),
    ],
)
def test_what_does_not_fit_is_named(run: Callable[[Tensor], object], message: str) -> None:
    with backend("triton"), pytest.raises(ValueError, match=message):
        run(torch.zeros(2, 4, device=DEVICE))


def test_no_tokens() -> None:
    with backend("triton"):
        x = torch.zeros(0, 8, device=DEVICE)
        assert rms_norm(x, Norm(x.new_ones(8), 1e-6))[0].shape == (0, 8)
        assert gated(x, x, "silu").shape == (0, 8)
