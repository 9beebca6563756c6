"""Attention over paged keys and values by Triton: decode and extend in one kernel.

The kernel of `stars_fast.ops.paged_attention`, whose docstring has the terms. A tile reads its
group's prefix once for all its candidates and all query heads of a KV head; long prefixes are
split over programs and their parts joined by log-sum-exp, as in Flash-Decoding and cascade
attention. The work lists are on the device, see `stars_fast.kernels.attention_plan`, so that a
CUDA graph that holds the call serves every round.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from stars_fast.kernels.aot import ARCHITECTURES, MOST_REGISTERS, Variant
from stars_fast.kernels.attention_kernels import attention_kernel, merge_kernel
from stars_fast.kernels.attention_plan import (
    BLOCK_ROWS,
    AttentionPlan,
    IntArray,
    queries_per_tile,
)
from stars_fast.kernels.rounding import INTERPRETED

if TYPE_CHECKING:
    from stars_fast.ops.attention import AttentionOptions
    from stars_fast.ops.batch import BatchLike

SPLIT_TOKENS = 512  # of a prefix that is split; fixed, so that results do not depend on the batch

_LOG2E = math.log2(math.e)
_SPLIT_ROWS = 512  # queries times heads of a group, up to which prefixes are split
_NARROW_ROWS = 64  # of a program's tile where larger ones spill
_WARPS = 16  # of all programs per multiprocessor: about twice what it holds at once
_MAX_HEAD_DIM = 256  # shared memory holds no more
_MERGE_SPLITS = 8  # partials that the merge reads at once
_MERGE_WARPS = 2
_MERGE_PROGRAMS = 16  # per multiprocessor
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Tiles(NamedTuple):
    """`block_m` and `split_tokens` of a plan, see `plan_items`."""

    block_m: int
    split_tokens: int | None


class OwnPart(NamedTuple):
    """Attention of each row over its own tokens, made elsewhere.

    Attributes
    ----------
    out : Tensor
        ``[T, heads, Dv]``, row-major, dtype of the query.
    lse : Tensor
        float32 ``[heads, T]``, last stride 1: natural log-sum-exps of the scores, as flash-attn and
        PyTorch give them.
    """

    out: Tensor
    lse: Tensor


class _Config(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def attention(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: AttentionPlan,
    options: AttentionOptions,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    own: OwnPart | None = None,
) -> Tensor:
    """Attention of one layer under a plan; nothing is changed and the host does not wait.

    With `own`, the rows' own tokens are not read: what it says of them is joined to the prefixes.

    Reads each key and value of a prefix once per group and tile, and each row's own once per tile
    of the row; prefix parts cost ``8 * heads * (Dv + 1)`` bytes each, written and read.

    Parameters
    ----------
    query : Tensor
        float32, bfloat16 or float16 ``[T, heads, Dk]``, any strides but 1 for the last.
    k_pages, v_pages : Tensor
        ``[num_pages, page_size, kv_heads, Dk]`` and ``[..., Dv]``, row-major; dtype of `query` or
        float8_e4m3fn. The new tokens are in their slots already.
    plan : AttentionPlan
        For T queries and ``heads // kv_heads`` heads. Queries past the plan's batch give zeros.
    options : AttentionOptions
        Of the layer.
    k_scale, v_scale : Tensor or None
        float32 ``[kv_heads]``, factors on what float8 pages hold; None is 1.
    own : OwnPart or None
        With a plan of the prefixes alone.

    Returns
    -------
    Tensor
        ``[T, heads, Dv]``, row-major, dtype of `query`; scores, softmax and sums in float32. Tiles
        mask by zero weights: a value that is not finite spoils the other rows of its tile.

    Raises
    ------
    ValueError
        If an argument does not fit the others.

    Notes
    -----
    Online softmax: FlashAttention-2, arXiv 2307.08691, section 3.1. Log-sum-exps are base 2.
    """
    _check(query, k_pages, v_pages, plan, options, k_scale, v_scale)
    _check_own(query, v_pages, plan, own)
    scaling, window, softcap, sinks = options
    queries, heads, key_dim = query.shape
    page_size, kv_heads, value_dim = v_pages.shape[1:]
    out = query.new_empty((queries, heads, value_dim))
    if queries == 0:
        return out
    partials, like = plan.capacity.partials, query.new_empty(0, dtype=torch.float32)
    partial = like.new_empty(partials * heads * value_dim)
    lse = like.new_empty(partials * heads)

    e4m3_bits = k_pages.dtype == torch.float8_e4m3fn and _capability(query.device) < 89
    if e4m3_bits:  # no instruction converts them before 8.9
        k_pages, v_pages = k_pages.view(torch.uint8), v_pages.view(torch.uint8)
    scaled = k_scale is not None
    stored = "bits" if e4m3_bits else "fp8" if k_pages.dtype == torch.float8_e4m3fn else ""
    config = _config(plan.block_m, max(key_dim, value_dim), query.dtype, stored)
    # Query heads of a KV head in chunks and queries in parts, see the kernel; an upper bound.
    units = -(-plan.heads_per_kv // config.block_m) * (plan.block_m // config.block_m)
    work = plan.capacity.items * kv_heads * units
    grid = _programs(query.device, _WARPS // config.num_warps, work)
    attention_kernel[(grid,)](
        query, k_pages, v_pages, out, partial, lse,
        plan.items, plan.num_items, plan.group_pages, plan.page_offset, plan.padding_start,
        plan.padding_end, plan.row_start, plan.row_query, plan.slots, plan.query_row,
        plan.query_own,
        sinks if sinks is not None else like,
        k_scale if k_scale is not None else like,
        v_scale if v_scale is not None else like,
        query.stride(0), query.stride(1), plan.slots.shape[1],
        scaling / softcap if softcap > 0 else scaling * _LOG2E,
        softcap * _LOG2E,
        window,
        PAGE_SIZE=page_size,
        **_constants(plan.heads_per_kv, plan.block_m, kv_heads, key_dim, value_dim, config),
        WINDOWED=window > 0,
        SOFTCAP=softcap > 0,
        SINKS=sinks is not None,
        SCALED=scaled,
        E4M3_BITS=e4m3_bits,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    if partials or own is not None:
        merge_kernel[(_programs(query.device, _MERGE_PROGRAMS, plan.capacity.merges * heads),)](
            partial, lse, out, plan.merges, plan.num_merges, sinks if sinks is not None else like,
            *((own.out, own.lse, own.lse.stride(0)) if own is not None else (like, like, 0)),
            HEADS=heads, VALUE_DIM=value_dim, BLOCK_S=_MERGE_SPLITS, BLOCK_DV=_block_d(value_dim),
            SINKS=sinks is not None, OWN=own is not None, num_warps=_MERGE_WARPS,
            maxnreg=MOST_REGISTERS,
        )  # fmt: skip
    return out


def paged_attention(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: BatchLike,
    query_lengths: IntArray,
    options: AttentionOptions,
) -> Tensor:
    """`stars_fast.ops.paged_attention` by the kernel: plans and runs."""
    heads_per_kv = query.shape[1] // k_pages.shape[2]
    per_group = int(query_lengths.sum()) // max(1, batch.num_groups)
    head_dim = max(k_pages.shape[3], v_pages.shape[3])
    tiles = choose_tiles(per_group, heads_per_kv, head_dim, query.dtype)
    plan = AttentionPlan.build(
        batch, query_lengths, heads_per_kv=heads_per_kv, device=query.device, **tiles._asdict()
    )
    return attention(query, k_pages, v_pages, plan, options)


def choose_tiles(
    queries_per_group: int, heads_per_kv: int, head_dim: int, dtype: torch.dtype
) -> Tiles:
    """Return the tiles for plans of groups with about that many queries each.

    `head_dim` is the widest of keys and values in the layers that the plan serves.
    """
    rows = queries_per_group * heads_per_kv
    fitting = next((block for block in BLOCK_ROWS if rows <= block), BLOCK_ROWS[-1])
    # Few rows are bound by memory, and may be all there is: more programs read it sooner.
    split = SPLIT_TOKENS if rows <= _SPLIT_ROWS else None
    return Tiles(_config(fitting, head_dim, dtype).block_m, split)


def _config(plan_rows: int, head_dim: int, dtype: torch.dtype, pages: str = "") -> _Config:
    """Shape of a program, by the wider head dimension: the largest found not to spill registers.

    Programs of fewer rows than the plan's tiles have do them in parts. `pages` is how they are
    read: ``""`` in the dtype of the query, ``"fp8"`` by the hardware's conversion, ``"bits"`` of
    float8 by hand.
    """
    if dtype == torch.float32:  # no tensor core takes it as it is: bound by arithmetic
        block_n = 16 if head_dim > 64 else 32
        num_warps = 8 if head_dim > 64 and not (pages == "bits" and head_dim > 128) else 4
        return _Config(16, block_n, num_warps, num_stages=1)
    wide = head_dim > 128
    block_m = min(plan_rows, _NARROW_ROWS) if wide or pages == "bits" else plan_rows
    converted = pages == "fp8" and (block_m == 64 or (block_m == 16 and not wide))
    block_n = 64 >> (wide + (pages == "bits" or converted))
    num_warps = 4 if block_m == 16 or (block_m == 64 and head_dim <= 64) else 8
    num_stages = 4 if block_m == 16 and head_dim > 64 and not pages else 3
    return _Config(block_m, block_n, num_warps, num_stages)


def _constants(
    heads_per_kv: int, plan_rows: int, kv_heads: int, key_dim: int, value_dim: int, config: _Config
) -> dict[str, Any]:
    return {
        "KV_HEADS": kv_heads,
        "HEADS_PER_KV": heads_per_kv,
        "TILE_QUERIES": queries_per_tile(heads_per_kv, plan_rows),
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_DK": _block_d(key_dim),
        "BLOCK_DV": _block_d(value_dim),
    }


def variants() -> list[Variant]:
    """Every configuration that the launchers can choose, for usual sizes.

    Head dimensions 64, 128 and 256, 32 query and 8 KV heads, pages of 16 tokens; each form once
    without and once with window, soft cap and sinks.
    """
    return [*_attention_variants(), *_merge_variants()]


def _attention_variants() -> Iterator[Variant]:
    for dtype, dim, block_m, full, pages in itertools.product(
        _DTYPES, (64, 128, 256), BLOCK_ROWS, (False, True), ("", "fp8e4nv", "u8")
    ):
        short = _DTYPES[dtype]
        config = _config(block_m, dim, dtype, {"": "", "fp8e4nv": "fp8", "u8": "bits"}[pages])
        if _config(block_m, dim, dtype).block_m < block_m:
            continue  # `choose_tiles` makes no such plans
        constexprs = {
            "PAGE_SIZE": 16,
            **_constants(4, block_m, 8, dim, dim, config),
            "WINDOWED": full,
            "SOFTCAP": full,
            "SINKS": full,
            "SCALED": pages != "",
            "E4M3_BITS": pages == "u8",
        }
        types = {
            **dict.fromkeys(("query_ptr", "out_ptr", "sinks_ptr"), f"*{short}"),
            **dict.fromkeys(("k_ptr", "v_ptr"), f"*{pages or short}"),
            **dict.fromkeys(("partial_ptr", "lse_ptr", "k_scale_ptr", "v_scale_ptr"), "*fp32"),
            "slots_ptr": "*i64",
            "score_scale": "fp32",
            "cap": "fp32",
        }
        name = f"attention {short} {pages or short} d{dim} m{block_m}{' full' if full else ''}"
        yield _variant(
            name, attention_kernel, types, constexprs, config.num_warps, config.num_stages,
            {"": ARCHITECTURES, "fp8e4nv": (90, 100), "u8": (80,)}[pages],
            # One is read while another is on its way; nothing is taken ahead in float32.
            min_buffers=2 if config.num_stages > 1 else 0,
        )  # fmt: skip


def _merge_variants() -> Iterator[Variant]:
    for dtype, dim, sinks, own in itertools.product(
        _DTYPES, (64, 128, 256), (False, True), (False, True)
    ):
        short = _DTYPES[dtype]
        constexprs: dict[str, object] = {
            "HEADS": 32,
            "VALUE_DIM": dim,
            "BLOCK_S": _MERGE_SPLITS,
            "BLOCK_DV": _block_d(dim),
            "SINKS": sinks,
            "OWN": own,
        }
        types = {
            **dict.fromkeys(("out_ptr", "sinks_ptr", "own_ptr"), f"*{short}"),
            **dict.fromkeys(("partial_ptr", "lse_ptr", "own_lse_ptr"), "*fp32"),
        }
        name = f"merge {short} d{dim}{' sinks' if sinks else ''}{' own' if own else ''}"
        form = _variant(name, merge_kernel, types, constexprs, _MERGE_WARPS, 3, ARCHITECTURES)
        yield replace(form, maxnreg=MOST_REGISTERS)


def _variant(
    name: str,
    kernel: triton.JITFunction[Any],
    types: dict[str, str],
    constexprs: dict[str, object],
    num_warps: int,
    num_stages: int,
    capabilities: tuple[int, ...],
    min_buffers: int = 0,
) -> Variant:
    """Signature from `types`, else int32: pointers by name, constants as given."""
    signature = {}
    for argument in kernel.arg_names:
        default = "*i32" if argument.endswith("_ptr") else "i32"
        signature[argument] = (
            "constexpr" if argument in constexprs else types.get(argument, default)
        )
    pointers = {argument for argument in signature if argument.endswith("_ptr")}
    strides = {"query_stride", "head_stride"} & set(signature)
    return Variant(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=num_warps,
        num_stages=num_stages,
        aligned=frozenset(pointers | strides),
        capabilities=capabilities,
        min_buffers=min_buffers,
    )


def _block_d(dim: int) -> int:
    return max(16, int(triton.next_power_of_2(dim)))


def _programs(device: torch.device, per_multiprocessor: int, work: int) -> int:
    """Programs of a launch: enough to fill the device, no more than there can be work."""
    return max(1, min(_multiprocessors(device) * per_multiprocessor, work))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if INTERPRETED.value:
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _capability(device: torch.device) -> int:
    """Compute capability such as 90; the interpreter's is below all, so it has no float8."""
    if INTERPRETED.value:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return int(major) * 10 + int(minor)


