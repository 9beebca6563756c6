"""Change logits before a draw: biases, tokens not yet allowed, and penalties for repetition.

In vLLM's order, which is transformers' too: what may not be drawn, `bias`, then `repetition`, then
`frequency` and `presence`. Only the tokens that are named change, so a row names few.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stars_fast.ops.backend import uses_triton


@torch.library.custom_op("stars_fast::adjust_logits", mutates_args=())
def adjust_logits(
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
    known: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """Return logits to draw from.

    Parameters
    ----------
    logits : Tensor
        float32, bfloat16 or float16 ``[R, V]``; not changed.
    bias_ids, bias : Tensor
        int64 and float32 ``[R, B]``: added to the logits of these tokens. Here and below, ids
        outside [0, V) name none; a row has no token twice.
    held_ids : Tensor
        int64 ``[R, S]``, tokens that are not drawn where `held` says so; a row may repeat them.
    held : Tensor
        bool ``[R]``.
    seen_ids : Tensor
        int64 ``[R, W]``, the tokens of prompt and response.
    counts : Tensor
        int32 ``[R, W]``, how often each is in the response.
    repetition : Tensor
        float32 ``[R]``, > 0: a positive logit of a seen token is divided by it, any other
        multiplied (CTRL, arXiv 1909.05858); 1 is off.
    presence, frequency : Tensor
        float32 ``[R]``: ``presence + frequency * count`` is taken from the logits of the tokens in
        the response, as OpenAI's API describes it. Rounded once, from float64.
    known : Tensor, optional
        bool ``[V]``, tokens that can be drawn at all.
    allowed : Tensor, optional
        int32 ``[R, W]``, 32 W >= V: tokens that each row may draw, 32 in a word, the first in its
        lowest bit.

    Returns
    -------
    Tensor
        float32 ``[R, V]``, -inf for what is not to be drawn.
    """
    adjusted = logits.to(torch.float32, copy=True)
    if known is not None:
        adjusted.masked_fill_(~known, -torch.inf)
    if allowed is not None:
        bits = allowed.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=allowed.device)
        hidden = (bits & 1).view(len(logits), -1)[:, : logits.shape[1]] == 0
        adjusted.masked_fill_(hidden, -torch.inf)
    arguments = (bias_ids, bias, held_ids, held, seen_ids, counts, repetition, presence, frequency)
    if uses_triton(logits.device):
        from stars_fast.kernels import adjust_named as kernel

        kernel(adjusted, *arguments)
    else:
        _adjust_named(adjusted, *arguments)
    return adjusted


def _adjust_named(
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
    """Change the logits of the tokens that are named, in place."""
    row, at = _named(bias_ids, logits).nonzero(as_tuple=True)
    logits[row, bias_ids[row, at]] += bias[row, at]
    row, at = (_named(held_ids, logits) & held.unsqueeze(1)).nonzero(as_tuple=True)
    logits[row, held_ids[row, at]] = -torch.inf
    row, at = _named(seen_ids, logits).nonzero(as_tuple=True)
    x = logits[row, seen_ids[row, at]]
    x = torch.where(x < 0, x * repetition[row], x / repetition[row])
    count = counts[row, at].double()
    taken = frequency[row].double() * count + presence[row].double() * (count > 0)
    logits[row, seen_ids[row, at]] = (x.double() - taken).float()


def _named(ids: Tensor, logits: Tensor) -> Tensor:
    return (ids >= 0) & (ids < logits.shape[1])


@adjust_logits.register_fake
def _(
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
    known: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    return torch.empty_like(logits, dtype=torch.float32)
