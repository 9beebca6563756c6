"""The distribution that `sample` draws from, whole."""

from __future__ import annotations

import torch
from torch import Tensor


def truncated_logprobs(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """Return log-probabilities of all tokens under the distribution that a draw is from.

    Filters and their ties are those of `stars_fast.ops.sample`.

    Parameters
    ----------
    logits : Tensor
        float32, bfloat16 or float16 ``[R, V]``; not changed.
    temperature, top_p, min_p : Tensor
        float32 ``[R]``. At a temperature of 0 the arg max has all of it.
    top_k : Tensor
        int32 ``[R]``.

    Returns
    -------
    Tensor
        float64 ``[R, V]``, -inf where nothing is drawn; NaN in rows whose logits hold a NaN, +inf
        or nothing but -inf.
    """
    logits = logits.to(torch.float32)
    vocab_size = logits.shape[1]
    greedy = (temperature == 0) | ~torch.isfinite(logits.amax(dim=-1) / temperature)
    scaled = logits / torch.where(greedy, 1.0, temperature).unsqueeze(1)
    if bool(greedy.any()):
        best = logits.argmax(dim=-1, keepdim=True)
        peaked = torch.full_like(scaled, -torch.inf).scatter_(1, best, scaled.gather(1, best))
        scaled = torch.where(greedy.unsqueeze(1), peaked, scaled)
    limit = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size)
    most = int(limit.max()) if bool((top_k > 0).any()) else vocab_size
    if most < vocab_size or bool((limit < vocab_size).any()):
        values = scaled.topk(most, dim=-1).values
        last = values.gather(1, (limit.long() - 1).clamp(max=most - 1).unsqueeze(1))
        limited = (limit < vocab_size).unsqueeze(1)
        scaled = scaled.masked_fill(limited & (scaled < last), -torch.inf)
    if bool((top_p < 1).any()):
        scaled = torch.where((top_p < 1).unsqueeze(1), _nucleus(scaled, top_p), scaled)
    if bool((min_p > 0).any()):
        relative = (scaled - scaled.amax(dim=-1, keepdim=True)).to(torch.float64).exp_()
        scaled = scaled.masked_fill(relative < min_p.to(torch.float64).unsqueeze(1), -torch.inf)
    return scaled.to(torch.float64).log_softmax(dim=-1)


def _nucleus(scaled: Tensor, top_p: Tensor) -> Tensor:
    """Return the most likely entries that sum up to top_p, the others -inf."""
    # The reverse of a stable ascending sort: of equal values the last column comes first.
    values, order = scaled.sort(dim=-1, stable=True)
    values, order = values.flip(-1), order.flip(-1)
    weight = (values - values[:, :1]).to(torch.float64).exp_()
    running = weight.cumsum(dim=-1)
    keep = running - weight < (top_p.to(torch.float64) * running[:, -1]).unsqueeze(1)
    return torch.full_like(scaled, -torch.inf).scatter_(
        1, order, values.masked_fill(~keep, -torch.inf)
    )
