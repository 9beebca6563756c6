"""The paper's setting: its centre beside what is predicted for it, its floor and its baselines."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from stars_fast.benchmarks.interpreter import ON_GPU
from stars_fast.benchmarks.measure import ceilings, default_device
from stars_fast.benchmarks.paper import line
from stars_fast.benchmarks.paper_bench import SHAPES, Bench
from stars_fast.benchmarks.paper_steps import steps
from stars_fast.benchmarks.prediction import beside, predict
from stars_fast.tables import text_table

_REST = ("vanilla", "K 30", "first segment", "overhead", "baselines")


def measure_centre() -> dict[str, Any]:
    """Measure the centre of the paper's setting, and print its prediction beside it."""
    bench = _bench()
    found = _measure(bench, "centre")
    cell = steps()[0].cell if ON_GPU else steps()[0].cell.small()
    shapes = SHAPES[cell.language], SHAPES[cell.reward]
    predicted = predict(bench.machine, cell, *shapes)
    if ON_GPU:
        rows = beside(found, predicted)
        print("\n".join(text_table([["", "measured", "predicted"], *rows])))
    return {**found, "predicted": asdict(predicted)}


def measure_rest() -> dict[str, Any]:
    """Measure the floor, longer segments, the first segment, what alignment costs, and baselines.

    Raises
    ------
    RuntimeError
        If one of them failed, after all have run.
    """
    bench = _bench()
    found: dict[str, Any] = {}
    failed = []
    for name in _REST if ON_GPU else _REST[:2]:
        try:
            found[name] = _measure(bench, name)
        except RuntimeError as error:
            failed.append(str(error))
    if failed:
        raise RuntimeError(f"{'; '.join(failed)}; found: {found}")
    return found


def _bench() -> Bench:
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    device = default_device()
    return Bench(device, ceilings(device, dtype, quick=not ON_GPU), small=not ON_GPU)


def _measure(bench: Bench, name: str) -> dict[str, Any]:
    step = next(step for step in steps() if step.name == name)
    found = bench.measure(step)
    print(line(name, found, small=not ON_GPU), flush=True)
    if "failed" in found:
        raise RuntimeError(f"{name}: {found['failed']}")
    return found
