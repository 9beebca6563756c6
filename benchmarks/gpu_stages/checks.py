"""The tests and compute-sanitizer on the GPU, each command's output in a log."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from stars_fast.benchmarks.gpu_stages.streamed import run_streamed
from stars_fast.benchmarks.interpreter import ON_GPU
from stars_fast.benchmarks.kernel_cases import SMOKE, all_cases

ROOT = Path(__file__).resolve().parents[2]

# The machine's own packages may be older or newer than those of constraints.txt, and warn.
_ANY_VERSION = ["-o", "filterwarnings=default", "-o", "minversion=7.0"]
#: The most telling first.
TESTS = ("tests/kernels", "tests/ops", "tests/models/test_paged.py", "tests/engine")


def run_tests(path: str, logs: Path, seconds: float) -> dict[str, Any]:
    """Run the tests of a path on the device that is here."""
    # -P: the checkout's own folder would hide the package that is installed.
    command = [sys.executable, "-P", "-m", "pytest", "-v", *_ANY_VERSION, path]
    log = logs / f"{path.replace('/', '-')}.log"
    return {"closing_line": run_streamed(command, log, seconds=seconds, cwd=ROOT)}


def run_sanitizer(check: str, logs: Path, seconds: float) -> dict[str, Any]:
    """Run compute-sanitizer over every kernel in bfloat16, heads of 128: tensor cores included."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or not ON_GPU:
        print("skipped: no compute-sanitizer, or no GPU")
        return {"skipped": "no compute-sanitizer, or no GPU"}
    command = [tool, "--tool", check, "--error-exitcode", "9", "--target-processes", "all"]
    command += [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--run-kernels"]
    # Without the caching allocator, so that each tensor's end is the end of its memory.
    line = run_streamed(
        command, logs / f"{check}.log", seconds=seconds, cwd=ROOT,
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )  # fmt: skip
    return {"closing_line": line}


def run_kernels() -> None:
    """Check every kernel once, in a process that compute-sanitizer looks at."""
    for case in all_cases(SMOKE, torch.device("cuda")):
        case.check()
    torch.cuda.synchronize()
    print("every kernel ran")
