"""Linear layers with 8-bit weights, symmetric and with a scale for each output channel.

Activations are rounded to 16 bits with a scale for each row, and the products are summed as
integers. So a result depends on its own row alone: neither on the batch, nor on threads, nor on the
processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stars_fast.ops import cpu

PANEL = 32  # outputs whose weights lie together; as csrc/cpu/int8.h has it
_TOGETHER = 4  # inputs of an output that lie together
_LARGEST = 127 * 256 + 127  # of a rounded activation
_SMALLEST = 1e-30  # rows below it count as zeros
#: Inputs that the sums hold.
MOST_INPUTS = 65536


class Int8Layer(NamedTuple):
    """A linear layer with weights scale * (packed - 128).

    Attributes
    ----------
    packed : Tensor
        uint8 ``[ceil(N / 32), ceil(K / 4), 32, 4]`` of a weight ``[N, K]``, 128 beyond its ends.
    scale : Tensor
        float32 ``[N]``.
    bias : Tensor or None
        float32 ``[N]``.
    """

    packed: Tensor
    scale: Tensor
    bias: Tensor | None = None


def quantize(weight: Tensor) -> Int8Layer:
    """Round a weight ``[N, K]`` of any float dtype to multiples of max|w| / 127 of its row."""
    weight = weight.detach().float()
    outputs, inputs = weight.shape
    scale = weight.abs().amax(dim=1) / 127
    steps = torch.where(scale > 0, scale, 1).unsqueeze(1)
    whole = ((weight / steps).round_().clamp_(-127, 127) + 128).to(torch.uint8)
    pad = (0, -inputs % _TOGETHER, 0, -outputs % PANEL)
    whole = torch.nn.functional.pad(whole, pad, value=128)
    panels = whole.view(-1, PANEL, whole.shape[1] // _TOGETHER, _TOGETHER)
    return Int8Layer(panels.transpose(1, 2).contiguous(), scale)


def weight_rows(layer: Int8Layer, rows: Tensor, inputs: int) -> Tensor:
    """Return the float32 weights ``[..., K]`` of outputs, int64 ``[...]``."""
    panel, place = rows // PANEL, rows % PANEL
    whole = layer.packed[panel, :, place].flatten(-2)[..., :inputs]
    return (whole.float() - 128) * layer.scale[rows].unsqueeze(-1)


def int8_linear(x: Tensor, layers: Sequence[Int8Layer]) -> Tensor:
    """Return the results of linear layers on one input, side by side.

    Parameters
    ----------
    x : Tensor
        float32 ``[..., K]``.
    layers : sequence of Int8Layer
        Of K inputs.

    Returns
    -------
    Tensor
        float32 ``[..., N]``, N the layers' outputs together. A row that is not finite gives NaN.
    """
    if cpu.runs_on(x):
        return cpu.int8_linear(x, layers)
    flat = x.reshape(-1, x.shape[-1])
    largest = flat.abs().amax(dim=1, keepdim=True)
    used = largest.isfinite() & (largest >= _SMALLEST)
    top = largest.new_tensor(_LARGEST)  # a number over a tensor would be rounded twice
    inverse = torch.where(used, top / torch.where(used, largest, 1), 0)
    scale = torch.where(largest.isfinite(), largest / top, torch.nan)
    rounded = torch.where(used, flat * inverse, 0).round().double()  # products are exact
    results = []
    for layer in layers:
        outputs = len(layer.scale)
        whole = layer.packed.transpose(1, 2).flatten(0, 1).flatten(1)[:outputs, : x.shape[-1]]
        total = (rounded @ (whole.double() - 128).T).float()
        result = total * (scale * layer.scale)
        results.append(result if layer.bias is None else result + layer.bias)
    return torch.cat(results, dim=1).view(*x.shape[:-1], -1)
