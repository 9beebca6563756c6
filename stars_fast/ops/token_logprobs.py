"""Log-probabilities of given tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from stars_fast.ops.backend import uses_triton
from stars_fast.ops.sample import entropy_of


@torch.library.custom_op("stars_fast::token_logprobs", mutates_args=())
def token_logprobs(
    logits: Tensor, tokens: Tensor, with_entropy: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `sample` says of a token, of tokens that something else has chosen.

    Parameters
    ----------
    logits : Tensor
        float32, bfloat16 or float16 ``[R, V]``; not changed.
    tokens : Tensor
        int64 ``[R, T]``.
    with_entropy : bool
        Whether `entropy` is wanted.

    Returns
    -------
    logprobs : Tensor
        float32 ``[R, T]``; NaN where `ok` is false.
    entropy : Tensor
        float32 ``[R]`` of the distribution, in nats; NaN where `ok` is false, unspecified without
        `with_entropy`.
    ok : Tensor
        bool ``[R]``, false where the row holds a NaN, +inf or nothing but -inf.
    """
    if uses_triton(logits.device):
        from stars_fast.kernels import token_logprobs as kernel

        return kernel(logits, tokens)
    logits = logits.float()
    ok = torch.isfinite(logits.amax(dim=-1))
    log_p = logits.log_softmax(dim=-1)
    logprobs = torch.where(ok.unsqueeze(1), log_p.gather(1, tokens), torch.nan)
    entropy = entropy_of(log_p) if with_entropy else torch.zeros_like(log_p[:, 0])
    return logprobs, torch.where(ok, entropy, torch.nan), ok


@token_logprobs.register_fake
def _(logits: Tensor, tokens: Tensor, with_entropy: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        logits.new_empty(tokens.shape, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.bool),
    )
