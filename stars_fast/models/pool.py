"""The KV pools of a model: their tensors, and their default number of pages."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stars_fast.config import KvDtype
from stars_fast.models.checks import check_architecture, max_length
from stars_fast.models.machine import memory_bytes
from stars_fast.models.probe import LayerLayout, attention_layout

FP8 = torch.float8_e4m3fn

_UNKNOWN_CONTEXT = 4096
_CPU_BYTES = 4 << 30
_MIN_PAGES = 64


@dataclass(frozen=True)
class Pools:
    """The KV pools of a model and what its layers ask for; lists have an entry per layer.

    Attributes
    ----------
    layouts
        Shapes and windows.
    k_pages, v_pages
        ``[num_pages, page_size, kv_heads, dim]``.
    k_scales, v_scales
        float32 ``[kv_heads]`` of float8 pools, which hold keys and values over them; None in any
        other.
    """

    layouts: Sequence[LayerLayout]
    k_pages: list[Tensor]
    v_pages: list[Tensor]
    k_scales: list[Tensor | None]
    v_scales: list[Tensor | None]

    @classmethod
    def allocate(
        cls,
        layouts: Sequence[LayerLayout],
        *,
        num_pages: int,
        page_size: int,
        device: torch.device,
        kv_dtype: KvDtype = "auto",
    ) -> Pools:
        """Return pools of zeros, ``"auto"`` in the dtype of the model's own keys and values.

        Raises
        ------
        ValueError
            If they do not fit the memory of a machine.
        """
        page = _page_bytes(layouts, page_size, kv_dtype)
        if device.type == "cpu" and num_pages * page > memory_bytes():
            # What is allocated is not yet there, so that no allocation would fail.
            raise ValueError(
                f"num_pages must be at most {memory_bytes() // page}, which fill the machine's "
                f"memory, got {num_pages}"
            )

        def pool(layout: LayerLayout, dim: int) -> Tensor:
            shape = (num_pages, page_size, layout.kv_heads, dim)
            return _zeros(shape, _stored(layout, kv_dtype), device)

        def scales() -> list[Tensor | None]:
            if kv_dtype == "auto":
                return [None] * len(layouts)
            return [
                torch.ones(layout.kv_heads, dtype=torch.float32, device=device)
                for layout in layouts
            ]

        return cls(
            layouts=layouts,
            k_pages=[pool(layout, layout.key_dim) for layout in layouts],
            v_pages=[pool(layout, layout.value_dim) for layout in layouts],
            k_scales=scales(),
            v_scales=scales(),
        )

    @property
    def device(self) -> torch.device:
        """Where the pools are."""
        return self.k_pages[0].device

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers, keys and values."""
        return sum(x[0, 0].numel() * x.element_size() for x in (*self.k_pages, *self.v_pages))

    @property
    def head_dim(self) -> int:
        """The widest of any layer's keys and values."""
        return max(max(layout.key_dim, layout.value_dim) for layout in self.layouts)

    @property
    def heads_per_kv(self) -> set[int]:
        """The distinct numbers of query heads per KV head."""
        return {layout.heads // layout.kv_heads for layout in self.layouts}


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros, on a CPU in memory that the system gives when it is first written to."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _stored(layout: LayerLayout, kv_dtype: KvDtype) -> torch.dtype:
    return FP8 if kv_dtype == "fp8" else layout.dtype


def page_bytes(model: PreTrainedModel, page_size: int, kv_dtype: KvDtype = "auto") -> int:
    """Return the bytes of one page over all layers, keys and values."""
    check_architecture(model)
    return _page_bytes(attention_layout(model), page_size, kv_dtype)


def _page_bytes(layouts: Sequence[LayerLayout], page_size: int, kv_dtype: KvDtype) -> int:
    return page_size * sum(
        layer.kv_heads * (layer.key_dim + layer.value_dim) * _stored(layer, kv_dtype).itemsize
        for layer in layouts
    )


def default_num_pages(
    model: PreTrainedModel,
    *,
    page_size: int,
    max_rows: int,
    gpu_share: float,
    kv_dtype: KvDtype = "auto",
    beside: Sequence[PreTrainedModel] = (),
) -> int:
    """Return enough pages for `max_rows` full contexts, or as many as the memory budget holds.

    The budget is `gpu_share` of the free memory on a GPU, and an eighth of the machine's memory, at
    most 4 GiB, on a CPU. At least 64 pages.

    Parameters
    ----------
    model : PreTrainedModel
        On its device.
    page_size : int
        Tokens per page.
    max_rows : int
        Rows of one forward pass.
    gpu_share : float
        In (0, 1].
    kv_dtype : str
        ``"auto"`` or ``"fp8"``.
    beside : sequence of PreTrainedModel
        Models that are to have as many pages within the same budget.
    """
    wanted = enough_pages(model, page_size=page_size, max_rows=max_rows)
    page = sum(page_bytes(one, page_size, kv_dtype) for one in (model, *beside))
    budget = _memory_budget(model.device, gpu_share) // page
    return max(min(wanted, budget), _MIN_PAGES)


def enough_pages(model: PreTrainedModel, *, page_size: int, max_rows: int) -> int:
    """Return the pages with which `max_rows` full contexts fit: more are of no use."""
    context = max_length(model) or _UNKNOWN_CONTEXT
    # Each row ends in a page of its own, and page 0 is scratch.
    return max_rows * (-(-context // page_size) + 1) + 1


def _memory_budget(device: torch.device, gpu_share: float) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * gpu_share)
    return min(memory_bytes() // 8, _CPU_BYTES)
