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

_PURPOSE_BITS = 3  # below the stream, in the counter's last word; 0 is a token draw


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
    words = _rounds(*counter.unbind(-1), *key.unbind(-1))
    return torch.stack(words, dim=-1)


def _rounds(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ten rounds on separate words, int64 tensors that broadcast with one another."""
    for _ in range(_ROUNDS):
        # The 64-bit products wrap as signed integers, which keeps their bits. What they leave
        # above bit 31 of c1 and c3 is masked off when it reaches c0 and c2.
        product0, product2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product2 >> 32) ^ (c1 ^ k0)).bitwise_and_(_MASK)
        c2 = ((product0 >> 32) ^ (c3 ^ k1)).bitwise_and_(_MASK)
        c1, c3 = product2, product0
        k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    return c0, c1 & _MASK, c2, c3 & _MASK


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


def token_noise(
    seed: Tensor, position: Tensor, attempt: Tensor, stream: Tensor, vocab_index: Tensor
) -> Tensor:
    """Gumbel noise of single vocabulary entries.

    The word for entry ``i`` is word ``i % 4`` of the counter ``(i // 4, position, attempt,
    stream << 3)`` under the key ``(seed low, seed high)``; csrc/philox.h says what a stream is.

    Parameters
    ----------
    seed : Tensor
        int64 ``[R]``, the bit pattern of each row's unsigned 64-bit seed.
    position, attempt, stream : Tensor
        integer ``[R]``, position in the response, attempt of the segment, and stream.
    vocab_index : Tensor
        int64 ``[R, W]``.

    Returns
    -------
    Tensor
        float32 ``[R, W]``.
    """
    words = _token_words(vocab_index >> 2, seed, position, attempt, stream)
    return gumbel_from_words(words.gather(-1, (vocab_index & 3).unsqueeze(-1)).squeeze(-1))


def token_noise_all(
    seed: Tensor, position: Tensor, attempt: Tensor, stream: Tensor, vocab_size: int
) -> Tensor:
    """Gumbel noise of the whole vocabulary, float32 ``[R, vocab_size]``; see `token_noise`."""
    blocks = torch.arange((vocab_size + 3) // 4, device=seed.device).expand(seed.shape[0], -1)
    words = _token_words(blocks, seed, position, attempt, stream)
    return gumbel_from_words(words.flatten(1)[:, :vocab_size])


def _token_words(
    block: Tensor, seed: Tensor, position: Tensor, attempt: Tensor, stream: Tensor
) -> Tensor:
    """Words ``[R, W, 4]`` of the token draws of blocks ``[R, W]`` of four vocabulary entries."""
    words = _rounds(
        block,
        position.to(torch.int64).unsqueeze(1),
        attempt.to(torch.int64).unsqueeze(1),
        stream.to(torch.int64).unsqueeze(1) << _PURPOSE_BITS,
        (seed & _MASK).unsqueeze(1),
        ((seed >> 32) & _MASK).unsqueeze(1),
    )
    return torch.stack(words, dim=-1)
