"""Sampling: the filters of transformers, then the Gumbel arg max of what they leave."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from helpers.sample_cases import FILTERS, Rows, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stars_fast.ops.backend import backend
from stars_fast.ops.philox import token_noise_all


@pytest.fixture(autouse=True, scope="module", params=["auto", "pytorch"])
def form(request: pytest.FixtureRequest) -> Iterator[None]:
    """C++, and what it is held to."""
    with backend(request.param):
        yield


class StableTopP(TopPLogitsWarper):
    """The warper with its sort made stable; in transformers the order of ties is unspecified."""

    def __call__(self, input_ids: None, scores: Tensor) -> Tensor:
        values, index = torch.sort(scores, descending=False, stable=True)
        remove = values.softmax(dim=-1).cumsum(dim=-1) <= 1 - self.top_p
        remove[..., -1:] = False
        return scores.masked_fill(remove.scatter(1, index, remove), -torch.inf)


def warped(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """What transformers would sample from: logits ``[R, V]``, -inf where removed."""
    scores = TemperatureLogitsWarper(temperature)(None, logits.float())
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = StableTopP(top_p)(None, scores)
    if min_p > 0:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), FILTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("coarse", [False, True], ids=["smooth", "ties"])
def test_agrees_with_the_warpers_of_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float, dtype: torch.dtype, coarse: bool
) -> None:
    generator = torch.Generator().manual_seed(top_k)
    logits = 3 * torch.randn((200, 101), generator=generator)
    logits = ((logits * 2).round() / 2 if coarse else logits).to(dtype)
    batch = rows(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=2**40)
    token, logprob, truncated, _, ok = batch.draw()

    want = warped(logits, temperature, top_k, top_p, min_p)
    noise = token_noise_all(batch.seed, batch.position, batch.attempt, batch.stream, 101)
    assert ok.all()
    assert torch.equal(token, (want + noise).argmax(-1))
    at = token.unsqueeze(1)
    torch.testing.assert_close(truncated, want.log_softmax(-1).gather(1, at).squeeze(1))
    torch.testing.assert_close(logprob, logits.float().log_softmax(-1).gather(1, at).squeeze(1))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0]),
    levels=st.integers(1, 4),
    masked=st.floats(0, 0.99),
)
def test_ties_and_masked_entries(
    seed: int, top_k: int, top_p: float, levels: int, masked: float
) -> None:
    """Few distinct values, many -inf: probabilities meet top_p exactly, ties straddle every cut."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.log(2.0 ** torch.randint(0, levels, (8, 32), generator=generator))
    hidden = torch.rand((8, 32), generator=generator) < masked
    hidden[:, seed % 32] = False
    logits = logits.masked_fill(hidden, -torch.inf)
    batch = rows(logits, top_k=top_k, top_p=top_p, seed=seed)
    token, _, _, _, ok = batch.draw()
    assert ok.all()
    kept = warped(logits, 1.0, top_k, top_p, 0.0) > -torch.inf
    # A sum that meets top_p exactly may round to either side of it, in transformers as here.
    near = warped(logits, 1.0, top_k, min(1.0, top_p + 1e-5), 0.0) > -torch.inf
    near |= kept
    assert near.gather(1, token.unsqueeze(1)).all()


@pytest.mark.parametrize("top_p", [0.2, 0.9])
def test_the_oracle_is_the_warper_where_nothing_ties(top_p: float) -> None:
    logits = torch.randn((50, 200), generator=torch.Generator().manual_seed(4))
    assert torch.equal(StableTopP(top_p)(None, logits), TopPLogitsWarper(top_p)(None, logits))


@pytest.mark.parametrize(("top_p", "want"), [(0.6, {1, 2, 3}), (0.5, {2, 3}), (0.2, {3})])
def test_ties_of_top_p_keep_the_highest_index(top_p: float, want: set[int]) -> None:
    """As removing from the low end of a stable ascending sort does; 0.5 is met exactly."""
    logits = torch.zeros((400, 4))
    token = rows(logits, top_p=top_p).draw()[0]
    assert set(token.tolist()) == want
    kept = warped(logits, 1.0, 0, top_p, 0.0)[0] > -torch.inf
    assert set(kept.nonzero().flatten().tolist()) == want


