"""A layer's attention over prompts and over segments to be scored, by each form there is."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stars_fast.benchmarks.gpu_stages.kernels import DEVICE
from stars_fast.benchmarks.gpu_stages.timing import microseconds, timed
from stars_fast.benchmarks.interpreter import ON_GPU
from stars_fast.benchmarks.kernel_cases import FULL, PAGE_SIZE, TINY, Size, make_rows
from stars_fast.config import Attention
from stars_fast.models.kernel_attention import extend_attention
from stars_fast.models.pool import Pools
from stars_fast.models.probe import LayerLayout
from stars_fast.models.varlen_forms import Chosen, choose_attention
from stars_fast.ops.batch import RowBatch

FORMS: tuple[Attention, ...] = ("triton", "flash", "torch")
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


@dataclass(frozen=True)
class Passes:
    """A pass of many tokens: rows of groups behind prefixes."""

    name: str
    groups: int
    per_group: int
    prefix: int
    new: int


def passes(size: Size) -> list[Passes]:
    """Prompts, long and many; reward texts; segments to be scored, short and long."""
    short, long = (8, 32) if size is FULL else (2, 3)
    groups, rows, prefix = size.requests, size.candidates, size.prefix
    return [
        Passes("one prompt", 1, 1, 0, size.prompt),
        Passes("prompts", size.requests // 2, 1, 0, size.prompt // 8),
        Passes("segments", groups, rows, prefix, short),
        Passes("long segments", groups, rows, prefix, long),
        Passes("segments of one each", groups, 1, prefix, long),
    ]


def time_forms() -> list[dict[str, Any]]:
    """Time each pass by each form, and compare its results with the kernels'.

    Without a GPU, PyTorch's operators stand for PyTorch's form, in float32.
    """
    rows = []
    for one in passes(FULL if ON_GPU else TINY):
        rows.append(_time_pass(one, FULL if ON_GPU else TINY))
        print(rows[-1], flush=True)
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()
    return rows


def _time_pass(one: Passes, size: Size) -> dict[str, Any]:
    heads, dim, dtype = size.kv_heads * size.heads_per_kv, size.head_dim, size.dtype
    layout = LayerLayout(heads, size.kv_heads, dim, dim, 0, dtype)
    made = make_rows(one.groups, one.per_group, one.prefix, one.new)
    no_padding = torch.zeros(one.groups, dtype=torch.int32).numpy()
    batch = RowBatch(
        made.group_pages, no_padding, no_padding, made.row_group, made.row_start,
        made.new_lengths, made.slots,
    )  # fmt: skip
    pools = Pools.allocate([layout], num_pages=made.num_pages, page_size=PAGE_SIZE, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)

    for pages in (*pools.k_pages, *pools.v_pages):
        pages.copy_(drawn(*pages.shape))
    query, key, value = (drawn(batch.num_tokens, n, dim) for n in (heads, *[size.kv_heads] * 2))
    slots = torch.from_numpy(made.slots.ravel()).to(DEVICE)
    row: dict[str, Any] = {"name": one.name, "tokens": batch.num_tokens, "prefix": one.prefix}
    want: Tensor | None = None
    for form in FORMS:
        try:
            chosen: Chosen = choose_attention(
                form, [layout], on_kernels=True, device=DEVICE, stored=dtype
            )
            attending = extend_attention(pools, batch, slots, chosen)

            def job(_: int, attending: Any = attending) -> Tensor:  # noqa: ANN401
                attending.begin(slots)
                out: Tensor = attending(
                    query, key, value, scaling=dim**-0.5, softcap=0.0, sinks=None
                )
                return out

            got = job(0).float()
            want = got if want is None else want
            differs = float((got - want).abs().max())
            assert differs < _TOLERANCE[dtype], f"it differs from triton's by {differs:.3g}"
            row[form] = {"differs": differs, **(microseconds(timed(job, 1)) or {})}
        except Exception as error:  # noqa: BLE001 - the other forms are worth having
            row[form] = {"failed": f"{type(error).__name__}: {error}"[:1000]}
    return row
