"""Sampling in C++ against its PyTorch form: the same tokens, whatever the parameters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.sample_cases import FILTERS, Rows, row_of_each_filter, rows, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stars_fast.ops import cpu
from stars_fast.ops.backend import backend
from stars_fast.ops.philox import token_noise_all


def undecided(batch: Rows) -> Tensor:
    """Return the rows that C++ leaves to PyTorch."""
    logits, *columns, live = batch.arguments()
    n = len(batch.logits)
    results = (torch.zeros(n, dtype=torch.int64), *torch.zeros((3, n)), torch.ones(n).bool())
    return cpu.sample(logits, tuple(columns), live, results, with_entropy=False)


def check(batch: Rows) -> None:
    """Compare both forms, and the numbers with float64."""
    got = batch.draw()
    with backend("pytorch"):
        want = batch.draw()
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[4], want[4])
    log_p = batch.logits.double().log_softmax(dim=-1)
    logprob = log_p.gather(1, got[0].unsqueeze(1)).squeeze(1)
    entropy = -(log_p.exp() * log_p.clamp(min=-1e30)).sum(dim=-1)
    drawn = got[4] if batch.live is None else got[4] & batch.live
    for number, exact in ((1, logprob), (3, entropy)):
        torch.testing.assert_close(got[number][drawn], exact[drawn].float(), rtol=1e-6, atol=2e-6)
        assert torch.equal(got[number][~drawn].isnan(), want[number][~drawn].isnan())
    torch.testing.assert_close(got[2], want[2], rtol=1e-5, atol=2e-5, equal_nan=True)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    vocab_size=st.sampled_from([1, 2, 7, 127, 128, 129, 1000, 4096, 4500, 9000]),
    levels=st.none() | st.integers(1, 40),
    masked=st.sampled_from([0.0, 0.3, 0.99]),
    seed=st.integers(0, 2**20),
    top_k=st.none() | st.sampled_from([1, 2, 40, 300]),
    top_p=st.none() | st.sampled_from([1e-30, 0.25, 0.5, 0.999, 1.0]),
    min_p=st.none() | st.sampled_from([1e-40, 0.01, 0.5, 1.0]),
    temperature=st.none() | st.sampled_from([0.01, 0.5, 1.0, 3.0, 1e30]),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_same_tokens(
    vocab_size: int,
    levels: int | None,
    masked: float,
    seed: int,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    temperature: float | None,
    spread: float,
) -> None:
    batch = row_of_each_filter(vocab_size, levels=levels, masked=masked, seed=seed)
    changed = {
        name: torch.full_like(getattr(batch, name), value)
        for name, value in (
            ("top_k", top_k),
            ("top_p", top_p),
            ("min_p", min_p),
            ("temperature", temperature),
        )
        if value is not None
    }
    check(replace(batch, logits=batch.logits * spread, **changed))


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), FILTERS)
def test_noise_that_makes_all_entries_equal(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Only the last digits of PyTorch's logarithms choose among them."""
    batch = rows(
        torch.zeros(20, 300), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    noise = token_noise_all(batch.seed, batch.position, batch.attempt, batch.stream, 300)
    batch = replace(batch, logits=-noise * temperature)
    if (top_k == 0 or top_k > 300) and top_p == 1.0 and min_p == 0.0:
        assert undecided(batch).all()
    check(batch)


@pytest.mark.parametrize("top_k", [0, 30])
def test_sums_that_meet_top_p(top_k: int) -> None:
    """Where 8 of 16 equal entries have half of the mass, rounding says whether a ninth is kept."""
    batch = rows(torch.zeros(30, 16).log1p(), top_k=top_k, top_p=0.5)
    assert undecided(batch).all()
    check(batch)


def test_few_rows_are_undecided() -> None:
    logits = 3 * torch.randn((500, 2000), generator=torch.Generator().manual_seed(0))
    filters = [(t, k, p, m) for t, k, p, m in FILTERS if k <= 2000]
    for temperature, top_k, top_p, min_p in filters:
        batch = rows(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        assert undecided(batch).sum() < 3
    assert not undecided(rows(logits, min_p=1.0)).any()
    assert not undecided(rows(logits, temperature=0.0)).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 130, 4999])
def test_rows_without_a_distribution(value: float, at: int) -> None:
    batch = row_of_each_filter(5000)
    batch.logits[::2, at] = value
    batch.logits[1] = -torch.inf
    batch.logits[3] = torch.nan
    check(batch)


def test_values_at_the_ends_of_the_range() -> None:
    """Division overflows, and makes different logits equal."""
    logits = torch.tensor([[3e38, -3e38, 1.0, 0.0], [1e-45, -1e-45, 0.0, -0.0], [-3e38] * 4])
    for temperature in (1e-45, 1e-38, 0.5, 1.0, 1e38):
        for top_k, top_p, min_p in ((0, 1.0, 0.0), (2, 1.0, 0.0), (0, 0.9, 0.0), (3, 0.5, 0.2)):
            batch = rows(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
            got = batch.draw()[0]
            with backend("pytorch"):
                assert torch.equal(got, batch.draw()[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    batch = row_of_each_filter(1000)
    check(replace(batch, logits=batch.logits.to(dtype)))


def test_rows_that_are_not_live() -> None:
    batch = row_of_each_filter(700, seed=5)
    check(replace(batch, live=torch.arange(len(batch.logits)) % 3 > 0))
    check(replace(batch, live=torch.zeros(len(batch.logits), dtype=torch.bool)))


@pytest.mark.parametrize("name", ["top_k", "stream", "live"])
def test_columns_of_other_rows_are_refused(name: str) -> None:
    batch = replace(rows(torch.zeros(3, 8)), **{name: torch.ones(2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=rf"{name} must have shape \(3,\), got \(2,\)"):
        batch.draw()


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_and_neighbours_change_no_bit(threads: int) -> None:
    """Rows on threads, and vocabularies of few rows on several."""
    batch = row_of_each_filter(100_000)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = batch.draw()
        torch.set_num_threads(threads)
        assert same(batch.draw(), whole)
        for some in (torch.tensor([4]), torch.tensor([7, 2])):
            assert same(batch.pick(some).draw(), tuple(x[some] for x in whole))
    finally:
        torch.set_num_threads(before)
