"""activation(gate) * up in one launch, on both parts of a joined product where they lie."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stars_fast.kernels.aot import Variant
from stars_fast.kernels.rounding import rounded
from stars_fast.kernels.sample import DTYPES

_BLOCK = 1024  # channels of a program
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


@triton.jit
def gated_kernel(  # type: ignore[no-untyped-def]
    gate_ptr,
    up_ptr,
    out_ptr,
    gate_stride,
    up_stride,
    dim,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (t, b): a block of the channels of token t."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < dim
    x = tl.load(gate_ptr + token * gate_stride + at, mask=live, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + token * up_stride + at, mask=live, other=0.0).to(tl.float32)
    # Both by a sigmoid, as 1 + tanh(y) = 2 / (1 + exp(-2 y)); the exponent is never positive.
    y = x
    if ACTIVATION == 1:
        y = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    t = tl.exp(-tl.abs(y))
    act = x * tl.where(y < 0, t, 1.0) / (1.0 + t)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    act = rounded(act, dtype).to(tl.float32)  # PyTorch's product takes it so
    tl.store(out_ptr + token * dim + at, rounded(act * up, dtype), mask=live)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return activation(gate) * up; see `stars_fast.ops.fused.gated`.

    One launch; reads both once and writes the result once.

    Parameters
    ----------
    gate, up : Tensor
        float32, bfloat16 or float16 ``[T, D]``, of one dtype, last stride 1.
    activation : str
        ``"silu"`` or ``"gelu_tanh"``.

    Returns
    -------
    Tensor
        ``[T, D]``, contiguous.

    Raises
    ------
    ValueError
        If a shape, a stride or a dtype does not fit, or `activation` is unknown.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {list(_ACTIVATIONS)}, got {activation!r}")
    for name, x in (("gate", gate), ("up", up)):
        if x.shape != gate.shape or x.ndim != 2 or x.stride(1) != 1 or x.device != gate.device:
            raise ValueError(
                f"{name} must be [T, D] with last stride 1, as gate, on {gate.device}; got "
                f"{list(x.shape)}, strides {x.stride()}, on {x.device}"
            )
        if x.dtype != gate.dtype or x.dtype not in DTYPES:
            raise ValueError(
                f"{name} must be of gate's dtype, one of {', '.join(map(str, DTYPES))}; got "
                f"{x.dtype}"
            )
    out = gate.new_empty(gate.shape)
    tokens, dim = gate.shape
    if tokens:
        gated_kernel[(tokens, triton.cdiv(dim, _BLOCK))](
            gate,
            up,
            out,
            gate.stride(0),
            up.stride(0),
            dim,
            ACTIVATION=_ACTIVATIONS[activation],
            BLOCK=_BLOCK,
        )
    return out


def variants() -> list[Variant]:
    """Every form that `gated` can choose, for aligned rows."""
    found = []
    for dtype in DTYPES.values():
        pointers = dict.fromkeys(("gate_ptr", "up_ptr", "out_ptr"), f"*{dtype}")
        sizes = dict.fromkeys(("gate_stride", "up_stride", "dim"), "i32")
        for name, number in _ACTIVATIONS.items():
            found.append(
                Variant(
                    f"gated {dtype} {name}",
                    gated_kernel,
                    {**pointers, **sizes, "ACTIVATION": "constexpr", "BLOCK": "constexpr"},
                    {"ACTIVATION": number, "BLOCK": _BLOCK},
                    aligned=frozenset({*pointers, *sizes}),
                )
            )
    return found
