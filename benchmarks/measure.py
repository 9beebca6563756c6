"""What every measurement needs: the machine and its ceilings, timing of several sides in turn."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stars_fast.benchmarks.least import Machine

PACKAGES = (
    *("stars_fast", "torch", "triton", "transformers", "numpy"),
    *("flash-attn", "flashinfer-python", "vllm"),
)

_HERE = Path(__file__).resolve().parent


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# What a record says of its origin


def header(command: str, device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Return what a recorded file begins with: the command, the code, the machine, the versions.

    Parameters
    ----------
    command
        That makes the record again.
    device
        That was measured.
    commit
        Where the code is not in a git checkout.
    """
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return {
        "command": command,
        "commit": commit or _git("rev-parse", "HEAD") or "unknown",
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": device_name(device),
        "processors": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": found,
    }


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    """Return what git says of the checkout that this file is in; nothing if it is in none."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=_HERE, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


# Time


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Return how long a call takes, the device's work included."""
    synchronize(device)
    begun = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begun


def in_turn(
    sides: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    repeats: int,
    budget: float = float("inf"),
) -> dict[str, list[float]]:
    """Time several sides one after the other, again and again, so that all see the same machine.

    Parameters
    ----------
    sides
        By name; each has run before, so that nothing is warmed up here.
    device
        That they work on.
    repeats
        Times of each.
    budget
        Seconds after which no further repeat begins.

    Returns
    -------
    dict
        Seconds of each call, by side.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    begun = time.perf_counter()
    for number in range(repeats):
        if number and time.perf_counter() - begun > budget:
            break
        for name, run in sides.items():
            taken[name].append(seconds_of(run, device))
    return taken


def percentiles(values: Sequence[float], at: Sequence[int] = (20, 50, 80)) -> dict[str, float]:
    """Return percentiles of values, in their unit, under names such as ``p50``.

    Nothing of no values.
    """
    if not values:
        return {}
    return {f"p{q}": float(np.quantile(np.asarray(values, np.float64), q / 100)) for q in at}


# The machine's ceilings


def ceilings(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> Machine:
    """Measure a large copy and a large product of matrices; `quick` makes both small.

    The bandwidth counts bytes read and bytes written. The rate is that of `dtype`.
    """
    floats = (1 << 22) if quick else (1 << 29) if device.type == "cuda" else (1 << 27)
    source = torch.ones(floats, device=device)
    target = torch.empty_like(source)
    size = 256 if quick else 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn((size, size), device=device).to(dtype) for _ in range(2))
    sides: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(source),
        "product": lambda: a @ b,
    }
    for run in sides.values():
        run()
    # The best of the calls: a ceiling, which interruptions only lower.
    best = {name: min(taken) for name, taken in in_turn(sides, device, repeats=10).items()}
    return Machine(
        name=device_name(device),
        bytes_per_second=2 * source.nbytes / best["copy"],
        operations_per_second=2 * size**3 / best["product"],
    )
