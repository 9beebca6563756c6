"""Kernels of mixtures of experts, against PyTorch's forms of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from stars_fast.ops.backend import backend
from stars_fast.ops.experts import Experts, choose_experts, run_experts

pytest.importorskip("triton", reason="Triton is for Linux only")
from stars_fast.kernels import experts as kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Case:
    """Tokens and their experts, whose weights have the given layout."""

    tokens: int
    count: int
    top_k: int
    hidden: int = 40
    inner: int = 24
    dtype: torch.dtype = torch.float32
    bias: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.tokens + 7 * self.count)

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=self.random)).to(DEVICE, self.dtype)

    def experts(self) -> Experts:
        """Their weights."""
        e, h, i = self.count, self.hidden, self.inner
        transposed = self.options.get("transposed", False)
        up = (e, h, 2 * i) if transposed else (e, 2 * i, h)
        down = (e, i, h) if transposed else (e, h, i)
        return Experts(
            self.randn(*up, scale=h**-0.5),
            self.randn(*down, scale=i**-0.5),
            self.randn(e, 2 * i) if self.bias else None,
            self.randn(e, h) if self.bias else None,
            **self.options,
        )

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, the experts of each, all of them different, and their weights."""
        noise = torch.rand((self.tokens, self.count), generator=self.random)
        index = noise.topk(self.top_k, dim=1).indices.to(DEVICE)
        weights = torch.rand((self.tokens, self.top_k), generator=self.random).to(DEVICE)
        return 2 * self.randn(self.tokens, self.hidden), index, weights

    def check(self) -> None:
        """What kernels make of them is what PyTorch does, up to the order of sums."""
        experts, inputs = self.experts(), self.inputs()
        with backend("triton"):
            got = run_experts(*inputs, experts)
        with backend("pytorch"):
            want = run_experts(*inputs, experts)
        exact = self.dtype == torch.float32
        step = 2e-5 if exact else 4 * torch.finfo(self.dtype).eps
        torch.testing.assert_close(got, want, rtol=step, atol=step)
        assert got.dtype == self.dtype


GPT_OSS = {"activation": "clamped", "interleaved": True, "transposed": True}
CLAMPED = {"limit": 1.5, "alpha": 1.702}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("options", "bias"),
    [
        ({"activation": "silu"}, False),
        ({"activation": "gelu_tanh", "transposed": True}, True),
        ({"activation": "silu", "interleaved": True}, True),
        (GPT_OSS | CLAMPED, True),
    ],
    ids=["silu", "gelu transposed", "interleaved", "gpt-oss"],
)
def test_layouts(dtype: torch.dtype, options: dict[str, Any], bias: bool) -> None:
    Case(5, 4, 2, dtype=dtype, bias=bias, options=options).check()


@pytest.mark.parametrize(
    ("tokens", "count", "top_k", "hidden", "inner"),
    [
        (1, 1, 1, 8, 8),
        (1, 8, 8, 33, 17),
        (70, 3, 3, 16, 40),  # of one expert more than a block of pairs
        (40, 2, 1, 65, 65),
        (9, 130, 4, 16, 8),  # most experts have none
    ],
)
def test_sizes(tokens: int, count: int, top_k: int, hidden: int, inner: int) -> None:
    Case(tokens, count, top_k, hidden, inner).check()


def test_all_tokens_of_one_expert() -> None:
    case = Case(50, 6, 1)
    x, index, weights = case.inputs()
    index[:] = 4
    experts = case.experts()
    with backend("triton"):
        got = run_experts(x, index, weights, experts)
    with backend("pytorch"):
        torch.testing.assert_close(
            got, run_experts(x, index, weights, experts), rtol=2e-5, atol=2e-5
        )


def test_a_token_gets_the_same_in_any_batch() -> None:
    """But for the size of a program's block, which follows from the number of pairs."""
    case = Case(12, 4, 2)
    (x, index, weights), experts = case.inputs(), case.experts()
    with backend("triton"):
        whole = run_experts(x, index, weights, experts)
        parts = [
            run_experts(x[i : i + 3], index[i : i + 3], weights[i : i + 3], experts)
            for i in range(0, 12, 3)
        ]
    exact = 0.0 if DEVICE.type == "cuda" else 1e-6  # NumPy's products differ by place
    torch.testing.assert_close(whole, torch.cat(parts), rtol=exact, atol=exact)


