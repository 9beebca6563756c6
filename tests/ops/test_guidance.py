"""Guided logits in both forms: the sum as written, rows without guidance as they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stars_fast import ops

pytest.importorskip("triton", reason="Triton is for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
both = pytest.mark.parametrize("form", ["pytorch", "triton"])
WEIGHTS = torch.tensor([0.0, 0.5, -2.0, 1.0])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-5}  # of the sum: inputs are read exactly


def guided(form: str, *arguments: Tensor | None) -> Tensor:
    with ops.backend("triton" if form == "triton" else "pytorch"):
        found: Tensor = ops.guide_logits(*(x if x is None else x.to(DEVICE) for x in arguments))
    return found.cpu()


def some(width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn((4, width), generator=generator) * 4).to(dtype)


@both
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("referred", ["own", "lm", None])
def test_is_the_sum_as_written(form: str, dtype: torch.dtype, referred: str | None) -> None:
    logits, guide = some(2500, 1, dtype), some(2500, 2, dtype)
    reference = {"own": some(2500, 3, dtype), "lm": logits}.get(referred or "")
    got = guided(form, logits, guide, reference, WEIGHTS)
    change = guide.double().log_softmax(-1)
    if reference is not None:
        change -= reference.double().log_softmax(-1)
    want = logits.double() + WEIGHTS.double()[:, None] * change
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    assert torch.equal(got[0], logits[0].float())
    one = slice(2, 3)  # alone
    away = None if reference is None else reference[one]
    assert torch.equal(guided(form, logits[one], guide[one], away, WEIGHTS[one])[0], got[2])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@both
def test_padded_vocabularies_and_tokens_without_a_chance(form: str) -> None:
    wide = some(130, 2, torch.bfloat16)
    logits, guide, reference = (
        some(120, 1),
        wide[:, :110],
        some(100, 3),
    )  # dtypes and strides differ
    logits[:, 5] = guide[:, 6] = reference[:, 6] = guide[:, 7] = -torch.inf
    got = guided(form, logits, guide, reference, WEIGHTS.abs())
    assert torch.equal(got[0], logits[0])
    for row in (1, 2, 3):
        assert (got[row, 100:] == -torch.inf).all()
        assert got[row, 5] == -torch.inf
        assert got[row, 7] < -1e29
        assert got[row, 6] == logits[row, 6]
        assert torch.isfinite(got[row, 8:100]).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@both
def test_bad_logits_of_a_guide_are_no_one_else_s(form: str) -> None:
    guide = some(50, 2)
    guide[0, 3] = guide[1, 3] = torch.nan
    got = guided(form, some(50, 1), guide, some(50, 3), WEIGHTS)
    assert torch.isnan(got[1]).any()
    assert torch.isfinite(got[[0, 2, 3]]).all()


def test_what_the_launcher_cannot_take_is_named() -> None:
    from stars_fast.kernels import guide_logits

    good = {name: torch.zeros((2, 5)) for name in ("logits", "guide", "reference")}
    for name in ("logits", "guide", "reference"):
        with pytest.raises(ValueError, match=rf"^{name} must be"):
            guide_logits(**{**good, name: good[name].double()}, weight=torch.ones(2), width=5)
    with pytest.raises(ValueError, match="^guide must be"):
        guide_logits(**{**good, "guide": torch.zeros((2, 4))}, weight=torch.ones(2), width=5)
    with pytest.raises(ValueError, match="^weight must be"):
        guide_logits(**good, weight=torch.ones(3), width=5)


def test_operator_schema() -> None:
    operator = torch.ops.stars_fast.guide_logits.default
    for reference in (some(9, 3), None):
        torch.library.opcheck(operator, (some(9, 1), some(9, 2), reference, WEIGHTS))
