"""The most likely tokens, and log-probabilities of any, in both forms."""

from __future__ import annotations

import pytest
import torch
from helpers.sample_cases import row_of_each_filter, same
from torch import Tensor

from stars_fast import ops

pytest.importorskip("triton", reason="Triton is for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
both = pytest.mark.parametrize("form", ["pytorch", "triton"])


def top(form: str, logits: Tensor, count: int) -> Tensor:
    with ops.backend("triton" if form == "triton" else "pytorch"):
        tokens: Tensor = ops.top_tokens(logits.to(DEVICE), count)
    return tokens.cpu()


def logprobs(form: str, logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    with ops.backend("triton" if form == "triton" else "pytorch"):
        found = ops.token_logprobs(logits.to(DEVICE), tokens.to(DEVICE))
    return tuple(x.cpu() for x in found)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("vocab_size", "levels"), [(20, None), (5000, None), (5000, 7), (300, 1)])
def test_the_largest_of_equal_ones_the_lowest(
    form: str, vocab_size: int, levels: int | None, dtype: torch.dtype
) -> None:
    logits = row_of_each_filter(vocab_size, levels=levels, masked=0.3, seed=5).logits[:3].to(dtype)
    logits[0] = -logits[0].abs()  # negative values, -inf and -0.0
    logits[0, 7] = -0.0
    logits[0, 3] = 0.0
    for count in (1, 5, 20):
        want = logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :count]
        assert torch.equal(top(form, logits, count), want)


@both
def test_a_row_does_not_depend_on_others_or_on_the_count(form: str) -> None:
    logits = row_of_each_filter(400, levels=9, seed=2).logits
    tokens = top(form, logits, 20)
    for row in (0, 5):
        assert torch.equal(top(form, logits[row : row + 1], 5)[0], tokens[row, :5])


@both
def test_logprobs_are_those_of_a_draw(form: str) -> None:
    """To the bit, so that it does not matter where a row's neighbours had them from."""
    batch = row_of_each_filter(1009, seed=4)
    with ops.backend("triton" if form == "triton" else "pytorch"):
        drawn = ops.sample(*(x if x is None else x.to(DEVICE) for x in batch.arguments()))
    token, logprob, _, entropy, ok = (x.cpu() for x in drawn)
    got = logprobs(form, batch.logits, token.unsqueeze(1))
    assert same((got[0][:, 0], got[1], got[2]), (logprob, entropy, ok))


@both
def test_logprobs_of_several_tokens(form: str) -> None:
    logits = row_of_each_filter(700, masked=0.2, seed=1).logits[:4]
    tokens = torch.arange(45).repeat(4, 1) * 3 + 1
    got, entropy, ok = logprobs(form, logits, tokens)
    want = logits.double().log_softmax(-1)
    torch.testing.assert_close(got.double(), want.gather(1, tokens), rtol=1e-5, atol=3e-6)
    p = want.exp()
    torch.testing.assert_close(
        entropy.double(), torch.special.entr(p).sum(-1), rtol=1e-5, atol=1e-5
    )
    assert ok.all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@both
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_without_a_distribution_are_told_and_harm_no_other(form: str, bad: float) -> None:
    logits = row_of_each_filter(150, seed=3).logits[:3]
    tokens = torch.tensor([[1, 2]] * 3)
    want = logprobs(form, logits, tokens)
    broken = logits.clone()
    broken[1, 4 if bad != -torch.inf else slice(None)] = bad
    got = logprobs(form, broken, tokens)
    assert got[2].tolist() == [True, False, True]
    assert got[0][1].isnan().all()
    assert got[1][1].isnan()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])


def test_what_the_launchers_cannot_take_is_named() -> None:
    from stars_fast.kernels import token_logprobs, top_tokens

    logits = torch.zeros((2, 5))
    for count in (0, 6):
        with pytest.raises(ValueError, match=rf"count must be in \[1, 5\], got {count}"):
            top_tokens(logits, count)
    for tokens in (torch.zeros((2, 1)), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="tokens must be int64 of shape"):
            token_logprobs(logits, tokens)
    with pytest.raises(ValueError, match="logits must be"):
        token_logprobs(logits.double(), torch.zeros((2, 1), dtype=torch.int64))


def test_no_rows() -> None:
    for form in ("pytorch", "triton"):
        none = torch.zeros((0, 30))
        assert top(form, none, 4).shape == (0, 4)
        assert logprobs(form, none, torch.zeros((0, 2), dtype=torch.int64))[0].shape == (0, 2)


def test_operator_schemas() -> None:
    logits = row_of_each_filter(40).logits[:2]
    torch.library.opcheck(torch.ops.stars_fast.top_tokens.default, (logits, 3))
    tokens = torch.tensor([[3], [4]])
    torch.library.opcheck(torch.ops.stars_fast.token_logprobs.default, (logits, tokens))
