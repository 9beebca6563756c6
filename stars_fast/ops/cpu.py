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

#: What `sample` reads of each row.
_COLUMNS = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    **dict.fromkeys(("seed", "position", "attempt", "stream"), torch.int64),
}
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


def on_vectors(device: torch.device) -> bool:
    """Whether operators on a device's tensors run here: unless PyTorch's form is asked for."""
    return device.type == "cpu" and not plain()


def runs_on(x: Tensor) -> bool:
    """Whether those of a decoder layer on a tensor do."""
    return x.dtype == torch.float32 and on_vectors(x.device)


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


def sample(
    logits: Tensor,
    columns: Sequence[Tensor],
    live: Tensor | None,
    results: Sequence[Tensor],
    *,
    with_entropy: bool,
) -> Tensor:
    """Draw one token per row where rounding cannot make it another one than PyTorch's.

    Parameters
    ----------
    logits : Tensor
        float32 ``[R, V]``.
    columns : sequence of Tensor
        The arguments of `stars_fast.ops.sample` from `temperature` to `stream`.
    live, with_entropy
        As there.
    results : sequence of Tensor
        As it returns them, contiguous: those of live rows are written. They depend on the row
        alone.

    Returns
    -------
    Tensor
        bool ``[R]``, rows that are left undecided, about one in 10**5; their results mean nothing.

    Raises
    ------
    ValueError
        Columns that are not those of R rows.
    """
    logits = _rows(logits)
    rows, vocab_size = logits.shape
    named = dict(zip(_COLUMNS, columns, strict=True)) | ({} if live is None else {"live": live})
    for name, x in named.items():
        if x.shape != (rows,):
            raise ValueError(f"{name} must have shape ({rows},), got {tuple(x.shape)}")
    # Kept here: addresses hold nothing.
    columns = [named[name].to(kind).contiguous() for name, kind in _COLUMNS.items()]
    temperature, top_k, top_p, min_p, seed, position, attempt, stream = (
        x.data_ptr() for x in columns
    )
    token, logprob, truncated_logprob, entropy, ok = (x.data_ptr() for x in results)
    live = None if live is None else live.contiguous()
    undecided = torch.zeros_like(results[-1])
    _cpu.sample(
        logits.data_ptr(),
        rows,
        vocab_size,
        logits.stride(0),
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        position,
        attempt,
        stream,
        0 if live is None else live.data_ptr(),
        with_entropy,
        token,
        logprob,
        truncated_logprob,
        entropy,
        ok,
        undecided.data_ptr(),
    )
    return undecided


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
