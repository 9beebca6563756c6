"""Where models have to be for a backend."""

from __future__ import annotations

import torch


def device_of(backend: str) -> torch.device:
    """A GPU, if there is one, for the kernels; they run in the interpreter where there is none."""
    on_gpu = backend == "triton" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")
