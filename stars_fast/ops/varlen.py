"""Causal attention within texts that lie one after the other, with its log-sum-exps.

The form in PyTorch of what `flash_attn_varlen_func` and `torch.nn.attention.varlen` do on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stars_fast.ops.attention import AttentionOptions


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Attention of every token to those of its own text, up to itself.

    Parameters
    ----------
    query : Tensor
        ``[T, heads, Dk]``, text after text.
    key, value : Tensor
        ``[T, kv_heads, Dk]`` and ``[T, kv_heads, Dv]``; `heads` is a multiple of `kv_heads`.
    lengths : sequence of int
        Tokens of each text, T together.
    options : AttentionOptions
        Of the layer. Sinks are not looked at: they take part once, where parts are joined.

    Returns
    -------
    out : Tensor
        ``[T, heads, Dv]``, dtype of `query`.
    lse : Tensor
        ``[heads, T]``, natural log-sum-exps of the scores; float64 for a query in float64, else
        float32, as are scores and sums.
    """
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    scaling, window, softcap, _ = options
    group = query.shape[1] // key.shape[1]
    outs, lses = [], []
    at = 0
    for length in lengths:
        text = slice(at, at + length)
        at += length
        q, k, v = query[text].to(wide), key[text].to(wide), value[text].to(wide)
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scaling
        if softcap > 0:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        place = torch.arange(length, device=query.device)
        hidden = place > place[:, None]
        if window > 0:
            hidden |= place <= place[:, None] - window
        scores = scores.masked_fill_(hidden, -torch.inf)
        lse = scores.logsumexp(dim=-1)
        outs.append(torch.einsum("hqk,khd->qhd", (scores - lse.unsqueeze(-1)).exp(), v))
        lses.append(lse)
    if not outs:
        return query.new_empty((0, query.shape[1], value.shape[2])), query.new_empty(
            (query.shape[1], 0), dtype=wide
        )
    return torch.cat(outs).to(query.dtype), torch.cat(lses, dim=1)
