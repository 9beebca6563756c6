"""Logits of a language model that another one guides."""

from __future__ import annotations

import torch
from torch import Tensor

from stars_fast.ops.backend import uses_triton

_NO_CHANCE = -1e30  # the least log-probability: differences of infinite ones are no numbers


@torch.library.custom_op("stars_fast::guide_logits", mutates_args=())
def guide_logits(logits: Tensor, guide: Tensor, reference: Tensor | None, weight: Tensor) -> Tensor:
    """Return ``logits + weight * (log p_guide - log p_reference)``.

    This is the distribution p_lm (p_guide / p_reference)^weight / Z, token by token: proxy tuning
    (arXiv 2401.08565); with the language model as reference DeRa (arXiv 2402.02992), with none
    GenARM (arXiv 2410.08193).

    Parameters
    ----------
    logits : Tensor
        float32, bfloat16 or float16 ``[R, V]``, the language model's; not changed.
    guide : Tensor
        ``[R, G]`` of such a dtype, the guide's. Vocabularies may be padded to different widths:
        token i is column i of each.
    reference : Tensor or None
        ``[R, F]``; may be `logits`. None: it gives every token the same chance.
    weight : Tensor
        float32 ``[R]``. A row whose weight is 0 keeps its logits to the bit.

    Returns
    -------
    Tensor
        float32 ``[R, V]``. Where the weight is not 0, columns that one of the models lacks are
        -inf. A logit of -inf of the guide or the reference counts as a log-probability of -1e30, so
        that tokens to which both give no chance keep theirs.
    """
    width = min(x.shape[1] for x in (logits, guide, reference) if x is not None)
    if uses_triton(logits.device):
        from stars_fast.kernels import guide_logits as kernel

        return kernel(logits, guide, reference, weight, width)
    out = logits.to(torch.float32, copy=True)
    guided = weight.nonzero().squeeze(1)
    rows = slice(None) if len(guided) == len(out) else guided
    change = _log_probs(guide, rows, width)
    if reference is not None:
        change -= _log_probs(reference, rows, width)
    change *= weight[rows, None]
    out[rows, :width] += change
    out[rows, width:] = -torch.inf
    return out


def _log_probs(logits: Tensor, rows: slice | Tensor, width: int) -> Tensor:
    """Log-probabilities of some rows over the first tokens, float32, finite unless NaN."""
    return logits[rows, :width].float().log_softmax(dim=-1).clamp_(min=_NO_CHANCE)


@guide_logits.register_fake
def _(logits: Tensor, guide: Tensor, reference: Tensor | None, weight: Tensor) -> Tensor:
    return torch.empty_like(logits, dtype=torch.float32)
