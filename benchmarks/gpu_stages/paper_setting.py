"""The paper's setting: its centre beside what is predicted for it, its floor and its baselines."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from stars_fast.benchmarks.interpreter import ON_GPU
from stars_fast.benchmarks.least import Machine
from stars_fast.benchmarks.measure import ceilings, default_device
from stars_fast.benchmarks.paper import line
from stars_fast.benchmarks.paper_bench import SHAPES, Bench
from stars_fast.benchmarks.paper_steps import Step, steps
from stars_fast.benchmarks.prediction import Prediction, beside, predict
from stars_fast.tables import text_table

_REST = ("vanilla", "K 30", "first segment", "overhead", "baselines")


def measure_centre() -> dict[str, Any]:
    """Measure the centre of the paper's setting, and print its prediction beside it."""
    return _measure(_bench(), "centre")


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
    predicted = _predicted(step, bench.machine)
    for side, prediction in predicted.items() if ON_GPU else ():
        print(f"\n{side}, {name}")
        print("\n".join(_beside(found.get(side, found), prediction)), flush=True)
    return {**found, "predicted": {side: asdict(x) for side, x in predicted.items()}}


def _predicted(step: Step, machine: Machine) -> dict[str, Prediction]:
    """What is predicted of each side of a step."""
    cell = step.cell if ON_GPU else step.cell.small()
    if step.kind == "first segment":  # of one request
        cell = replace(cell, requests=1, max_tokens=cell.segment_length)
    sides = {"overhead": ("stars", "vanilla"), "vanilla": ("vanilla",)}.get(step.kind, ("stars",))
    rewards = {"stars": SHAPES[cell.reward], "vanilla": None}
    return {side: predict(machine, cell, SHAPES[cell.language], rewards[side]) for side in sides}


def _beside(found: dict[str, Any], predicted: Prediction) -> list[str]:
    """Measured and predicted figures; of a step that has no phases, what is predicted alone."""
    if "phases" in found:
        return text_table([["", "measured", "predicted"], *beside(found, predicted)])
    rate = predicted.accepted_tokens_per_second
    return [f"predicted: {1e3 * predicted.seconds:.1f} ms, {rate:,.0f} accepted tokens/s"]
