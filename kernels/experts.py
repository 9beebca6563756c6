"""Mixtures of experts: a layer's choice, order, both products and sum, each in one launch.

Pairs of a token and an expert are put in the order of their experts. A program of a product takes
some of one expert's and some columns of its weights, so that those who share an expert read its
weights together. Every sum has a fixed order: nothing is added atomically.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars_fast.kernels.aot import Variant
from stars_fast.kernels.rounding import INTERPRETED, rounded
from stars_fast.kernels.sample import DTYPES

if TYPE_CHECKING:
    from stars_fast.ops.experts import Experts

_PAIRS = 32  # of a program that orders them
_BLOCKS = 32  # of the table of blocks, at a time
_SUMMED = 1024  # channels of a program that sums
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "clamped": 2}


@triton.jit
def choose_experts_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [T, E]
    logits_stride,
    weights_ptr,  # out, float32 [T, COUNT]
    index_ptr,  # out, int64 [T, COUNT]
    experts,
    COUNT: tl.constexpr,
    SLOTS: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program t: the experts of token t, of equal logits the first; weights of bad ones are NaN."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    slot = tl.arange(0, SLOTS)
    x = tl.load(logits_ptr + token * logits_stride + at, mask=at < experts, other=float("-inf"))
    x = x.to(tl.float32)
    unknown = tl.max((x != x).to(tl.int32), axis=0) > 0  # noqa: PLR0124 - NaN
    x = tl.where(unknown, 0.0, x)
    largest = tl.max(x, axis=0)
    bad = unknown | (tl.abs(largest) == float("inf"))
    x = tl.where(bad & (at < experts), 0.0, x)
    largest = tl.where(bad, 0.0, largest)
    total = 0.0
    if not SHARE:
        total = tl.sum(tl.exp(x - largest), axis=0)
    weights = tl.zeros([SLOTS], tl.float32)
    index = tl.zeros([SLOTS], tl.int64)
    for number in tl.static_range(COUNT):
        value = tl.max(x, axis=0)
        found = tl.min(tl.where(x == value, at, experts - 1), axis=0)
        weight = tl.exp(value - largest)
        if SHARE:
            total += weight
        weights = tl.where(slot == number, weight, weights)
        index = tl.where(slot == number, found.to(tl.int64), index)
        x = tl.where(at == found, float("-inf"), x)
    out = token * COUNT + slot
    weights = tl.where(bad, float("nan"), weights / total)
    tl.store(weights_ptr + out, weights, mask=slot < COUNT)
    tl.store(index_ptr + out, index, mask=slot < COUNT)


@triton.jit
def order_pairs_kernel(  # type: ignore[no-untyped-def]
    index_ptr,  # int64 [pairs]
    order_ptr,  # out, int32 [pairs]: the pairs by expert
    blocks_ptr,  # out, int32 [blocks, 3]: expert, or -1; its first place in the order; its last + 1
    pairs,
    blocks,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCKS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Program p: places of some pairs, with the counts of all; the first makes the table, too."""
    program = tl.program_id(0)
    step = tl.arange(0, PAIRS)
    name = tl.arange(0, EXPERTS)
    counts = tl.zeros([EXPERTS], tl.int32)
    before = tl.zeros([EXPERTS], tl.int32)
    for start in range(0, pairs, PAIRS):
        at = start + step
        expert = tl.load(index_ptr + at, mask=at < pairs, other=-1).to(tl.int32)
        found = tl.sum((expert[:, None] == name[None, :]).to(tl.int32), axis=0)
        counts += found
        before += tl.where(start < program * PAIRS, found, 0)
    first = tl.cumsum(counts, axis=0) - counts
    mine = program * PAIRS + step
    expert = tl.load(index_ptr + mine, mask=mine < pairs, other=-1).to(tl.int32)
    earlier = (expert[:, None] == expert[None, :]) & (step[:, None] > step[None, :])
    place = tl.sum(earlier.to(tl.int32), axis=1)
    own = expert[:, None] == name[None, :]
    place += tl.sum(tl.where(own, (first + before)[None, :], 0), axis=1)
    tl.store(order_ptr + place, mine, mask=mine < pairs)
    if program == 0:
        needed = (counts + ROWS - 1) // ROWS
        end = tl.cumsum(needed, axis=0)
        for start in range(0, blocks, BLOCKS):
            block = start + tl.arange(0, BLOCKS)
            owner = tl.sum((block[:, None] >= end[None, :]).to(tl.int32), axis=1)
            own = owner[:, None] == name[None, :]
            number = block - tl.sum(tl.where(own, (end - needed)[None, :], 0), axis=1)
            begin = tl.sum(tl.where(own, first[None, :], 0), axis=1) + number * ROWS
            last = tl.sum(tl.where(own, (first + counts)[None, :], 0), axis=1)
            live = block < blocks
            out = blocks_ptr + block * 3
            tl.store(out, tl.where(owner < EXPERTS, owner, -1), mask=live)
            tl.store(out + 1, begin, mask=live)
            tl.store(out + 2, tl.minimum(begin + ROWS, last), mask=live)


