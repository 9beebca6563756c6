"""The PyTorch Philox4x32-10 and the noise made from it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.philox_vectors import PHILOX4X32_10

from stars_fast import _core
from stars_fast.ops.philox import gumbel_from_words, philox4x32, token_noise, token_noise_all


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX4X32_10)
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    assert philox4x32(torch.tensor(counter), torch.tensor(key)).tolist() == list(words)


def test_same_words_as_the_core() -> None:
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 2**32, (1000, 4), dtype=np.uint32)
    keys = rng.integers(0, 2**32, (1000, 2), dtype=np.uint32)
    got = philox4x32(
        torch.from_numpy(counters.astype(np.int64)), torch.from_numpy(keys.astype(np.int64))
    )
    assert np.array_equal(got.numpy(), _core.philox4x32(counters, keys))


def test_keys_broadcast_and_inputs_stay() -> None:
    counter = torch.arange(24).view(2, 3, 4)
    key = torch.tensor([[[5, 6]], [[7, 8]]])
    before = counter.clone(), key.clone()
    got = philox4x32(counter, key)
    for i in range(2):
        for j in range(3):
            assert torch.equal(got[i, j], philox4x32(counter[i, j], key[i, 0]))
    assert torch.equal(counter, before[0])
    assert torch.equal(key, before[1])


def test_gumbel_at_the_ends_of_the_range() -> None:
    got = gumbel_from_words(torch.tensor([0, 2**31, 2**32 - 1])).tolist()
    # v = 2**-33, so E = v and -log E = 33 ln 2; v = 1/2; v = 1 - 2**-24
    want = [33 * math.log(2), -math.log(math.log(2)), -math.log(24 * math.log(2))]
    assert got == pytest.approx(want, rel=1e-6)


def test_gumbel_is_monotonic_and_finite() -> None:
    words = torch.linspace(0, 2**32 - 1, 100_001, dtype=torch.float64).to(torch.int64)
    noise = gumbel_from_words(words)
    assert noise.isfinite().all()
    assert (noise.diff() <= 0).all()


def test_noise_of_single_entries_is_the_noise_of_the_vocabulary() -> None:
    seed = torch.tensor([1, -1, 2**62])  # -1 is the bit pattern of 2**64 - 1
    position, attempt = torch.tensor([0, 7, 100]), torch.tensor([0, 3, 1], dtype=torch.int32)
    stream = torch.tensor([0, 5, 2**28])
    for vocab_size in (1, 3, 10):
        whole = token_noise_all(seed, position, attempt, stream, vocab_size)
        index = torch.arange(vocab_size).flip(0).expand(3, -1)
        assert whole.shape == (3, vocab_size)
        assert torch.equal(token_noise(seed, position, attempt, stream, index), whole.flip(1))


def test_layout_of_counter_and_key() -> None:
    """Counter (index // 4, position, attempt, stream * 8), word index % 4, key (low, high)."""
    seed = (3 << 32) | 9
    got = token_noise(*(torch.tensor([x]) for x in (seed, 5, 2, 2**28 + 1)), torch.tensor([[11]]))
    words = philox4x32(torch.tensor([2, 5, 2, 2**31 + 8]), torch.tensor([9, 3]))
    assert got.item() == gumbel_from_words(words[3]).item()
