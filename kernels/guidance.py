"""`guide_logits` on a GPU: one launch, one program a row, nothing in between in memory."""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars_fast.kernels.aot import Variant
from stars_fast.kernels.sample import DTYPES, check_logits

#: The least log-probability, as in `stars_fast.ops.guidance`.
NO_CHANCE = tl.constexpr(-1e30)

_BLOCK = 2048
_WARPS = 8


@triton.jit(do_not_specialize=["width", "vocab_size"])
def guide_logits_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [R, vocab_size]
    logits_stride,
    guide_ptr,  # [R, >= width]
    guide_stride,
    reference_ptr,  # [R, >= width]
    reference_stride,
    weight_ptr,  # float32 [R]
    out_ptr,  # float32 [R, vocab_size]
    width,
    vocab_size,
    BLOCK: tl.constexpr,
    REFERRED: tl.constexpr,  # otherwise the reference is not read
):
    """Program (row): the masses of guide and reference, then the sum, block by block."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    guide_ptr += row * guide_stride
    reference_ptr += row * reference_stride
    out_ptr += row * vocab_size
    weight = tl.load(weight_ptr + row)
    if weight == 0:
        for start in range(0, vocab_size, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + at, mask=at < vocab_size)
            tl.store(out_ptr + at, x.to(tl.float32), mask=at < vocab_size)
    else:
        given_mass = _log_mass(guide_ptr, width, BLOCK)
        taken_mass = 0.0
        if REFERRED:
            taken_mass = _log_mass(reference_ptr, width, BLOCK)
        for start in range(0, vocab_size, BLOCK):
            at = start + tl.arange(0, BLOCK)
            shared = at < width
            x = tl.load(logits_ptr + at, mask=shared, other=-float("inf")).to(tl.float32)
            change = _log_probs(guide_ptr + at, given_mass, shared)
            if REFERRED:
                change -= _log_probs(reference_ptr + at, taken_mass, shared)
            x += weight * change
            tl.store(out_ptr + at, x, mask=at < vocab_size)


@triton.jit
def _log_probs(ptr, log_mass, mask):  # type: ignore[no-untyped-def]
    """Log-probabilities of a block, finite unless NaN: infinite ones have no differences."""
    x = tl.load(ptr, mask=mask, other=0.0).to(tl.float32) - log_mass
    return tl.where(x < NO_CHANCE, NO_CHANCE, x)


@triton.jit
def _log_mass(row_ptr, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Log of the sum of exp(logit) over a row."""
    peaks = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + at, mask=at < width, other=-float("inf")).to(tl.float32)
        peaks = tl.maximum(peaks, x)
    peak = tl.max(peaks, axis=0)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + at, mask=at < width, other=-float("inf")).to(tl.float32)
        mass += tl.exp(x - peak)
    return peak + tl.log(tl.sum(mass, axis=0))


def guide_logits(
    logits: Tensor, guide: Tensor, reference: Tensor | None, weight: Tensor, width: int
) -> Tensor:
    """Return the guided logits, float32 ``[R, V]``; `stars_fast.ops.guide_logits` on a GPU.

    One launch on the current stream. It reads `guide` and `reference` three times, all but the
    first from the cache as a rule, `logits` once, and writes the result; rows whose weight is 0 are
    copied. Nothing waits for the device. Copies what is not contiguous in its last dimension, and
    all of them to float32 where their dtypes differ.

    Parameters
    ----------
    logits, guide, reference : Tensor
        float32, bfloat16 or float16 ``[R, *]``, each at least `width` wide; not changed. The
        reference may be None.
    weight : Tensor
        float32 ``[R]``.
    width : int
        Columns that all three have in common; behind them the result is -inf.

    Raises
    ------
    ValueError
        If a shape or a dtype differs from the above.
    """
    rows, vocab_size = check_logits(logits)
    given = {"logits": logits, "guide": guide, "reference": reference}
    inputs = {name: x for name, x in given.items() if x is not None}
    for name, x in inputs.items():
        if x.ndim != 2 or x.dtype not in DTYPES or x.shape[0] != rows or x.shape[1] < width:
            raise ValueError(
                f"{name} must be float32, bfloat16 or float16 of shape ({rows}, {width} or more), "
                f"got {x.dtype} of shape {tuple(x.shape)}"
            )
    if weight.dtype != torch.float32 or weight.shape != (rows,):
        raise ValueError(
            f"weight must be float32 of shape ({rows},), got {weight.dtype} of shape "
            f"{tuple(weight.shape)}"
        )
    if len({x.dtype for x in inputs.values()}) > 1:
        inputs = {name: x.float() for name, x in inputs.items()}
    inputs = {name: x if x.stride(1) == 1 else x.contiguous() for name, x in inputs.items()}
    read = (inputs["logits"], inputs["guide"], inputs.get("reference", inputs["guide"]))
    out = torch.empty((rows, vocab_size), dtype=torch.float32, device=logits.device)
    if rows:
        guide_logits_kernel[(rows,)](
            *(argument for x in read for argument in (x, x.stride(0))),
            weight.contiguous(),
            out,
            width,
            vocab_size,
            BLOCK=_BLOCK,
            REFERRED=reference is not None,
            num_warps=_WARPS,
        )
    return out


def variants() -> list[Variant]:
    """Every form of the kernel, for logits of aligned rows."""
    found = []
    for dtype, referred in itertools.product(DTYPES.values(), (True, False)):
        signature = {
            "logits_ptr": f"*{dtype}",
            "logits_stride": "i32",
            "guide_ptr": f"*{dtype}",
            "guide_stride": "i32",
            "reference_ptr": f"*{dtype}",
            "reference_stride": "i32",
            "weight_ptr": "*fp32",
            "out_ptr": "*fp32",
            "width": "i32",
            "vocab_size": "i32",
            "BLOCK": "constexpr",
            "REFERRED": "constexpr",
        }
        aligned = {name for name in signature if name.endswith(("_ptr", "_stride"))}
        found.append(
            Variant(
                f"guide_logits-{dtype}{'' if referred else '-unreferred'}",
                guide_logits_kernel,
                signature,
                {"BLOCK": _BLOCK, "REFERRED": referred},
                num_warps=_WARPS,
                aligned=frozenset(aligned),
            )
        )
    return found