@triton.jit
def _dot(a, b, acc):  # type: ignore[no-untyped-def]
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _weights(base, k, deep, column, inside, depth, width, TRANSPOSED: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of an expert's weights: channels `k` of its input, `column` of its output."""
    if TRANSPOSED:
        at = k[:, None] * width + column[None, :]
    else:
        at = k[:, None] + column[None, :].to(tl.int64) * depth
    return tl.load(base + at, mask=deep[:, None] & inside[None, :], other=0.0)


@triton.jit
def _activated(gate, up, limit, alpha, dtype: tl.constexpr, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The activated gate times up, rounded where PyTorch rounds."""
    gate = rounded(gate, dtype).to(tl.float32)
    up = rounded(up, dtype).to(tl.float32)
    y = gate
    if ACTIVATION == 1:
        y = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    if ACTIVATION == 2:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit) + 1.0
        y = alpha * gate
    # By a sigmoid; the exponent is never positive.
    t = tl.exp(-tl.abs(y))
    gate = gate * tl.where(y < 0, t, 1.0) / (1.0 + t)
    return rounded(gate, dtype).to(tl.float32) * up


@triton.jit
def experts_up_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [T, H]
    x_stride,
    weight_ptr,  # [E, ...]
    bias_ptr,  # [E, 2 I]
    order_ptr,
    blocks_ptr,
    out_ptr,  # [pairs, I], in the order of experts
    hidden,
    inner,
    top_k,
    expert_stride,
    limit,
    alpha,
    ACTIVATION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Program (b, c): act(gate) * up of a block of pairs, some columns of both."""
    block = tl.program_id(0)
    expert = tl.load(blocks_ptr + block * 3).to(tl.int64)
    if expert >= 0:
        at = tl.load(blocks_ptr + block * 3 + 1) + tl.arange(0, ROWS)
        live = at < tl.load(blocks_ptr + block * 3 + 2)
        token = tl.load(order_ptr + at, mask=live, other=0) // top_k
        k = tl.arange(0, DEPTH)
        x_at = x_ptr + token.to(tl.int64)[:, None] * x_stride + k[None, :]
        base = weight_ptr + expert * expert_stride
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < inner
        if INTERLEAVED:
            pair = tl.program_id(1) * 2 * COLUMNS + tl.arange(0, 2 * COLUMNS)
            there = pair < 2 * inner
            both = tl.zeros([ROWS, 2 * COLUMNS], tl.float32)
            for start in range(0, hidden, DEPTH):
                deep = start + k < hidden
                a = tl.load(x_at + start, mask=live[:, None] & deep[None, :], other=0.0)
                b = _weights(base, start + k, deep, pair, there, hidden, 2 * inner, TRANSPOSED)
                both = _dot(a, b, both)
            if BIAS:
                bias = tl.load(bias_ptr + expert * 2 * inner + pair, mask=there, other=0.0)
                both += bias.to(tl.float32)[None, :]
            gate, up = tl.split(tl.reshape(both, [ROWS, COLUMNS, 2]))
        else:
            gate = tl.zeros([ROWS, COLUMNS], tl.float32)
            up = tl.zeros([ROWS, COLUMNS], tl.float32)
            for start in range(0, hidden, DEPTH):
                deep = start + k < hidden
                a = tl.load(x_at + start, mask=live[:, None] & deep[None, :], other=0.0)
                b = _weights(base, start + k, deep, column, inside, hidden, 2 * inner, TRANSPOSED)
                gate = _dot(a, b, gate)
                b = _weights(
                    base, start + k, deep, column + inner, inside, hidden, 2 * inner, TRANSPOSED
                )
                up = _dot(a, b, up)
            if BIAS:
                b_at = bias_ptr + expert * 2 * inner + column
                gate += tl.load(b_at, mask=inside, other=0.0).to(tl.float32)[None, :]
                up += tl.load(b_at + inner, mask=inside, other=0.0).to(tl.float32)[None, :]
        made = _activated(gate, up, limit, alpha, dtype, ACTIVATION)
        out_at = out_ptr + at.to(tl.int64)[:, None] * inner + column[None, :]
        tl.store(out_at, rounded(made, dtype), mask=live[:, None] & inside[None, :])


@triton.jit
def experts_down_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [pairs, I], in the order of experts
    weight_ptr,  # [E, ...]
    bias_ptr,  # [E, H]
    order_ptr,
    blocks_ptr,
    share_ptr,  # float32 [pairs]
    out_ptr,  # [pairs, H]
    hidden,
    inner,
    expert_stride,
    TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Program (b, c): the weighted results of a block of pairs, some columns."""
    block = tl.program_id(0)
    expert = tl.load(blocks_ptr + block * 3).to(tl.int64)
    if expert >= 0:
        at = tl.load(blocks_ptr + block * 3 + 1) + tl.arange(0, ROWS)
        live = at < tl.load(blocks_ptr + block * 3 + 2)
        k = tl.arange(0, DEPTH)
        x_at = x_ptr + at.to(tl.int64)[:, None] * inner + k[None, :]
        base = weight_ptr + expert * expert_stride
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < hidden
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, inner, DEPTH):
            deep = start + k < inner
            a = tl.load(x_at + start, mask=live[:, None] & deep[None, :], other=0.0)
            # `_weights`, which as a call spills 8 bytes on sm_100 with Triton 3.7.
            if TRANSPOSED:
                w_at = base + (start + k)[:, None] * hidden + column[None, :]
            else:
                w_at = base + (start + k)[:, None] + column[None, :].to(tl.int64) * inner
            b = tl.load(w_at, mask=deep[:, None] & inside[None, :], other=0.0)
            acc = _dot(a, b, acc)
        if BIAS:
            bias = tl.load(bias_ptr + expert * hidden + column, mask=inside, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        pair = tl.load(order_ptr + at, mask=live, other=0)
        share = tl.load(share_ptr + pair, mask=live, other=0.0)
        acc = rounded(acc, dtype).to(tl.float32) * share[:, None]
        out_at = out_ptr + pair.to(tl.int64)[:, None] * hidden + column[None, :]
        tl.store(out_at, acc, mask=live[:, None] & inside[None, :])


@triton.jit
def sum_pairs_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # float32 [T, COUNT, H]
    out_ptr,  # [T, H]
    hidden,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (t, b): a block of the channels of token t, its pairs in order."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < hidden
    total = tl.zeros([BLOCK], tl.float32)
    for number in tl.static_range(COUNT):
        total += tl.load(x_ptr + (token * COUNT + number) * hidden + at, mask=live, other=0.0)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + token * hidden + at, rounded(total, dtype), mask=live)


@dataclass(frozen=True)
class _Tile:
    """Columns and depth of a program of a product, and how it runs."""

    columns: int
    depth: int
    num_warps: int
    num_stages: int


def choose_experts(logits: Tensor, count: int, *, share: bool) -> tuple[Tensor, Tensor]:
    """Return each token's experts and their weights; see `stars_fast.ops.experts`.

    One launch. Where the largest logit is infinite or one is NaN, weights are NaN and the experts
    any.

    Raises
    ------
    ValueError
        If a shape, a stride or a dtype does not fit, or `count` is not in [1, E].
    """
    tokens, experts = _shape_of(logits, "logits", "[T, E]")
    if not 1 <= count <= experts:
        raise ValueError(f"count must be in [1, {experts}], the experts, got {count}")
    weights = logits.new_empty((tokens, count), dtype=torch.float32)
    index = logits.new_empty((tokens, count), dtype=torch.int64)
    if tokens:
        choose_experts_kernel[(tokens,)](
            logits,
            logits.stride(0),
            weights,
            index,
            experts,
            COUNT=count,
            SLOTS=triton.next_power_of_2(count),
            SHARE=share,
            BLOCK=triton.next_power_of_2(experts),
            num_warps=1,
        )
    return weights, index


def run_experts(x: Tensor, index: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """Return the weighted sum over each token's experts; see `stars_fast.ops.experts`.

    Four launches: the pairs' order, both products, the sum. The first takes time by the square of
    the pairs; the scratch memory is pairs x (I + 2 H) channels.

    Raises
    ------
    ValueError
        If a shape, a stride or a dtype does not fit.
    """
    tokens, hidden = _shape_of(x, "x", "[T, H]")
    names = ("gate_up", "down", "gate_up_bias", "down_bias")
    given = {name: getattr(experts, name) for name in names}
    count, inner = len(experts.down), experts.inner
    wanted: dict[str, tuple[int, ...]] = {
        "gate_up": (count, 2 * inner, hidden),
        "down": (count, hidden, inner),
        "gate_up_bias": (count, 2 * inner),
        "down_bias": (count, hidden),
    }
    if experts.transposed:
        wanted |= {"gate_up": (count, hidden, 2 * inner), "down": (count, inner, hidden)}
    for name, tensor in given.items():
        if tensor is None:
            continue
        if tensor.shape != wanted[name] or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {list(wanted[name])}, got {list(tensor.shape)} with "
                f"strides {tensor.stride()}"
            )
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{name} must be {x.dtype} on {x.device}, as x; got {tensor.dtype} on "
                f"{tensor.device}"
            )
    if index.ndim != 2 or len(index) != tokens or weights.shape != index.shape:
        raise ValueError(
            f"index and weights must be [{tokens}, K], got {list(index.shape)} and "
            f"{list(weights.shape)}"
        )
    if not index.numel():
        return torch.zeros_like(x)
    return _run(x, index.contiguous(), weights.contiguous().float(), experts)


def _run(x: Tensor, index: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    pairs, top_k = index.numel(), index.shape[1]
    hidden, inner, count = x.shape[1], experts.inner, len(experts.down)
    rows = _rows(pairs, count)
    blocks = min(pairs, count) + pairs // rows
    order = index.new_empty((pairs,), dtype=torch.int32)
    table = index.new_empty((blocks, 3), dtype=torch.int32)
    made = x.new_empty((pairs, inner))
    results = x.new_empty((pairs, hidden), dtype=torch.float32)
    out = torch.empty_like(x)
    order_pairs_kernel[(triton.cdiv(pairs, _PAIRS),)](
        index,
        order,
        table,
        pairs,
        blocks,
        ROWS=rows,
        PAIRS=_PAIRS,
        BLOCKS=_BLOCKS,
        EXPERTS=max(16, triton.next_power_of_2(count)),
        num_warps=8,
    )
    tile = _tile(x.dtype)
    program = {
        "ROWS": rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    experts_up_kernel[(blocks, triton.cdiv(inner, tile.columns))](
        x,
        x.stride(0),
        experts.gate_up,
        experts.gate_up_bias,
        order,
        table,
        made,
        hidden,
        inner,
        top_k,
        experts.gate_up.stride(0),
        experts.limit,
        experts.alpha,
        ACTIVATION=_ACTIVATIONS[experts.activation],
        TRANSPOSED=experts.transposed,
        INTERLEAVED=experts.interleaved,
        BIAS=experts.gate_up_bias is not None,
        **program,
    )
    experts_down_kernel[(blocks, triton.cdiv(hidden, tile.columns))](
        made,
        experts.down,
        experts.down_bias,
        order,
        table,
        weights,
        results,
        hidden,
        inner,
        experts.down.stride(0),
        TRANSPOSED=experts.transposed,
        BIAS=experts.down_bias is not None,
        **program,
    )
    sum_pairs_kernel[(len(x), triton.cdiv(hidden, _SUMMED))](
        results, out, hidden, COUNT=top_k, BLOCK=_SUMMED
    )
    return out


def _rows(pairs: int, experts: int) -> int:
    """Return the pairs of a program: as many as an expert has, if they are evenly spread."""
    return next((rows for rows in (16, 32) if pairs <= rows * experts), 64)


def _tile(dtype: torch.dtype) -> _Tile:
    return _Tile(32, 32, 4, 3) if dtype == torch.float32 else _Tile(64, 64, 4, 4)


def _shape_of(x: Tensor, name: str, form: str) -> tuple[int, int]:
    if x.ndim != 2 or (x.numel() and x.stride(1) != 1) or x.dtype not in DTYPES:
        raise ValueError(
            f"{name} must be {form} with last stride 1, of {', '.join(map(str, DTYPES))}; got "
            f"{list(x.shape)}, strides {x.stride()}, {x.dtype}"
        )
    return x.shape[0], x.shape[1]


def variants() -> list[Variant]:
    """The layouts of most mixtures of experts and of GPT-OSS, by dtype and pairs of a program.

    Of 256 experts, eight for each token; the order of pairs for 16, too.
    """
    found = []
    for dtype, short in DTYPES.items():
        found.append(
            Variant(
                f"choose_experts {short}",
                choose_experts_kernel,
                _signature(
                    choose_experts_kernel,
                    {"logits_ptr": short, "weights_ptr": "fp32", "index_ptr": "i64"},
                ),
                {"COUNT": 8, "SLOTS": 8, "SHARE": True, "BLOCK": 256},
                num_warps=1,
            )
        )
        found.append(
            Variant(
                f"sum_pairs {short}",
                sum_pairs_kernel,
                _signature(sum_pairs_kernel, {"x_ptr": "fp32", "out_ptr": short}),
                {"COUNT": 8, "BLOCK": _SUMMED},
                aligned=frozenset({"x_ptr", "out_ptr", "hidden"}),
            )
        )
        for rows in (16, 32, 64):
            found += _product_variants(dtype, short, rows)
    for experts in (16, 256):
        found.append(
            Variant(
                f"order_pairs {experts} experts",
                order_pairs_kernel,
                _signature(
                    order_pairs_kernel,
                    {"index_ptr": "i64", "order_ptr": "i32", "blocks_ptr": "i32"},
                ),
                {"ROWS": 16, "PAIRS": _PAIRS, "BLOCKS": _BLOCKS, "EXPERTS": experts},
                num_warps=8,
            )
        )
    return found


def _product_variants(dtype: torch.dtype, short: str, rows: int) -> list[Variant]:
    tile = _tile(dtype)
    sizes = {"ROWS": rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    pointers = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), short)
    tables = {"order_ptr": "i32", "blocks_ptr": "i32"}
    aligned = {"hidden", "inner", "x_stride", "expert_stride", "share_ptr", *pointers, *tables}
    found = []
    # The layout of most mixtures of experts, and GPT-OSS's.
    for name, own, activation in (("silu", False, 0), ("clamped", True, 2)):
        layout: dict[str, object] = {"TRANSPOSED": own, "BIAS": own}
        up = {"ACTIVATION": activation, "INTERLEAVED": own, **layout}
        for kernel, constants, outputs in (
            (experts_up_kernel, up, {}),
            (experts_down_kernel, layout, {"out_ptr": "fp32", "share_ptr": "fp32"}),
        ):
            signature = _signature(kernel, {**pointers, **tables, **outputs})
            found.append(
                Variant(
                    f"{kernel.__name__.removesuffix('_kernel')} {short} {name} m{rows}",
                    kernel,
                    signature,
                    {**constants, **sizes},
                    num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                    aligned=frozenset(aligned & signature.keys()),
                    min_buffers=2,
                )
            )
    return found


def _signature(kernel: Any, pointers: dict[str, str]) -> dict[str, str]:  # noqa: ANN401 - a kernel
    """Return the type of each argument: numbers are int32, but for the two of an activation."""
    types = {name: f"*{dtype}" for name, dtype in pointers.items()}
    types |= {"limit": "fp32", "alpha": "fp32"}
    return {
        name: "constexpr" if name.isupper() else types.get(name, "i32") for name in kernel.arg_names
    }
