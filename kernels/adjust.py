"""`adjust_logits` on a GPU, as far as tokens are named: one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars_fast.kernels.aot import Variant

_BLOCK = 256  # named tokens handled at once


@triton.jit(do_not_specialize=["biases", "holds", "seen"])
def adjust_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # in and out, float32 [R, V]
    logits_stride,
    bias_ids_ptr,  # int64 [R, biases]
    bias_ptr,  # float32 [R, biases]
    held_ids_ptr,  # int64 [R, holds]
    held_ptr,  # bool [R]
    seen_ids_ptr,  # int64 [R, seen]
    counts_ptr,  # int32 [R, seen]
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    vocab_size,
    biases,
    holds,
    seen,
    BLOCK: tl.constexpr,
):
    """Program (row): the biases, then what is held back, then the penalties."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    for start in range(0, biases, BLOCK):
        at = start + tl.arange(0, BLOCK)
        token = tl.load(bias_ids_ptr + row * biases + at, mask=at < biases, other=-1)
        named = (token >= 0) & (token < vocab_size)
        x = tl.load(row_ptr + token, mask=named, other=0.0)
        x += tl.load(bias_ptr + row * biases + at, mask=at < biases, other=0.0)
        tl.store(row_ptr + token, x, mask=named)
    tl.debug_barrier()  # what was stored is seen
    held = tl.load(held_ptr + row) != 0
    for start in range(0, holds, BLOCK):
        at = start + tl.arange(0, BLOCK)
        token = tl.load(held_ids_ptr + row * holds + at, mask=at < holds, other=-1)
        named = (token >= 0) & (token < vocab_size)
        tl.store(row_ptr + token, -float("inf"), mask=named & held)
    tl.debug_barrier()
    repetition = tl.load(repetition_ptr + row)
    presence = tl.load(presence_ptr + row).to(tl.float64)
    frequency = tl.load(frequency_ptr + row).to(tl.float64)
    for start in range(0, seen, BLOCK):
        at = start + tl.arange(0, BLOCK)
        token = tl.load(seen_ids_ptr + row * seen + at, mask=at < seen, other=-1)
        named = (token >= 0) & (token < vocab_size)
        count = tl.load(counts_ptr + row * seen + at, mask=at < seen, other=0)
        x = tl.load(row_ptr + token, mask=named, other=0.0)
        x = tl.where(x < 0, x * repetition, tl.div_rn(x, repetition))
        # A product of a float32 and a count is exact, so that fusing it with the sum changes none.
        taken = frequency * count.to(tl.float64) + tl.where(count > 0, presence, 0.0)
        tl.store(row_ptr + token, (x.to(tl.float64) - taken).to(tl.float32), mask=named)


def adjust_named(
    logits: Tensor,
    bias_ids: Tensor,
    bias: Tensor,
    held_ids: Tensor,
    held: Tensor,
    seen_ids: Tensor,
    counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """Change the logits of the tokens that are named, in place; see `stars_fast.ops.adjust_logits`.

    One launch on the current stream; it moves 12 bytes for each named token, and reads and writes
    its logit. Nothing waits for the device.

    Parameters
    ----------
    logits : Tensor
        float32 ``[R, V]``, rows contiguous; changed.
    bias_ids, held_ids, seen_ids : Tensor
        int64 ``[R, *]``; what lies outside [0, V) names no token.
    bias, counts : Tensor
        float32 and int32, of the shape of `bias_ids` and `seen_ids`.
    held : Tensor
        bool ``[R]``.
    repetition, presence, frequency : Tensor
        float32 ``[R]``.

    Raises
    ------
    ValueError
        If a shape or a dtype differs from the above.
    """
    rows = logits.shape[0]
    if logits.ndim != 2 or logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError(f"logits must be float32 [R, V] with contiguous rows, got {_of(logits)}")
    for name, tensor, dtype, shape in (
        ("bias_ids", bias_ids, torch.int64, (rows, bias_ids.shape[-1])),
        ("bias", bias, torch.float32, (rows, bias_ids.shape[-1])),
        ("held_ids", held_ids, torch.int64, (rows, held_ids.shape[-1])),
        ("held", held, torch.bool, (rows,)),
        ("seen_ids", seen_ids, torch.int64, (rows, seen_ids.shape[-1])),
        ("counts", counts, torch.int32, (rows, seen_ids.shape[-1])),
        ("repetition", repetition, torch.float32, (rows,)),
        ("presence", presence, torch.float32, (rows,)),
        ("frequency", frequency, torch.float32, (rows,)),
    ):
        if tensor.dtype != dtype or tensor.shape != shape:
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(f"{name} must be {kind} of shape {shape}, got {_of(tensor)}")
    if not rows:
        return
    adjust_kernel[(rows,)](
        logits,
        logits.stride(0),
        bias_ids.contiguous(),
        bias.contiguous(),
        held_ids.contiguous(),
        held.contiguous(),
        seen_ids.contiguous(),
        counts.contiguous(),
        repetition.contiguous(),
        presence.contiguous(),
        frequency.contiguous(),
        logits.shape[1],
        bias_ids.shape[1],
        held_ids.shape[1],
        seen_ids.shape[1],
        BLOCK=_BLOCK,
    )


def _of(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def variants() -> list[Variant]:
    """Every form of the kernel that `adjust_named` can choose, for logits of aligned rows."""
    signature = {
        "logits_ptr": "*fp32",
        "logits_stride": "i32",
        "bias_ids_ptr": "*i64",
        "bias_ptr": "*fp32",
        "held_ids_ptr": "*i64",
        "held_ptr": "*i1",
        "seen_ids_ptr": "*i64",
        "counts_ptr": "*i32",
        "repetition_ptr": "*fp32",
        "presence_ptr": "*fp32",
        "frequency_ptr": "*fp32",
        "vocab_size": "i32",
        "biases": "i32",
        "holds": "i32",
        "seen": "i32",
        "BLOCK": "constexpr",
    }
    aligned = {name for name, kind in signature.items() if kind.startswith("*")} | {"logits_stride"}
    return [
        Variant("adjust", adjust_kernel, signature, {"BLOCK": _BLOCK}, aligned=frozenset(aligned))
    ]
