"""Make what `benchmarks/gpu.py` takes along to a GPU: a wheel, and kernels compiled for it.

    python scripts/gpu_bundle.py FOLDER [--arch 90]

Needs no GPU. FOLDER gets a wheel, for Python 3.12 if it is at hand, else for the Python that runs
this, and ``cache/``, for ``benchmarks/gpu.py --cache``.

Triton's key of a kernel has the kernel's source, its arguments' types, its options, ptxas and
Triton itself, and of the device the compute capability alone: so a cache that was made without a
GPU is found. But Triton counts down to the bytes of its libraries, which differ between Pythons:
run this with the Python and the Triton of the machine that has the GPU, or the cache is of no use
there. It holds the forms that stage 1's check of the kernels launches, with a 7B model's heads;
what else a run needs is compiled there.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Build the wheel and compile the kernels; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", type=int, choices=(80, 90, 100), default=90)
    parser.add_argument("--no-wheel", action="store_true", help="compile the kernels alone")
    options = parser.parse_args()
    if not options.no_wheel:
        find = [str(ROOT / ".ci" / "find_python"), "3.12"]
        found = subprocess.run(find, capture_output=True, text=True, check=False).stdout.strip()
        command = [found or sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir"]
        subprocess.run([*command, str(options.folder), str(ROOT)], check=True)
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = str((options.folder / "cache").resolve())
    made, kept = compile_forms(options.arch)
    print(f"{made} forms compiled, {kept} were there")
    return 0


def compile_forms(capability: int) -> tuple[int, int]:
    """Compile every form of `SMOKE` into Triton's cache; how many were made, and how many found.

    The launchers run as they do on a GPU, on tensors of the CPU, and Triton is told to compile and
    not to launch.
    """
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from stars_fast.benchmarks.kernel_cases import SMOKE, all_cases

    class Driver:
        """As much of a CUDA driver as compiling asks for."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return 0

    driver.set_active(Driver())
    launch = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:  # noqa: ANN401
        return launch(self, *args, grid=grid, warmup=True, **options)

    triton.JITFunction.run = compile_only
    # The number of multiprocessors goes into the grid alone, not into what is compiled.
    module = importlib.import_module("stars_fast.kernels.attention")
    vars(module).update(_multiprocessors=lambda _: 132, _capability=lambda _: capability)
    hits: list[bool] = []
    triton.knobs.compilation.listener = lambda **event: hits.append(event["cache_hit"])
    for case in all_cases(SMOKE, torch.device("cpu")):
        case.ours(0)
    return hits.count(False), hits.count(True)


if __name__ == "__main__":
    sys.exit(main())
