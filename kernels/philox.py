"""Philox4x32-10 in Triton: the generator of every device-side draw.

Not `tl.rand`: its bits differ between releases of Triton. Source: Salmon, Moraes, Dror and Shaw,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars_fast.kernels.aot import Variant

_BLOCK = 256
_PURPOSE_BITS = tl.constexpr(3)  # below the stream, see csrc/philox.h


@triton.jit
def philox4x32_10(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Words of counters (c0, c1, c2, c3) under keys (k0, k1): uint32 blocks, four of them back."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high2 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low2 = c2 * 0xCD9E8D57
        c0 = high2 ^ c1 ^ k0
        c1 = low2
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def token_counter(seed_ptr, position_ptr, attempt_ptr, stream_ptr, row):  # type: ignore[no-untyped-def]
    """What a row's token draws share: words 1 to 3 of their counters, then the key's two."""
    seed = tl.load(seed_ptr + row)
    return (
        tl.load(position_ptr + row).to(tl.uint32),
        tl.load(attempt_ptr + row).to(tl.uint32),
        tl.load(stream_ptr + row).to(tl.uint32) << _PURPOSE_BITS,  # purpose 0
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )


@triton.jit
def philox4x32_kernel(counter_ptr, key_ptr, out_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One counter and key per lane: int64 ``[n, 4]`` and ``[n, 2]`` to int64 ``[n, 4]``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    c0 = tl.load(counter_ptr + at * 4, mask=live, other=0).to(tl.uint32)
    c1 = tl.load(counter_ptr + at * 4 + 1, mask=live, other=0).to(tl.uint32)
    c2 = tl.load(counter_ptr + at * 4 + 2, mask=live, other=0).to(tl.uint32)
    c3 = tl.load(counter_ptr + at * 4 + 3, mask=live, other=0).to(tl.uint32)
    k0 = tl.load(key_ptr + at * 2, mask=live, other=0).to(tl.uint32)
    k1 = tl.load(key_ptr + at * 2 + 1, mask=live, other=0).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32_10(c0, c1, c2, c3, k0, k1)
    tl.store(out_ptr + at * 4, w0.to(tl.int64), mask=live)
    tl.store(out_ptr + at * 4 + 1, w1.to(tl.int64), mask=live)
    tl.store(out_ptr + at * 4 + 2, w2.to(tl.int64), mask=live)
    tl.store(out_ptr + at * 4 + 3, w3.to(tl.int64), mask=live)


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10 of each counter under its key, by the kernel.

    Parameters
    ----------
    counter : Tensor
        int64 ``[n, 4]``, values in [0, 2**32), on the device of the kernel.
    key : Tensor
        int64 ``[n, 2]``, values in [0, 2**32).

    Returns
    -------
    Tensor
        int64 ``[n, 4]``, four words in [0, 2**32) per counter.

    Raises
    ------
    ValueError
        If a shape or a dtype differs.
    """
    n = counter.shape[0]
    for name, tensor, width in (("counter", counter, 4), ("key", key, 2)):
        if tensor.shape != (n, width) or tensor.dtype != torch.int64:
            raise ValueError(
                f"{name} must be int64 of shape ({n}, {width}), got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}"
            )
    out = torch.empty_like(counter, memory_format=torch.contiguous_format)
    if n:
        grid = (triton.cdiv(n, _BLOCK),)
        philox4x32_kernel[grid](counter.contiguous(), key.contiguous(), out, n, BLOCK=_BLOCK)
    return out


def variants() -> list[Variant]:
    """Return the form that the launcher chooses."""
    return [
        Variant(
            "philox4x32",
            philox4x32_kernel,
            {
                **dict.fromkeys(("counter_ptr", "key_ptr", "out_ptr"), "*i64"),
                "n": "i32",
                "BLOCK": "constexpr",
            },
            {"BLOCK": _BLOCK},
            aligned=frozenset({"counter_ptr", "key_ptr", "out_ptr"}),
        )
    ]
