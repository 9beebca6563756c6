"""`sample` on a GPU: two launches, one read of the logits, no sort and no host sync.

`sample_reduce` reads every logit once; `sample_finish` draws from the few that matter.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from stars_fast.kernels.aot import MOST_REGISTERS, Variant
from stars_fast.kernels.sample_finish import CAPACITY, MAX_SPLITS, sample_finish_kernel
from stars_fast.kernels.sample_reduce import MINI, MINIS, PARTIALS, sample_reduce_kernel

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_FLOAT = (torch.float32,)
_INT32 = (torch.int32,)
_INT64 = (torch.int64,)
_INTEGER = (torch.int64, torch.int32)
_BOOL = (torch.bool,)


_CHUNK = MINIS.value * MINI.value  # the same for every R: a row's sums depend on the row alone
_MAX_VOCAB = MAX_SPLITS.value * _CHUNK
_REDUCE_WARPS = 4
_FINISH_WARPS = 8


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    attempt: Tensor,
    stream: Tensor,
    live: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draw one token per row; `stars_fast.ops.sample` on a GPU.

    The token is the arg max of scaled logits plus Gumbel noise over what the filters keep, an
    exact draw from their softmax. The noise depends on seed, position, attempt, stream and
    vocabulary index alone (Philox), every sum has a fixed order, and rows are cut by V alone: a
    row's result is the same to the bit whatever else is in the batch.

    Launches two kernels on the current stream and allocates the results and about R * V / 4 +
    16384 R bytes for what passes between them; nothing waits for the device, so that a CUDA graph
    can hold it. It moves R * V logits once, those of rows without filters a second time but from
    the cache, and R * V / 8 bytes of bounds out and a few times back. Copies
    `logits` if their last dimension is not contiguous, and converts what has another dtype.

    Parameters
    ----------
    logits : Tensor
        float32, bfloat16 or float16 ``[R, V]``, 1 <= V <= 262144; not changed.
    temperature, top_p, min_p : Tensor
        float32 ``[R]``.
    top_k : Tensor
        int32 ``[R]``.
    seed : Tensor
        int64 ``[R]``, the bit pattern of an unsigned 64-bit seed.
    position, attempt, stream : Tensor
        int64 or int32 ``[R]``; int64 saves a conversion.
    live : Tensor, optional
        bool ``[R]``; of a row that is not live nothing is read, its results are 0 and true.

    Returns
    -------
    token : Tensor
        int64 ``[R]``.
    logprob, truncated_logprob, entropy : Tensor
        float32 ``[R]``; see `stars_fast.ops.sample`.
    ok : Tensor
        bool ``[R]``, false where the row holds a NaN, +inf or nothing but -inf.

    Raises
    ------
    ValueError
        If a shape, a dtype or a device differs from the above.

    References
    ----------
    Gumbel-max: Maddison, Tarlow and Minka, "A* sampling", NeurIPS 2014. Sampling of segments that
    are accepted or rejected as a whole: arXiv 2511.03827; segments ended by entropy: arXiv
    2406.16306.
    """
    rows, vocab_size = check_logits(logits)
    device = logits.device
    for name, tensor, dtypes in (
        ("temperature", temperature, _FLOAT),
        ("top_k", top_k, _INT32),
        ("top_p", top_p, _FLOAT),
        ("min_p", min_p, _FLOAT),
        ("seed", seed, _INT64),
        ("position", position, _INTEGER),
        ("attempt", attempt, _INTEGER),
        ("stream", stream, _INTEGER),
        ("live", live, _BOOL),
    ):
        if tensor is not None:
            _check_row_values(name, tensor, dtypes, rows, device)

    token = torch.empty(rows, dtype=torch.int64, device=device)
    ok = torch.empty(rows, dtype=torch.bool, device=device)
    logprob, truncated_logprob, entropy = (
        torch.empty(rows, dtype=torch.float32, device=device) for _ in range(3)
    )
    if not rows:
        return token, logprob, truncated_logprob, entropy, ok

    splits = triton.cdiv(vocab_size, _CHUNK)
    bound = torch.empty((rows, splits * MINIS.value), dtype=torch.float32, device=device)
    minis = torch.empty((rows, splits * MINIS.value), dtype=torch.int32, device=device)
    partial = torch.empty((rows, PARTIALS.value, splits), dtype=torch.float32, device=device)
    listed = torch.empty((rows, CAPACITY.value), dtype=torch.int64, device=device)
    if logits.stride(1) != 1 and vocab_size > 1:
        logits = logits.contiguous()
    inputs = (
        logits,
        logits.stride(0),
        temperature.contiguous(),
        top_k.contiguous(),
        top_p.contiguous(),
        min_p.contiguous(),
        seed.contiguous(),
        position.to(torch.int64).contiguous(),
        attempt.to(torch.int64).contiguous(),
        stream.to(torch.int64).contiguous(),
        ok if live is None else live.contiguous(),
        int(live is not None),
        bound,
        partial,
    )
    sample_reduce_kernel[(rows * splits,)](*inputs, vocab_size, splits, num_warps=_REDUCE_WARPS)
    sample_finish_kernel[(rows,)](
        *inputs,
        minis,
        listed,
        token,
        logprob,
        truncated_logprob,
        entropy,
        ok,
        vocab_size,
        splits,
        num_warps=_FINISH_WARPS,
        maxnreg=MOST_REGISTERS,
    )
    return token, logprob, truncated_logprob, entropy, ok


