"""The operators of `csrc/cpu`, on tensors: float32 on a CPU, by the processor's vectors.

They take addresses, so that shapes, dtypes and strides are this module's to see to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stars_fast import _cpu
from stars_fast.ops.backend import plain
from stars_fast.ops.batch import BatchLike
from stars_fast.ops.tiling import prefix_slots

if TYPE_CHECKING:
    from stars_fast.ops.fused import Rotary
    from stars_fast.ops.int8 import Int8Layer

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


def runs_on(x: Tensor) -> bool:
    """Whether operators on a tensor run here: unless PyTorch's form is asked for."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not plain()


def _rows(x: Tensor) -> Tensor:
    """Return the tensor with all but its first dimension contiguous."""
    width = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if stride != width and size != 1:
            return x.contiguous()
        width *= size
    return x


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `stars_fast.ops.fused.rms_norm`."""
    x = _rows(x)
    out = x.new_empty(x.shape)
    total = x if residual is None else x.new_empty(x.shape)
    added = None if residual is None else _rows(residual)
    dim = x.shape[-1]
    heads = x.shape[1] if x.ndim == 3 else 1
    _cpu.norm(
        x.data_ptr(),
        0 if added is None else added.data_ptr(),
        weight.data_ptr(),
        total.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        heads,
        dim,
        x.stride(0),
        0 if added is None else added.stride(0),
        heads * dim,
        eps,
        offset,
    )
    return out, total


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """See `stars_fast.ops.fused.gated`."""
    gate, up = _rows(gate), _rows(up)
    if gate.stride(0) != up.stride(0):
        gate, up = gate.contiguous(), up.contiguous()
    out = gate.new_empty(gate.shape)
    _cpu.gated(
        gate.data_ptr(),
        up.data_ptr(),
        out.data_ptr(),
        gate.shape[0],
        gate.shape[1],
        gate.stride(0),
        _ACTIVATIONS[activation],
    )
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """See `stars_fast.ops.fused.rotate`; in place where the layout allows."""
    x, cos, sin = _rows(x), cos.contiguous(), sin.contiguous()
    _cpu.rotate(
        x.data_ptr(),
        x.shape[0],
        x.shape[1],
        x.shape[2],
        x.stride(0),
        cos.data_ptr(),
        sin.data_ptr(),
        cos.shape[-1],
        interleaved,
    )
    return x


def int8_linear(x: Tensor, layers: Sequence[Int8Layer]) -> Tensor:
    """See `stars_fast.ops.int8.int8_linear`."""
    x = x.contiguous()
    inputs = x.shape[-1]
    parts = [
        (
            layer.packed.data_ptr(),
            layer.scale.data_ptr(),
            0 if layer.bias is None else layer.bias.data_ptr(),
            len(layer.scale),
        )
        for layer in layers
    ]
    out = x.new_empty((*x.shape[:-1], sum(part[-1] for part in parts)))
    _cpu.int8_linear(x.data_ptr(), x.numel() // inputs, inputs, parts, out.data_ptr())
    return out


def decode_round(batch: BatchLike, page_size: int) -> _cpu.Round:
    """Return the attention of a batch's decode steps; the batch is not read again."""
    lengths = np.zeros(batch.num_groups, np.int64)
    lengths[batch.row_group] = batch.row_start
    width = int(lengths.max(initial=0))
    groups = np.arange(batch.num_groups)
    slots = prefix_slots(batch, groups, lengths, page_size, width)
    return _cpu.Round(
        slots[np.arange(width) < lengths[:, None]].astype(np.int32),
        np.concatenate(([0], np.cumsum(lengths))),
        batch.row_group,
        batch.slots.astype(np.int32),
    )


def attend_step(
    round_: _cpu.Round,
    step: int,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    pages: tuple[Tensor, Tensor],
    *,
    scaling: float,
    softcap: float,
    window: int,
    sinks: Tensor | None,
    rotary: Rotary | None,
) -> None:
    """Attend in one layer of one decode step.

    Parameters
    ----------
    round_ : Round
        From `decode_round`.
    step : int
        Which new token of every row this is.
    tensors : tuple of Tensor
        Query ``[R, heads, key_dim]``, key and value ``[R, kv_heads, dim]``, and the result
        ``[R, heads, value_dim]``, contiguous. Query and key may be overwritten.
    pages : tuple of Tensor
        Keys and values of the layer, ``[num_pages, page_size, kv_heads, dim]``.
    scaling, softcap, window, sinks
        See `AttentionOptions`.
    rotary : Rotary or None
        How to turn query and key first.
    """
    query, key, value, out = tensors
    query, key, value = _rows(query), _rows(key), _rows(value)
    sinks = None if sinks is None else sinks.to(query.dtype).contiguous()
    turned = (0, 0, 0, False)
    if rotary is not None:
        cos, sin = rotary.cos.contiguous(), rotary.sin.contiguous()
        turned = (cos.data_ptr(), sin.data_ptr(), cos.shape[-1], rotary.interleaved)
    round_.attend(
        step,
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        out.data_ptr(),
        pages[0].data_ptr(),
        pages[1].data_ptr(),
        0 if sinks is None else sinks.data_ptr(),
        query.shape[1],
        key.shape[1],
        key.shape[2],
        value.shape[2],
        query.stride(0),
        key.stride(0),
        value.stride(0),
        scaling,
        softcap,
        window,
        *turned,
    )
