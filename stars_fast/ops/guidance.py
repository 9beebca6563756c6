"""Logits of a language model that another one guides."""

from __future__ import annotations

import torch
from torch import Tensor

from stars_fast.ops.backend import uses_triton


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
        -inf. Tokens that guide and reference both give no chance keep their logits.
    """
    width = min(x.shape[1] for x in (logits, guide, reference) if x is not None)
    if uses_triton(logits.device):
        from stars_fast.kernels import guide_logits as kernel

        return kernel(logits, guide, reference, weight, width)
    plain = logits.to(torch.float32, copy=True)
    shared = plain[:, :width]
    given = guide[:, :width].float().log_softmax(dim=-1)
    change = given
    if reference is not None:
        taken = reference[:, :width].float().log_softmax(dim=-1)
        change = torch.where(given == taken, 0.0, given - taken)  # -inf - -inf is no number
    guided = torch.full_like(plain, -torch.inf)
    guided[:, :width] = torch.where(shared == -torch.inf, shared, shared + weight[:, None] * change)
    return torch.where(weight[:, None] == 0, plain, guided)


@guide_logits.register_fake
def _(logits: Tensor, guide: Tensor, reference: Tensor | None, weight: Tensor) -> Tensor:
    return torch.empty_like(logits, dtype=torch.float32)