def variants() -> list[Variant]:
    """Every form of the two kernels that `sample` can choose, for logits of aligned rows."""
    outputs = {
        "mini_ptr": "*i32",
        "list_ptr": "*i64",
        "token_ptr": "*i64",
        "logprob_ptr": "*fp32",
        "truncated_logprob_ptr": "*fp32",
        "entropy_ptr": "*fp32",
        "ok_ptr": "*i1",
    }
    sizes = {"vocab_size": "i32", "splits": "i32"}
    found = []
    for dtype in DTYPES.values():
        inputs = _inputs_signature(dtype)
        all_of_it = inputs | outputs | sizes
        for name, kernel, signature, warps, registers in (
            ("reduce", sample_reduce_kernel, inputs | sizes, _REDUCE_WARPS, None),
            ("finish", sample_finish_kernel, all_of_it, _FINISH_WARPS, MOST_REGISTERS),
        ):
            aligned = {key for key, kind in signature.items() if kind.startswith("*")}
            aligned |= {"logits_stride", "vocab_size"}
            found.append(
                Variant(
                    f"sample_{name}-{dtype}",
                    kernel,
                    signature,
                    {},
                    num_warps=warps,
                    maxnreg=registers,
                    aligned=frozenset(aligned),
                )
            )
    return found


def reduce_raw(logits: Tensor) -> tuple[Tensor, Tensor, int]:
    """Launch the first kernel on logits of which nothing is drawn.

    Returns
    -------
    logits : Tensor
        With contiguous rows, copied if they were not.
    partial : Tensor
        float32 ``[R, PARTIALS, splits]``.
    splits : int
        Chunks of a row.
    """
    rows, vocab_size = check_logits(logits)
    device = logits.device
    splits = triton.cdiv(vocab_size, _CHUNK)
    bound = torch.empty((rows, splits * MINIS.value), dtype=torch.float32, device=device)
    partial = torch.empty((rows, PARTIALS.value, splits), dtype=torch.float32, device=device)
    if logits.stride(1) != 1 and vocab_size > 1:
        logits = logits.contiguous()
    if rows:
        # Temperature 0: the bounds are plain maxima, without noise.
        zeros = torch.zeros(rows, dtype=torch.int64, device=device)
        number = zeros.view(torch.float32)[:rows]
        sample_reduce_kernel[(rows * splits,)](
            logits,
            logits.stride(0),
            number,
            zeros.view(torch.int32)[:rows],
            *(number, number),
            *(zeros, zeros, zeros, zeros),
            zeros.view(torch.bool)[:rows],
            0,
            bound,
            partial,
            vocab_size,
            splits,
            num_warps=_REDUCE_WARPS,
        )
    return logits, partial, splits


def _inputs_signature(dtype: str) -> dict[str, str]:
    return {
        "logits_ptr": f"*{dtype}",
        "logits_stride": "i32",
        "temperature_ptr": "*fp32",
        "top_k_ptr": "*i32",
        "top_p_ptr": "*fp32",
        "min_p_ptr": "*fp32",
        "seed_ptr": "*i64",
        "position_ptr": "*i64",
        "attempt_ptr": "*i64",
        "stream_ptr": "*i64",
        "live_ptr": "*i1",
        "masked": "i32",
        "bound_ptr": "*fp32",
        "partial_ptr": "*fp32",
    }


def check_logits(logits: Tensor) -> tuple[int, int]:
    """Return R and V. Raises ValueError for logits that no kernel here takes."""
    if logits.ndim != 2 or logits.dtype not in DTYPES or not 1 <= logits.shape[1] <= _MAX_VOCAB:
        raise ValueError(
            f"logits must be float32, bfloat16 or float16 [R, V] with 1 <= V <= {_MAX_VOCAB}, "
            f"got {logits.dtype} of shape {tuple(logits.shape)}"
        )
    return logits.shape[0], logits.shape[1]


def _check_row_values(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], rows: int, device: torch.device
) -> None:
    if tensor.dtype in dtypes and tensor.shape == (rows,) and tensor.device == device:
        return
    allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    raise ValueError(
        f"{name} must be {allowed} of shape ({rows},) on {device}, got {tensor.dtype} of shape "
        f"{tuple(tensor.shape)} on {tensor.device}"
    )
