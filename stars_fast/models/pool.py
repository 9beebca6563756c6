"""How many pages a model's pool gets where the user does not say."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from stars_fast.models.checks import max_length
from stars_fast.models.machine import memory_bytes
from stars_fast.models.paged import PagedModel

_UNKNOWN_CONTEXT = 4096
_CPU_BYTES = 4 << 30
_MIN_PAGES = 64


def default_num_pages(
    model: PreTrainedModel, *, page_size: int, max_rows: int, gpu_share: float
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
    """
    context = max_length(model) or _UNKNOWN_CONTEXT
    # Each row ends in a page of its own, and page 0 is scratch.
    wanted = max_rows * (-(-context // page_size) + 1) + 1
    budget = _memory_budget(model.device, gpu_share) // PagedModel.page_bytes(model, page_size)
    return max(min(wanted, budget), _MIN_PAGES)


def _memory_budget(device: torch.device, gpu_share: float) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * gpu_share)
    return min(memory_bytes() // 8, _CPU_BYTES)
