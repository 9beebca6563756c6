"""`top_tokens` on a GPU: the largest entries of every chunk of a row, then those of the row.

An entry is its value, as an integer of the same order, followed by its index counted from the end:
no two are equal, and the largest are found by taking the maximum so many times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars_fast.kernels.aot import Variant
from stars_fast.kernels.sample import DTYPES, check_logits
from stars_fast.kernels.sample_finish import order_of

_CHUNK = 2048
_INDEX_BITS = tl.constexpr(18)
_LAST = tl.constexpr((1 << 18) - 1)  # the largest index; i ^ _LAST is _LAST - i
_NONE = tl.constexpr(-(1 << 62))  # below every entry


@triton.jit
def chunk_top_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [R, V]
    logits_stride,
    entries_ptr,  # out, int64 [R, splits, COUNT]
    vocab_size,
    splits,
    COUNT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program (row, split): the largest entries of a chunk."""
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    index = split * CHUNK + tl.arange(0, CHUNK)
    inside = index < vocab_size
    x = tl.load(logits_ptr + row * logits_stride + index, mask=inside, other=0.0).to(tl.float32)
    entry = (order_of(x).to(tl.int64) << _INDEX_BITS) | (index ^ _LAST)
    entry = tl.where(inside, entry, _NONE)
    out = entries_ptr + (row * splits + split) * COUNT
    for number in range(COUNT):
        largest = tl.max(entry, axis=0)
        tl.store(out + number, largest)
        entry = tl.where(entry == largest, _NONE, entry)


@triton.jit
def row_top_kernel(  # type: ignore[no-untyped-def]
    entries_ptr,  # int64 [R, splits * COUNT]
    tokens_ptr,  # out, int64 [R, COUNT]
    entries,
    COUNT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program (row): the tokens of the largest of its chunks' entries."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDE)
    entry = tl.load(entries_ptr + row * entries + at, mask=at < entries, other=_NONE)
    for number in range(COUNT):
        largest = tl.max(entry, axis=0)
        tl.store(tokens_ptr + row * COUNT + number, (largest & _LAST) ^ _LAST)
        entry = tl.where(entry == largest, _NONE, entry)


def top_tokens(logits: Tensor, count: int) -> Tensor:
    """Return each row's most likely tokens; `stars_fast.ops.top_tokens` on a GPU.

    Two launches on the current stream, one read of the logits; nothing waits for the device.
    Copies `logits` if their last dimension is not contiguous.

    Parameters
    ----------
    logits : Tensor
        float32, bfloat16 or float16 ``[R, V]``, 1 <= V <= 262144; not changed.
    count : int
        T, from 1 to V and at most 64.

    Returns
    -------
    Tensor
        int64 ``[R, T]``.

    Raises
    ------
    ValueError
        If a shape or a dtype differs from the above, or `count` is out of range.
    """
    rows, vocab_size = check_logits(logits)
    if not 1 <= count <= min(vocab_size, 64):
        raise ValueError(f"count must be in [1, {min(vocab_size, 64)}], got {count}")
    tokens = torch.empty((rows, count), dtype=torch.int64, device=logits.device)
    if not rows:
        return tokens
    if logits.stride(1) != 1 and vocab_size > 1:
        logits = logits.contiguous()
    splits = triton.cdiv(vocab_size, _CHUNK)
    entries = torch.empty((rows, splits, count), dtype=torch.int64, device=logits.device)
    chunk_top_kernel[(rows * splits,)](
        logits, logits.stride(0), entries, vocab_size, splits, COUNT=count, CHUNK=_CHUNK
    )
    row_top_kernel[(rows,)](
        entries,
        tokens,
        splits * count,
        COUNT=count,
        WIDE=triton.next_power_of_2(splits * count),
    )
    return tokens


def variants() -> list[Variant]:
    """The forms for the most tokens that a request can ask for, of large vocabularies."""
    count = 20
    found = []
    for dtype in DTYPES.values():
        signature = {
            "logits_ptr": f"*{dtype}",
            "logits_stride": "i32",
            "entries_ptr": "*i64",
            "vocab_size": "i32",
            "splits": "i32",
            "COUNT": "constexpr",
            "CHUNK": "constexpr",
        }
        aligned = frozenset({"logits_ptr", "entries_ptr", "logits_stride", "vocab_size"})
        constants: dict[str, object] = {"COUNT": count, "CHUNK": _CHUNK}
        found.append(
            Variant(f"top_chunk-{dtype}", chunk_top_kernel, signature, constants, aligned=aligned)
        )
    signature = {
        "entries_ptr": "*i64",
        "tokens_ptr": "*i64",
        "entries": "i32",
        "COUNT": "constexpr",
        "WIDE": "constexpr",
    }
    most = triton.next_power_of_2((1 << 18) // _CHUNK * count)
    pointers = frozenset({"entries_ptr", "tokens_ptr"})
    found.append(
        Variant(
            "top_row",
            row_top_kernel,
            signature,
            {"COUNT": count, "WIDE": most},
            aligned=pointers,
        )
    )
    return found
