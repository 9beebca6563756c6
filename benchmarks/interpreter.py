"""Triton's interpreter, for machines without a GPU; to be called before Triton is imported."""

from __future__ import annotations

import os
from pathlib import Path

ON_GPU = Path("/dev/nvidiactl").exists()


def interpret_without_gpu() -> None:
    """Have the kernels run in the interpreter where there is no GPU."""
    if not ON_GPU:
        os.environ["TRITON_INTERPRET"] = "1"
