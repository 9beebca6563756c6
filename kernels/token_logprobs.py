"""`token_logprobs` on a GPU: the sums of `sample`, to the bit, for tokens chosen elsewhere."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars_fast.kernels.aot import Variant
from stars_fast.kernels.sample import DTYPES, reduce_raw
from stars_fast.kernels.sample_finish import MAX_SPLITS, summed
from stars_fast.kernels.sample_reduce import PARTIALS

_BLOCK = 32  # tokens handled at once


@triton.jit(do_not_specialize=["width"])
def token_logprobs_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [R, V]
    logits_stride,
    partial_ptr,  # float32 [R, PARTIALS, splits]
    tokens_ptr,  # int64 [R, width]
    logprobs_ptr,  # out, float32 [R, width]
    entropy_ptr,  # out, float32 [R]
    ok_ptr,  # out, bool [R]
    splits,
    width,
    BLOCK: tl.constexpr,
):
    """Program (row): log-probabilities of its tokens, entropy and whether there is either."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, MAX_SPLITS)
    partial = partial_ptr + row * PARTIALS * splits
    peaks = tl.load(partial + split, mask=split < splits, other=-float("inf"))
    peak, mass, entropy, ok = summed(peaks, partial, splits)
    log_mass = tl.log(mass)
    tl.store(entropy_ptr + row, tl.where(ok != 0, entropy, float("nan")))
    tl.store(ok_ptr + row, ok != 0)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        token = tl.load(tokens_ptr + row * width + at, mask=at < width, other=0)
        x = tl.load(logits_ptr + row * logits_stride + token).to(tl.float32)
        logprob = (x.to(tl.float64) - peak) - log_mass
        logprob = tl.where(ok != 0, logprob, float("nan"))
        tl.store(logprobs_ptr + row * width + at, logprob, mask=at < width)


def token_logprobs(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities, entropy and `ok`; `stars_fast.ops.token_logprobs` on a GPU.

    Two launches on the current stream, the first of them `sample`'s own; one read of the logits.
    Nothing waits for the device. Copies `logits` if their last dimension is not contiguous.

    Parameters
    ----------
    logits : Tensor
        float32, bfloat16 or float16 ``[R, V]``, 1 <= V <= 262144; not changed.
    tokens : Tensor
        int64 ``[R, T]`` in [0, V), which is not checked.

    Raises
    ------
    ValueError
        If a shape or a dtype differs from the above.
    """
    rows = logits.shape[0]
    if tokens.dtype != torch.int64 or tokens.ndim != 2 or tokens.shape[0] != rows:
        raise ValueError(
            f"tokens must be int64 of shape ({rows}, T), got {tokens.dtype} of shape "
            f"{tuple(tokens.shape)}"
        )
    device = logits.device
    logprobs = torch.empty(tokens.shape, device=device)
    entropy = torch.empty(rows, device=device)
    ok = torch.empty(rows, dtype=torch.bool, device=device)
    logits, partial, splits = reduce_raw(logits)
    if rows:
        token_logprobs_kernel[(rows,)](
            logits,
            logits.stride(0),
            partial,
            tokens.contiguous(),
            logprobs,
            entropy,
            ok,
            splits,
            tokens.shape[1],
            BLOCK=_BLOCK,
        )
    return logprobs, entropy, ok


def variants() -> list[Variant]:
    """Every form of the second kernel; the first is `sample`'s."""
    found = []
    for dtype in DTYPES.values():
        signature = {
            "logits_ptr": f"*{dtype}",
            "logits_stride": "i32",
            "partial_ptr": "*fp32",
            "tokens_ptr": "*i64",
            "logprobs_ptr": "*fp32",
            "entropy_ptr": "*fp32",
            "ok_ptr": "*i1",
            "splits": "i32",
            "width": "i32",
            "BLOCK": "constexpr",
        }
        pointers = {name for name, kind in signature.items() if kind.startswith("*")}
        found.append(
            Variant(
                f"token_logprobs-{dtype}",
                token_logprobs_kernel,
                signature,
                {"BLOCK": _BLOCK},
                aligned=frozenset(pointers | {"logits_stride"}),
            )
        )
    return found
