"""The Triton `sample` against the PyTorch one, and what both must do.

Interpreted, a row takes a tenth of a second: batches mix the filters instead of repeating them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers.sample_cases import Rows, row_of_each_filter, rows, same
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from stars_fast.ops.philox import gumbel_from_words, token_noise_all

kernels = pytest.importorskip("stars_fast.kernels.sample", reason="Triton is for Linux only")
finish = pytest.importorskip("stars_fast.kernels.sample_finish", reason="Triton is for Linux only")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Draw = Callable[[Rows], tuple[Tensor, ...]]


def by_pytorch(batch: Rows) -> tuple[Tensor, ...]:
    return batch.draw()


def by_triton(batch: Rows) -> tuple[Tensor, ...]:
    arguments = (None if x is None else x.to(DEVICE) for x in batch.arguments())
    return tuple(x.cpu() for x in kernels.sample(*arguments))


both = pytest.mark.parametrize("draw", [by_pytorch, by_triton], ids=["pytorch", "triton"])


def check_equal(batch: Rows) -> None:
    """Tokens and `ok` are those of the PyTorch form, the floats close to float64."""
    got, want = by_triton(batch), by_pytorch(batch)
    assert got[0].tolist() == want[0].tolist()
    assert torch.equal(got[4], want[4])
    for a, b in zip(got[1:4], want[1:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=3e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("vocab_size", "levels", "masked"),
    [(7, None, 0.0), (101, 5, 0.5), (1009, None, 0.99), (5000, 9, 0.9)],
)
def test_tokens_of_the_pytorch_form(
    vocab_size: int, levels: int | None, masked: float, dtype: torch.dtype
) -> None:
    batch = row_of_each_filter(vocab_size, levels=levels, masked=masked, seed=vocab_size)
    check_equal(replace(batch, logits=batch.logits.to(dtype)))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    vocab_size=st.integers(1, 300),
    levels=st.sampled_from([None, 1, 2, 5]),
    masked=st.floats(0, 0.99),
    seed=st.integers(0, 2**20),
    temperature=st.sampled_from([0.3, 1.0, 5.0]),
    top_k=st.integers(0, 60),
    top_p=st.sampled_from([0.07, 0.61, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 1.0]),
)
def test_drawn_cases(
    vocab_size: int,
    levels: int | None,
    masked: float,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    logits = row_of_each_filter(vocab_size, levels=levels, masked=masked, seed=seed).logits[:4]
    check_equal(
        rows(
            logits,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
        )
    )


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 0.93, 0.0),  # most of a flat row: more than the list holds
        (1.0, 3, 1.0, 0.0),  # all of it is equal to the third largest
        (1.0, 3, 0.61, 0.0),
        (1.0, 1000, 1.0, 0.0),
        (1e-5, 0, 1.0, 0.0),
        (1.0, 0, 1.0, 0.5),
    ],
)
def test_thousands_of_ties(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.zeros((1, 3000))
    logits[:, ::7] = -1.0
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    batch = rows(logits, **options, seed=11)  # type: ignore[arg-type]
    check_equal(batch)
    assert same(by_triton(batch), by_triton(batch))


def test_top_p_looks_again_where_the_first_guess_weighs_too_little() -> None:
    """300 mini-chunks, each with entries that top-p keeps."""
    logits = 0.3 * torch.randn((1, 9600), generator=torch.Generator().manual_seed(3))
    logits[:, ::16] += 6.0
    check_equal(rows(logits, top_p=0.8))


def test_top_k_finds_entries_wherever_they_are() -> None:
    """All of the largest in one mini-chunk, or one in each of 40."""
    logits = torch.randn((2, 4096), generator=torch.Generator().manual_seed(5))
    logits[0, 640:672] += 20
    logits[1, ::100] += 20
    for top_k in (5, 40):
        check_equal(rows(logits, top_k=top_k, seed=top_k))


def test_top_k_keeps_the_first_entry_at_the_floor() -> None:
    """As many mini-chunks as entries are wanted, and index 0 is drawn."""
    logits = torch.full((1, 4096), -10.0)
    logits[:, ::32] = 1.0
    batch = rows(logits.expand(1000, -1), top_k=128)
    at_zero = (by_pytorch(batch)[0] == 0).nonzero().flatten()[:1]
    check_equal(batch.pick(at_zero))


def test_both_zeros_are_one_value() -> None:
    logits = torch.tensor([-0.0, 0.0, -1.0, -0.0]).expand(8, -1)
    batch = rows(logits, top_k=1)
    assert set(by_pytorch(batch)[0].tolist()) == {0, 1, 3}
    check_equal(batch)


def test_the_race_over_a_whole_vocabulary() -> None:
    """Steep and flat rows: winners with much noise, whose mini-chunks must be found."""
    generator = torch.Generator().manual_seed(12)
    logits = torch.randn((16, 3000), generator=generator) * torch.linspace(1, 8, 16).unsqueeze(1)
    check_equal(rows(logits, temperature=0.9, seed=70))


@both
def test_the_floats_against_float64(draw: Draw) -> None:
    batch = row_of_each_filter(5000, masked=0.2, seed=9).pick(torch.tensor([0, 1, 2, 7]))
    token, logprob, truncated, entropy, _ = draw(batch)
    log_p = batch.logits.double().log_softmax(-1)
    at = token.unsqueeze(1)
    terms = torch.where(log_p > -torch.inf, log_p * log_p.exp(), 0.0)
    torch.testing.assert_close(entropy.double(), -terms.sum(-1), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(
        logprob.double(), log_p.gather(1, at).squeeze(1), rtol=1e-6, atol=2e-6
    )
    scaled = batch.logits / batch.temperature.unsqueeze(1)
    kth = scaled[2].topk(40).values[-1]
    scaled[2] = scaled[2].masked_fill(scaled[2] < kth, -torch.inf)
    floor = scaled[3].max() + math.log(0.05)
    scaled[3] = scaled[3].masked_fill(scaled[3] < floor, -torch.inf)
    want = scaled.double().log_softmax(-1).gather(1, at).squeeze(1)
    torch.testing.assert_close(truncated.double(), want, rtol=1e-6, atol=2e-6)


@both
def test_entropy_of_known_distributions(draw: Draw) -> None:
    logits = torch.full((3, 64), -torch.inf)
    logits[0, 5] = 3.0
    logits[1] = -7.0
    logits[2, :8] = 100.0
    entropy = draw(rows(logits))[3]
    torch.testing.assert_close(entropy, torch.tensor([0.0, math.log(64), math.log(8)]))


@both
def test_greedy_and_top_k_of_one(draw: Draw) -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    token, _, truncated, _, _ = draw(rows(logits, temperature=0.0, top_k=2, top_p=0.5))
    assert (token.tolist(), truncated.tolist()) == ([1, 0], [0.0, 0.0])
    draws = draw(rows(logits[:1].expand(12, -1), top_k=1))[0]
    assert set(draws.tolist()) == {1, 2}


@both
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
def test_a_temperature_that_overflows_is_greedy(draw: Draw) -> None:
    logits = torch.full((1, 4200), -1.0)
    logits[0, [4100, 4150]] = 3.0
    token, _, truncated, _, ok = draw(rows(logits, temperature=1e-39))
    assert (token.item(), truncated.item(), ok.item()) == (4100, 0.0, True)


@both
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
def test_rows_without_a_distribution_leave_others_alone(draw: Draw) -> None:
    batch = row_of_each_filter(300).pick(torch.arange(7))
    logits = batch.logits.clone()
    logits[1, 3] = torch.nan
    logits[2, 299] = torch.inf
    logits[4] = -torch.inf
    logits[5] = torch.nan
    want = draw(batch)
    got = draw(replace(batch, logits=logits))
    assert got[4].tolist() == [True, False, False, True, False, False, True]
    bad, good = ~got[4], got[4]
    assert got[0][bad].eq(0).all()
    assert all(x[bad].isnan().all() for x in got[1:4])
    assert same(tuple(x[good] for x in got), tuple(x[good] for x in want))


@both
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_rows_that_are_not_live_are_not_read(draw: Draw) -> None:
    batch = row_of_each_filter(300).pick(torch.arange(5))
    want = draw(batch)
    live = torch.tensor([True, False, True, True, False])
    logits = batch.logits.masked_fill(~live.unsqueeze(1), torch.nan)
    got = draw(replace(batch, logits=logits, live=live))
    assert same(tuple(x[live] for x in got), tuple(x[live] for x in want))
    assert [x[~live].tolist() for x in got] == [[0, 0], *[[0.0, 0.0]] * 3, [True, True]]
    assert same(draw(replace(batch, live=torch.ones(5, dtype=torch.bool))), want)
    nothing = draw(replace(batch, logits=logits, live=torch.zeros(5, dtype=torch.bool)))
    assert [x.tolist() for x in nothing] == [[0] * 5, *[[0.0] * 5] * 3, [True] * 5]


def test_a_row_depends_on_itself_alone() -> None:
    batch = row_of_each_filter(1009, levels=40, seed=2).pick(torch.tensor([1, 2, 4, 5, 7, 11]))
    whole = by_triton(batch)
    for order in (torch.arange(5, -1, -1), torch.tensor([4]), torch.tensor([3, 1])):
        assert same(by_triton(batch.pick(order)), tuple(x[order] for x in whole))


def test_strided_rows_and_untouched_inputs() -> None:
    storage = torch.randn((6, 80), generator=torch.Generator().manual_seed(2))
    before = storage.clone()
    for view in (storage[::2, 3:43], storage[:3, ::2]):
        got = by_triton(rows(view, top_k=5))
        assert same(got, by_triton(rows(view.contiguous(), top_k=5)))
    assert torch.equal(storage, before)


def test_no_rows() -> None:
    shapes = [(x.shape, x.dtype) for x in by_triton(rows(torch.zeros((0, 9))))]
    assert shapes == [(x.shape, x.dtype) for x in by_pytorch(rows(torch.zeros((0, 9))))]


PROBABILITY = torch.tensor([0.3, 0.25, 0.15, 0.12, 0.1, 0.05, 0.03])


def p_value(token: Tensor, probability: Tensor) -> float:
    counts = torch.bincount(token, minlength=len(probability))
    assert (counts[probability == 0] == 0).all()
    kept = probability > 0
    want = probability[kept].double() / probability[kept].double().sum() * len(token)
    return float(stats.chisquare(counts[kept], want).pvalue)


def test_frequencies() -> None:
    """Top-k leaves six, top-p five, min-p four."""
    draws = 40_000 if DEVICE == "cuda" else 80
    logits = PROBABILITY.log().expand(draws, -1)
    token = by_triton(rows(logits, top_k=6, top_p=0.94, min_p=0.35))[0]
    kept = PROBABILITY * (PROBABILITY > 0.11)
    assert p_value(token, kept) > 1e-4
    # The same test rejects noise that takes one word for two neighbours.
    noise = token_noise_all(
        torch.arange(80), torch.full((80,), 3), torch.ones(80), torch.full((80,), 2), 7
    )
    noise[:, 1] = noise[:, 0]
    biased = (kept.log() + noise).argmax(-1)
    assert p_value(biased, kept) < 1e-4


@triton.jit
def _noise_kernel(word_ptr, out_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, finish.gumbel_from_word(tl.load(word_ptr + at).to(tl.uint32)))


def test_noise_over_the_whole_range_of_words() -> None:
    """log(E) is within two units in the last place of E, at both ends of the range too."""
    words = torch.cat(
        (
            torch.arange(512),
            2**32 - 1 - torch.arange(512),
            (2.0 ** torch.linspace(0, 32, 1024, dtype=torch.float64)).long().clamp(max=2**32 - 1),
            torch.randint(0, 2**32, (2048,), generator=torch.Generator().manual_seed(1)),
        )
    )
    out = torch.empty(4096, device=DEVICE)
    _noise_kernel[(1,)](words.to(DEVICE), out, BLOCK=4096)
    u = ((words.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24).double()
    want = -torch.log(-torch.log1p(-u))
    torch.testing.assert_close(out.cpu().double(), want, rtol=2.0**-23, atol=2.0**-21)
    torch.testing.assert_close(out.cpu(), gumbel_from_words(words), rtol=2.0**-23, atol=2.0**-21)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3)}, r"logits must be float32, .* got torch.float32 of shape \(3,"),
        ({"logits": torch.zeros((2, 4), dtype=torch.float64)}, "logits must be .*float64"),
        ({"logits": torch.zeros((2, 0))}, r"logits must be .* 1 <= V <= 262144"),
        ({"top_k": torch.zeros(2)}, r"top_k must be int32 of shape \(2,\)"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, r"seed must be int64 .* shape \(3,\)"),
        ({"position": torch.zeros(2)}, "position must be int64 or int32"),
        ({"live": torch.zeros(2)}, "live must be bool"),
        ({"min_p": torch.zeros(2, device="meta")}, "min_p must be .* on meta"),
    ],
)
def test_bad_arguments(change: dict[str, Tensor], message: str) -> None:
    batch = replace(rows(torch.zeros((2, 4))), **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        kernels.sample(*batch.arguments())


def test_variants_differ_by_name_and_name_their_arguments() -> None:
    variants = kernels.variants()
    assert len({variant.name for variant in variants}) == len(variants)
    for variant in variants:
        assert list(variant.signature) == variant.kernel.arg_names