def _check(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: AttentionPlan,
    options: AttentionOptions,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    scaling, window, softcap, sinks = options
    if query.dim() != 3 or query.stride(2) != 1:
        raise ValueError(
            "query must be [T, heads, head_dim] with a last stride of 1, got shape "
            f"{tuple(query.shape)} and strides {query.stride()}"
        )
    if query.dtype not in _DTYPES:
        raise ValueError(f"query must be one of {list(_DTYPES)}, got {query.dtype}")
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if pages.dim() != 4 or not pages.is_contiguous():
            raise ValueError(
                f"{name} must be [num_pages, page_size, kv_heads, head_dim], row-major, got shape "
                f"{tuple(pages.shape)} and strides {pages.stride()}"
            )
        if pages.dtype not in {query.dtype, torch.float8_e4m3fn}:
            raise ValueError(
                f"{name} must be {query.dtype} as the query or float8_e4m3fn, got {pages.dtype}"
            )
    if v_pages.shape[:3] != k_pages.shape[:3] or v_pages.dtype != k_pages.dtype:
        raise ValueError(
            f"v_pages must agree with k_pages, {k_pages.dtype} of shape {tuple(k_pages.shape)}, in "
            f"all but the last size, got {v_pages.dtype} of shape {tuple(v_pages.shape)}"
        )
    queries, heads, key_dim = query.shape
    kv_heads = k_pages.shape[2]
    if key_dim != k_pages.shape[3]:
        raise ValueError(f"query must have head_dim {k_pages.shape[3]} as k_pages, got {key_dim}")
    for name, dim in (("k_pages", key_dim), ("v_pages", v_pages.shape[3])):
        if dim > _MAX_HEAD_DIM:
            raise ValueError(f"{name} must have a head_dim up to {_MAX_HEAD_DIM}, got {dim}")
    if heads != kv_heads * plan.heads_per_kv or queries != plan.capacity.queries:
        raise ValueError(
            f"plan must be for {queries} queries and {heads / kv_heads:g} heads per KV head, got "
            f"one for {plan.capacity.queries} and {plan.heads_per_kv}"
        )
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")
    if window < 0:
        raise ValueError(f"window must be 0 (off) or more, got {window}")
    if not (softcap >= 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be 0 (off) or more, and finite, got {softcap}")
    if sinks is not None and (sinks.shape != (heads,) or not sinks.is_contiguous()):
        raise ValueError(f"sinks must be contiguous of shape ({heads},), got {tuple(sinks.shape)}")
    if (k_scale is None) != (v_scale is None):
        raise ValueError("k_scale and v_scale must be given together")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None:
            continue
        if k_pages.dtype != torch.float8_e4m3fn:
            raise ValueError(f"{name} must be None for pages of {k_pages.dtype}, got a tensor")
        if scale.shape != (kv_heads,) or scale.dtype != torch.float32:
            raise ValueError(
                f"{name} must be float32 of shape ({kv_heads},), got {scale.dtype} of shape "
                f"{tuple(scale.shape)}"
            )
    for name, tensor in (
        ("k_pages", k_pages), ("v_pages", v_pages), ("plan", plan.buffer), ("sinks", sinks),
        ("k_scale", k_scale), ("v_scale", v_scale),
    ):  # fmt: skip
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"{name} must be on {query.device} as the query, got {tensor.device}")


def _check_own(query: Tensor, v_pages: Tensor, plan: AttentionPlan, own: OwnPart | None) -> None:
    if plan.prefix_only != (own is not None):
        raise ValueError(
            "own must be given with a plan of the prefixes alone and with no other, got "
            f"{'none' if own is None else 'one'}"
        )
    if own is None:
        return
    queries, heads, _ = query.shape
    for name, tensor, shape, dtype in (
        ("out", own.out, (queries, heads, v_pages.shape[3]), query.dtype),
        ("lse", own.lse, (heads, queries), torch.float32),
    ):
        fits = tensor.shape == shape and tensor.dtype == dtype and tensor.device == query.device
        if not fits or (queries and tensor.stride(-1) != 1):
            raise ValueError(
                f"own.{name} must be {dtype} of shape {shape} on {query.device}, last stride 1, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)} and strides {tensor.stride()} "
                f"on {tensor.device}"
            )
    if not own.out.is_contiguous():
        raise ValueError(f"own.out must be row-major, got strides {own.out.stride()}")