@pytest.mark.parametrize("top_k", [1, 3, 50])
def test_top_k_keeps_ties(top_k: int) -> None:
    """Thousands of equal entries; all of them can be drawn."""
    logits = torch.zeros((64, 5000))
    logits[:, 7] = -1.0
    token, _, truncated, _, _ = rows(logits, top_k=top_k).draw()
    assert len(set(token.tolist())) > 55
    assert 7 not in token
    torch.testing.assert_close(
        truncated, torch.full((64,), -torch.log(torch.tensor(4999.0)).item())
    )


def test_top_k_keeps_ties_far_apart() -> None:
    """One of the largest entries in every hundred, nowhere two of them close together."""
    logits = torch.full((300, 4000), -1.0)
    logits[:, ::100] = 1.0
    token = rows(logits, top_k=3).draw()[0]
    assert set(token.tolist()) == set(range(0, 4000, 100))


@pytest.mark.parametrize("vocab_size", [5000, 5024, 32_000])
def test_a_large_vocabulary(vocab_size: int) -> None:
    logits = 3 * torch.randn((40, vocab_size), generator=torch.Generator().manual_seed(8))
    batch = rows(logits, temperature=0.8, top_k=40)
    token, _, truncated, _, _ = batch.draw()
    want = warped(logits, 0.8, 40, 1.0, 0.0)
    noise = token_noise_all(batch.seed, batch.position, batch.attempt, batch.stream, vocab_size)
    assert torch.equal(token, (want + noise).argmax(-1))
    want_log_p = want.log_softmax(-1).gather(1, token.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(truncated, want_log_p)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 0, 1.0, 0.0), (0.7, 4, 1.0, 0.0), (1.2, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.1)],
)
def test_frequencies(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.tensor([1.5, 0.0, -1.0, 2.0, 0.3, -3.0, 0.9])
    n = 40_000
    token = rows(
        logits.expand(n, -1), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    ).draw()[0]
    probability = warped(logits[None], temperature, top_k, top_p, min_p).softmax(-1)[0].double()
    counts = torch.bincount(token, minlength=7)
    assert (counts[probability == 0] == 0).all()
    kept = probability > 0
    result = stats.chisquare(counts[kept], (probability[kept] / probability[kept].sum()) * n)
    assert result.pvalue > 1e-4


def test_positions_and_attempts_are_independent_draws() -> None:
    logits = torch.zeros((3000, 50))
    base = rows(logits)
    same_seed = replace(base, seed=torch.zeros(3000, dtype=torch.int64))
    by_position = replace(same_seed, position=torch.arange(3000)).draw()[0]
    by_attempt = replace(same_seed, attempt=torch.arange(3000)).draw()[0]
    for token in (by_position, by_attempt, base.draw()[0]):
        assert stats.chisquare(torch.bincount(token, minlength=50)).pvalue > 1e-4
    assert (by_position == by_attempt).float().mean() < 0.1


def _mixed_rows() -> Rows:
    """Rows of every route, a bad one among them, with a prime vocabulary size."""
    generator = torch.Generator().manual_seed(1)
    n = 24
    logits = 4 * torch.randn((n, 1009), generator=generator)
    logits[5] = torch.nan
    logits[6] = (logits[6]).round()

    def cycle(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([values[i % len(values)] for i in range(n)], dtype=dtype)

    return Rows(
        logits,
        cycle([0.8, 1.0, 0.0, 1.5, 0.3]),
        cycle([40, 0, 7, 900], torch.int32),
        cycle([1.0, 0.9, 0.5]),
        cycle([0.0, 0.0, 0.0, 0.05, 0.0, 0.2, 0.0]),
        torch.arange(n) * 7919,
        torch.arange(n) % 5,
        torch.arange(n) % 3,
        torch.arange(n) % 4,
    )


def test_a_row_depends_on_itself_alone() -> None:
    batch = _mixed_rows()
    whole = batch.draw()
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(24, generator=generator) for _ in range(3)]
    for order in (*orders, *(torch.tensor([i]) for i in range(24)), torch.arange(0, 24, 5)):
        for got, want in zip(batch.pick(order).draw(), whole, strict=True):
            assert torch.equal(got.nan_to_num(-9.0), want[order].nan_to_num(-9.0))


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = _mixed_rows()
    whole = mixed.draw()
    monkeypatch.setattr(sys.modules["stars_fast.ops.sample"], "_BLOCK", 3 * mixed.logits.shape[1])
    for result, want in zip(mixed.draw(), whole, strict=True):
        assert torch.equal(result.nan_to_num(-9.0), want.nan_to_num(-9.0))


def test_greedy_takes_the_lowest_index_of_the_largest() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [2.0, 2.0, 2.0, 2.0], [-1.0, -2.0, -3.0, 0.0]])
    token, logprob, truncated, _, ok = rows(logits, temperature=0.0, top_k=2, top_p=0.5).draw()
    assert token.tolist() == [1, 0, 3]
    assert truncated.tolist() == [0.0, 0.0, 0.0]
    assert ok.all()
    torch.testing.assert_close(logprob, logits.log_softmax(-1)[torch.arange(3), token])