def test_bad_numbers_stay_with_their_token() -> None:
    case = Case(6, 3, 2)
    (x, index, weights), experts = case.inputs(), case.experts()
    with backend("triton"):
        want = run_experts(x, index, weights, experts)
        x[2] = torch.nan
        got = run_experts(x, index, weights, experts)
    assert got[2].isnan().all()
    keep = [0, 1, 3, 4, 5]
    assert torch.equal(got[keep], want[keep])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(("count", "top_k"), [(1, 1), (8, 2), (13, 5), (128, 8)])
def test_choice(dtype: torch.dtype, share: bool, count: int, top_k: int) -> None:
    random = torch.Generator().manual_seed(count)
    # No two of a row are equal: of those, PyTorch may take any.
    ranks = torch.stack([torch.randperm(count, generator=random) for _ in range(7)])
    logits = ((ranks - count / 2) / 8).to(DEVICE, dtype)
    with backend("triton"):
        weights, index = choose_experts(logits, top_k, share=share)
    with backend("pytorch"):
        wanted, places = choose_experts(logits, top_k, share=share)
    assert torch.equal(index, places)
    torch.testing.assert_close(weights, wanted, rtol=1e-5, atol=1e-7)


def test_of_equal_logits_the_first_and_of_bad_ones_some() -> None:
    nan, inf = torch.nan, torch.inf
    logits = [
        [1.0, 2.0, 2.0, 0.0],
        [nan] * 4,
        [-inf] * 4,
        [0.0, 1.0, nan, 2.0],
        [0.0, inf, 1.0, 2.0],
    ]
    with backend("triton"):
        weights, index = choose_experts(torch.tensor(logits, device=DEVICE), 3, share=True)
    assert index[0].tolist() == [1, 2, 0]
    assert (index >= 0).all()
    assert (index < 4).all()
    assert weights[1:].isnan().all()


def test_the_order_of_pairs() -> None:
    """By expert, and there by pair; the table has each expert's blocks, and no others."""
    random = torch.Generator().manual_seed(0)
    for pairs, count, rows in itertools.product((1, 31, 33, 100), (1, 5, 40), (16, 32)):
        index = torch.randint(count, (pairs,), generator=random).to(DEVICE)
        blocks = min(pairs, count) + pairs // rows
        order = torch.full((pairs,), -7, dtype=torch.int32, device=DEVICE)
        table = torch.full((blocks, 3), -7, dtype=torch.int32, device=DEVICE)
        kernels.order_pairs_kernel[((pairs + 31) // 32,)](
            index, order, table, pairs, blocks, ROWS=rows, PAIRS=32, BLOCKS=32, EXPERTS=64
        )
        assert order.tolist() == index.argsort(stable=True).tolist()
        first, want = 0, []
        for expert, number in enumerate(index.bincount(minlength=count).tolist()):
            end = first + number
            want += [[expert, at, min(at + rows, end)] for at in range(first, end, rows)]
            first = end
        assert table[: len(want)].tolist() == want
        assert set(table[len(want) :, 0].tolist()) <= {-1}


def test_bad_arguments() -> None:
    case = Case(4, 3, 2)
    (x, index, weights), experts = case.inputs(), case.experts()

    def refused(match: str, *args: Any) -> None:
        with pytest.raises(ValueError, match=match):
            kernels.run_experts(*args)

    refused(r"x must be \[T, H\]", x.T, index, weights, experts)
    refused(r"index and weights must be \[4, K\]", x, index[:3], weights, experts)
    refused(
        "down must be torch.float32",
        x,
        index,
        weights,
        experts._replace(down=experts.down.double()),
    )
    refused(
        "gate_up must be contiguous",
        x,
        index,
        weights,
        experts._replace(gate_up=experts.gate_up.mT),
    )
    with pytest.raises(ValueError, match=r"count must be in \[1, 40\]"):
        kernels.choose_experts(x, 41, share=True)
    assert kernels.run_experts(x[:0], index[:0], weights[:0], experts).shape == (0, 40)
