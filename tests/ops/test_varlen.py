"""Attention within texts and its log-sum-exps, and parts joined by them, against one softmax."""

from __future__ import annotations

import pytest
import torch
from helpers.attention_cases import Shape, joined_parts, plain_attention
from torch import Tensor

from stars_fast.ops.attention import AttentionOptions
from stars_fast.ops.varlen import varlen_attention

SHAPES = {
    "grouped": Shape(),
    "wide_keys": Shape(heads=3, kv_heads=1, key_dim=12, value_dim=5),
    "window": Shape(window=4),
    "softcap": Shape(softcap=1.5),
}
LENGTHS = [7, 1, 12]


def texts(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = (
        (shape.heads, shape.key_dim),
        (shape.kv_heads, shape.key_dim),
        (shape.kv_heads, shape.value_dim),
    )
    return [torch.randn((sum(LENGTHS), *size), generator=generator).to(dtype) for size in sizes]


@pytest.mark.parametrize("shape_name", SHAPES)
def test_agrees_with_attention_written_out(shape_name: str) -> None:
    shape = SHAPES[shape_name]
    query, key, value = texts(shape, torch.float64)
    options = AttentionOptions(0.3, shape.window, shape.softcap)
    out, lse = varlen_attention(query, key, value, LENGTHS, options)
    assert (out.dtype, lse.dtype) == (torch.float64, torch.float64)
    at = 0
    for length in LENGTHS:
        for i in range(length):
            text = list(range(at, at + length))
            args = (key.unsqueeze(1), value.unsqueeze(1), text, i, 0.3, shape)
            torch.testing.assert_close(out[at + i], plain_attention(query[at + i], *args, None))
            # A sink is a key without a value: its weight tells the sum of the others.
            sinks = torch.zeros(shape.heads, dtype=torch.float64)
            share = plain_attention(query[at + i], *args, sinks)[:, 0] / out[at + i][:, 0]
            torch.testing.assert_close(lse[:, at + i].sigmoid(), share)
        at += length
    single = LENGTHS[0]  # the text of one token sees itself
    torch.testing.assert_close(
        out[single], value[single].repeat_interleave(shape.heads // shape.kv_heads, dim=0)
    )


def test_low_precision_rounds_the_result_alone() -> None:
    query, key, value = texts(Shape(), torch.bfloat16)
    out, lse = varlen_attention(query, key, value, LENGTHS, AttentionOptions(0.3))
    want, want_lse = varlen_attention(
        query.double(), key.double(), value.double(), LENGTHS, AttentionOptions(0.3)
    )
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, want.bfloat16(), atol=1e-2, rtol=1e-2)


def test_no_texts() -> None:
    query, key, value = (x[:0] for x in texts(Shape(), torch.float32))
    out, lse = varlen_attention(query, key, value, [], AttentionOptions(1.0))
    assert (out.shape, lse.shape) == ((0, 4, 8), (4, 0))


@pytest.mark.parametrize("sinks", [False, True])
def test_parts_join_to_one_softmax(sinks: bool) -> None:
    """Of 20 keys in parts, some empty and one of a single key, in any order and any nesting."""
    generator = torch.Generator().manual_seed(0)
    scores, values = (
        torch.randn((3, 20, n), generator=generator, dtype=torch.float64) for n in (1, 6)
    )
    sink = torch.tensor([0.4, -2.0, 30.0], dtype=torch.float64) if sinks else None
    parts = []
    for part in (slice(0, 0), slice(0, 1), slice(1, 14), slice(14, 14), slice(14, 20)):
        lse = scores[:, part].logsumexp(dim=1)  # -inf of nothing
        weights = scores[:, part].softmax(dim=1)
        parts.append(((weights * values[:, part]).sum(dim=1), lse.squeeze(1)))
    total = scores.exp().sum(dim=(1, 2))
    if sink is not None:
        total = total + sink.exp()
    want = (scores.exp() * values).sum(dim=1) / total[:, None]
    for order in (parts, parts[::-1]):
        out, lse = joined_parts(order, sink)
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(lse, total.log())
    nested = joined_parts([joined_parts(parts[:3], None), joined_parts(parts[3:], None)], sink)
    torch.testing.assert_close(nested[0], want)
    nothing = joined_parts([parts[0], parts[3]], None)
    assert not nothing[0].any()
    assert (nothing[1] == -torch.inf).all()
