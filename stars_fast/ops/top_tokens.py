"""The most likely tokens of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from stars_fast.ops.backend import uses_triton

_INDEX = (1 << 31) - 1


@torch.library.custom_op("stars_fast::top_tokens", mutates_args=())
def top_tokens(logits: Tensor, count: int) -> Tensor:
    """Return each row's most likely tokens, the most likely first, of equal ones the lowest.

    Parameters
    ----------
    logits : Tensor
        float32, bfloat16 or float16 ``[R, V]``; not changed.
    count : int
        T, from 1 to V.

    Returns
    -------
    Tensor
        int64 ``[R, T]``; some tokens where the row holds NaN.
    """
    if uses_triton(logits.device):
        from stars_fast.kernels import top_tokens as kernel

        return kernel(logits, count)
    bits = (logits.float() + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    index = torch.arange(logits.shape[1], device=logits.device)
    # By value, then by index: no two are equal, so neither width nor chance decides a tie.
    return _INDEX - ((order << 31) | (_INDEX - index)).topk(count, dim=-1).values % (1 << 31)


@top_tokens.register_fake
def _(logits: Tensor, count: int) -> Tensor:
    return logits.new_empty((logits.shape[0], count), dtype=torch.int64)
