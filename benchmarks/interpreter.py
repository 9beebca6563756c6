"""Triton's interpreter, for machines without a GPU; to be called before Triton is imported."""

from __future__ import annotations

import os

import torch  # which does not import Triton

ON_GPU = torch.cuda.is_available()


def interpret_without_gpu() -> None:
    """Have the kernels run in the interpreter where there is no GPU."""
    if not ON_GPU:
        os.environ["TRITON_INTERPRET"] = "1"
