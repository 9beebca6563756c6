"""Philox4x32-10 in PyTorch, and the Gumbel noise made from it.

Philox is counter-based: the words of a draw are a pure function of a 128-bit counter and a 64-bit
key, so a draw never depends on what else is in the batch. The C++ core and the Triton kernels hold
the same generator; the tests check all of them against the published known-answer vectors.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF

_PURPOSE_TOKEN = 0  # the counter's last word; 1 is the accept test, drawn in the C++ core


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10 of each counter under its key.

    Parameters
    ----------
    counter : Tensor
        int64 ``[..., 4]``, words c0 to c3, each in [0, 2**32).
    key : Tensor
        int64 ``[..., 2]``, words k0 and k1, each in [0, 2**32); leading dimensions broadcast with
        those of `counter`.

    Returns
    -------
    Tensor
        int64 ``[..., 4]``, four words in [0, 2**32), of the shape of `counter`.
    """
    even = torch.stack((counter[..., 0], counter[..., 2]))  # (c0, c2): the words to multiply
    odd = torch.stack((counter[..., 1], counter[..., 3]))  # (c1, c3)
    round_key = torch.stack((key[..., 0], key[..., 1]))
    shape = (2,) + (1,) * (even.ndim - 1)
    multiplier = torch.tensor(_MULTIPLIERS, device=counter.device).view(shape)
    weyl = torch.tensor(_WEYL, device=counter.device).view(shape[: round_key.ndim])
    for _ in range(_ROUNDS):
        # The 64-bit product wraps as a signed integer, which keeps its bits; the junk that the
        # arithmetic shift leaves above bit 31 is masked off. Bits above 31 of `odd` go with it.
        product = (even * multiplier).flip(0)
        even = ((product >> 32) ^ odd ^ round_key) & _MASK
        odd = product
        round_key = round_key + weyl
    odd = odd & _MASK
    return torch.stack((even[0], odd[0], even[1], odd[1]), dim=-1)


def gumbel_from_words(words: Tensor) -> Tensor:
    """Standard Gumbel variates from 32-bit words.

    ``v = (w + 1/2) / 2**32`` is uniform and ``E = -log(1 - v)`` exponential; small ``E``, which
    becomes the upper tail of the Gumbel variate ``-log(E)``, keeps all its digits. That tail
    decides the arg max, so the tail of the sampled distribution is not cut off.

    Parameters
    ----------
    words : Tensor
        int64, any shape, values in [0, 2**32).

    Returns
    -------
    Tensor
        float32 of the same shape, in [-2.82, 22.88].
    """
    uniform = ((words.to(torch.float32) + 0.5) * 2.0**-32).clamp_(max=1.0 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def token_noise(seed: Tensor, position: Tensor, attempt: Tensor, vocab_index: Tensor) -> Tensor:
    """Gumbel noise of single vocabulary entries.

    The word for entry ``i`` is word ``i % 4`` of the counter ``(i // 4, position, attempt, 0)``
    under the key ``(seed low, seed high)``.

    Parameters
    ----------
    seed : Tensor
        int64 ``[R]``, the bit pattern of each row's unsigned 64-bit seed.
    position, attempt : Tensor
        integer ``[R]``, position in the response and attempt number of the segment.
    vocab_index : Tensor
        int64 ``[R, W]``.

    Returns
    -------
    Tensor
        float32 ``[R, W]``.
    """
    words = philox4x32(_counters(vocab_index >> 2, position, attempt), _keys(seed))
    return gumbel_from_words(words.gather(-1, (vocab_index & 3).unsqueeze(-1)).squeeze(-1))


def token_noise_all(seed: Tensor, position: Tensor, attempt: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise of the whole vocabulary, float32 ``[R, vocab_size]``; see `token_noise`."""
    blocks = torch.arange((vocab_size + 3) // 4, device=seed.device).expand(seed.shape[0], -1)
    words = philox4x32(_counters(blocks, position, attempt), _keys(seed))
    return gumbel_from_words(words.flatten(1)[:, :vocab_size])


def _keys(seed: Tensor) -> Tensor:
    """Keys ``[R, 1, 2]`` of int64 seeds ``[R]``."""
    return torch.stack((seed & _MASK, (seed >> 32) & _MASK), dim=-1).unsqueeze(1)


def _counters(block: Tensor, position: Tensor, attempt: Tensor) -> Tensor:
    """Token-draw counters ``[R, W, 4]`` of blocks ``[R, W]`` of four vocabulary entries."""
    return torch.stack(
        (
            block,
            position.to(torch.int64).unsqueeze(1).expand_as(block),
            attempt.to(torch.int64).unsqueeze(1).expand_as(block),
            torch.full_like(block, _PURPOSE_TOKEN),
        ),
        dim=-1,
    )