def test_a_temperature_that_overflows_is_greedy() -> None:
    token, _, truncated, _, ok = rows(torch.tensor([[1.0, 3.0, 2.0]]), temperature=1e-39).draw()
    assert (token.item(), truncated.item(), ok.item()) == (1, 0.0, True)


@pytest.mark.parametrize("top_k", [0, 3])
def test_rows_without_a_distribution_are_reported(top_k: int) -> None:
    logits = torch.zeros((5, 8))
    logits[0, 3] = torch.nan
    logits[1, 2] = torch.inf
    logits[2] = -torch.inf
    logits[3, :7] = -torch.inf
    good = rows(torch.zeros((5, 8)), top_k=top_k).draw()
    token, logprob, truncated, _, ok = rows(logits, top_k=top_k).draw()
    assert ok.tolist() == [False, False, False, True, True]
    assert token.tolist() == [0, 0, 0, 7, good[0][4].item()]
    assert logprob[:3].isnan().all()
    assert truncated[:3].isnan().all()
    assert (logprob[3].item(), truncated[3].item()) == (0.0, 0.0)
    assert logprob[4] == good[1][4]


def test_strided_rows_and_untouched_inputs() -> None:
    storage = torch.randn((6, 40), generator=torch.Generator().manual_seed(2))
    view = storage[::2, 3:33]
    before = storage.clone()
    got = rows(view, top_k=5).draw()
    want = rows(view.contiguous(), top_k=5).draw()
    assert torch.equal(storage, before)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_a_long_row_has_the_same_sums_in_a_batch() -> None:
    """PyTorch splits one long sum over its threads; the results must not show it."""
    logits = torch.randn((3, 100_000), generator=torch.Generator().manual_seed(6))
    batch = rows(logits)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        whole, first = batch.draw(), batch.pick(torch.tensor([0])).draw()
    finally:
        torch.set_num_threads(threads)
    for got, want in zip(first, whole, strict=True):
        assert torch.equal(got, want[:1])


def test_operator_is_well_formed() -> None:
    batch = _mixed_rows().pick(torch.arange(7, 24))  # without NaN, which equals nothing
    torch.library.opcheck(torch.ops.stars_fast.sample.default, batch.arguments())
    batch = replace(batch, live=torch.arange(17) % 3 > 0)
    torch.library.opcheck(torch.ops.stars_fast.sample.default, batch.arguments())
