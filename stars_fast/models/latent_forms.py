"""Queries, keys and values of latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Keys and values are made of a latent, but for the keys' last channels, which turn and which all
heads share. Queries may be made of a latent, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from stars_fast.ops.fused import Norm, Rotary, rms_norm

__all__ = ["latent_product", "latent_turns"]


def latent_product(
    module: nn.Module,
    heads: int,
    norm_of: Callable[[nn.Module], Norm | None],
    join: Callable[[nn.Module, tuple[str, ...]], Callable[[Tensor], Sequence[Tensor]] | None],
) -> Callable[[Tensor], Sequence[Tensor]] | None:
    """Return what gives them, ``[T, heads * D]`` or ``[T, heads, D]``; None: it is none of those.

    Parameters
    ----------
    module
        The attention.
    heads
        Its query heads, of which each has keys and values of its own.
    norm_of
        Returns the norm that a module was found to be.
    join
        Returns the product of a module's linear layers, by their names.
    """
    down_norm, up = (getattr(module, name, None) for name in ("kv_a_layernorm", "kv_b_proj"))
    rank, passed = (getattr(module, name, None) for name in ("kv_lora_rank", "qk_nope_head_dim"))
    if not isinstance(down_norm, nn.Module) or not isinstance(up, nn.Module):
        return None
    if type(rank) is not int or type(passed) is not int:
        return None
    query_norm, query_up = (getattr(module, name, None) for name in ("q_a_layernorm", "q_b_proj"))
    first = "q_proj" if query_up is None else "q_a_proj"
    product = join(module, (first, "kv_a_proj_with_mqa"))
    norm = norm_of(down_norm)
    own_norm = None if query_norm is None else norm_of(query_norm)
    if product is None or norm is None or (own_norm is None) != (query_up is None):
        return None

    def run(x: Tensor) -> Sequence[Tensor]:
        query, latent = product(x)
        if own_norm is not None and query_up is not None:
            query = query_up(rms_norm(query, own_norm)[0])
        both = up(rms_norm(latent[:, :rank], norm)[0]).view(len(x), heads, -1)
        shared = latent[:, None, rank:].expand(-1, heads, -1)
        key = torch.cat((both[..., :passed], shared), dim=-1)
        return query, key.flatten(1), both[..., passed:]

    return run


@functools.cache
def latent_turns(start: int) -> tuple[Callable[[Tensor, Tensor], Rotary], ...]:
    """Return how tables may turn the channels of a head from `start` on."""
    return tuple(functools.partial(Rotary, start=start, parted=parted) for parted in (True, False))
