"""Casts that round alike in compiled kernels and in Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

#: Whether this process runs kernels in the interpreter.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def rounded(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Cast float32 to the nearest of `dtype`; the interpreter would cut bfloat16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)
