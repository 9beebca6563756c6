"""Products with 8-bit weights: C++ on every instruction set against PyTorch, bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stars_fast.ops.backend import backend
from stars_fast.ops.int8 import Int8Layer, int8_linear, quantize, weight_rows


def a_layer(outputs: int, inputs: int, *, bias: bool = True) -> Int8Layer:
    layer = quantize(torch.randn(outputs, inputs))
    return layer._replace(bias=torch.randn(outputs)) if bias else layer


def both(x: Tensor, layers: list[Int8Layer]) -> tuple[Tensor, Tensor]:
    with backend("pytorch"):
        want = int8_linear(x, layers)
    return int8_linear(x, layers), want


@pytest.mark.parametrize("rows", [1, 2, 7, 70])
@pytest.mark.parametrize("inputs", [1, 6, 64, 577, 1540])
def test_same_bits(rows: int, inputs: int) -> None:
    torch.manual_seed(rows + inputs)
    x = torch.randn(rows, inputs) * torch.logspace(-4, 4, rows).unsqueeze(1)
    x[0, 0] = 300.0  # much larger than the rest
    got, want = both(x, [a_layer(70, inputs), a_layer(32, inputs, bias=False), a_layer(1, inputs)])
    assert got.shape == (rows, 103)
    assert torch.equal(got, want)


def test_the_largest_sums() -> None:
    """All weights and activations at their ends: what adds up is not cut off."""
    inputs = 65536
    layer = quantize(torch.ones(33, inputs))
    layer.packed[0, :, 1] = 1  # -127
    got, want = both(torch.ones(3, inputs), [layer])
    assert torch.equal(got, want)
    torch.testing.assert_close(got[:, 0], torch.full((3,), float(inputs)))
    torch.testing.assert_close(got[:, 1], torch.full((3,), -float(inputs)))


def test_a_row_depends_on_itself_alone() -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(70, 130), a_layer(65, 130)
    whole = int8_linear(x, [layer])
    assert torch.equal(whole, torch.cat([int8_linear(row, [layer]) for row in x.split(1)]))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(whole, int8_linear(x, [layer]))
    finally:
        torch.set_num_threads(threads)


def test_rows_without_a_scale() -> None:
    layer = a_layer(5, 9)
    x = torch.ones(4, 9)
    x[0], x[1, 3], x[2, 4] = 0.0, torch.nan, torch.inf
    got, want = both(x, [layer])
    assert torch.equal(got.isnan(), want.isnan())
    assert got.isnan().all(dim=1).tolist() == [False, True, True, False]
    assert layer.bias is not None
    assert torch.equal(got[0], layer.bias)


def test_weights_are_within_half_a_step() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 33)
    weight[3] = 0.0
    rounded = weight_rows(quantize(weight), torch.arange(40), 33)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((rounded - weight).abs() <= step / 2 * 1.0001).all()
    x = torch.randn(2, 33, dtype=torch.float32)
    close = int8_linear(x, [quantize(weight)])
    torch.testing.assert_close(close, x @ rounded.T, rtol=2e-4, atol=2e-3)


def test_too_many_inputs() -> None:
    layer = a_layer(1, 65540)
    with pytest.raises(ValueError, match="inputs must be at most 65536, got 65540"):
        int8_linear(torch.ones(1, 65540), [layer])
