"""Which form of an operator runs: PyTorch, Triton, or C++.

``auto`` is Triton on a CUDA device, and on a CPU C++ where there is such a form (`ops.cpu`) and
PyTorch for the rest; ``pytorch`` is PyTorch alone. The forms give the same results up to
rounding, so the choice is one of speed; forcing one serves tests and the search for faults.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import get_args

import torch

from stars_fast.config import Backend

_chosen: ContextVar[Backend] = ContextVar("stars_fast_backend", default="auto")


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Choose the form of every operator called inside, in this thread.

    Raises
    ------
    ValueError
        If `name` is none of ``"auto"``, ``"pytorch"`` and ``"triton"``.
    """
    check_backend(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def check_backend(name: str) -> None:
    """Raise ValueError unless `name` is a backend."""
    if name not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {name!r}")


def uses_triton(device: torch.device) -> bool:
    """Whether operators on tensors of a device run as Triton kernels here and now.

    Raises
    ------
    ValueError
        If Triton is forced on a CPU in a process that does not interpret kernels.
    """
    chosen = _chosen.get()
    if chosen == "auto":
        return device.type == "cuda"
    if chosen == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend='triton' on {device} needs TRITON_INTERPRET=1 in the environment before the "
            "start: without it, Triton kernels run on CUDA devices only"
        )
    return chosen == "triton"


def plain() -> bool:
    """Whether PyTorch's own form is asked for, whatever else there is."""
    return _chosen.get() != "auto"
