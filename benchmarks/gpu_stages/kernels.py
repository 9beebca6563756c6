"""Each kernel checked, then timed against its peers and the least time."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch

from stars_fast.benchmarks.gpu_stages.timing import microseconds, replayed, timed
from stars_fast.benchmarks.interpreter import ON_GPU
from stars_fast.benchmarks.kernel_cases import FULL, SMOKE, TINY, Case, all_cases, model_cases
from stars_fast.benchmarks.least import Machine, Work
from stars_fast.benchmarks.measure import ceilings
from stars_fast.benchmarks.prediction import kernel_share
from stars_fast.tables import markdown_table, origin

DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def measure_ceilings() -> dict[str, float]:
    """Measure the device's bandwidth and its rate of bfloat16 products."""
    machine = ceilings(DEVICE, torch.bfloat16, quick=not ON_GPU)
    if ON_GPU:
        print(
            f"{machine.name}: copies {machine.bytes_per_second / 1e12:.2f} TB/s (read + written), "
            f"bfloat16 products {machine.operations_per_second / 1e12:.0f} TFLOP/s"
        )
    return {
        "copy_bytes_per_second": machine.bytes_per_second,
        "bf16_operations_per_second": machine.operations_per_second,
    }


def check_kernels() -> dict[str, str]:
    """Check every kernel in bfloat16 at the head size of 7B models, each in a try of its own.

    Raises
    ------
    RuntimeError
        If one differs from its oracle, after all have run; it names every one that does.
    """
    found: dict[str, str] = {}
    for case in all_cases(SMOKE if ON_GPU else TINY, DEVICE):
        try:
            case.check()
            if ON_GPU:
                torch.cuda.synchronize()
            found[case.name] = "agrees"
        except Exception as error:  # noqa: BLE001 - the other kernels are worth knowing
            found[case.name] = f"{type(error).__name__}: {error}"[:1000]
        print(f"{case.name:<58} {found[case.name][:200]}", flush=True)
    if any(said != "agrees" for said in found.values()):
        raise RuntimeError(f"{found}")
    return found


def time_kernels() -> list[dict[str, Any]]:
    """Check and time each kernel but those that sample, and its peers."""
    machine = ceilings(DEVICE, torch.bfloat16, quick=not ON_GPU)
    rows = []
    for case in model_cases(FULL if ON_GPU else TINY, DEVICE):
        case.check()
        row = time_case(case, machine)
        rows.append(row)
        print(line(row), flush=True)
        del case
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()
    return rows


def time_case(case: Case, machine: Machine) -> dict[str, Any]:
    """Time a case and its peers, each peer in a try of its own: microseconds at 20, 50 and 80 %."""
    row: dict[str, Any] = {
        "name": case.name,
        "least_bytes": case.least_bytes,
        "operations": case.operations,
        "ours": microseconds(timed(case.ours, case.sets)),
        "ours_in_a_graph": microseconds(replayed(case.ours, case.sets)),
        "others": {},
    }
    for name, job in case.others.items():
        try:
            row["others"][name] = microseconds(timed(job, case.sets))
        except Exception as error:  # noqa: BLE001 - packages of others, and the rest is worth having
            row["others"][name] = {"failed": f"{type(error).__name__}: {error}"}
    if ON_GPU:
        least = Work(case.least_bytes, case.operations).seconds(machine)
        best = row["ours_in_a_graph"] or row["ours"]
        row["least_microseconds"] = least * 1e6
        row["share_of_the_least"] = least * 1e6 / best["p50"]
        row["predicted_share"] = kernel_share(case.name, case.operations)
    return row


def line(row: Mapping[str, Any]) -> str:
    """One row of the table: microseconds at the median."""
    if not ON_GPU:
        return f"{row['name']:<58} ran and agrees"
    shown = [f"{row['name']:<58} least {row['least_microseconds']:9.1f} us"]
    shown.append(f"ours {row['ours']['p50']:9.1f}")
    if row["ours_in_a_graph"]:
        shown.append(f"in a graph {row['ours_in_a_graph']['p50']:9.1f}")
    shown.append(f"({row['share_of_the_least']:.0%}, predicted {_share(row)})")
    for name, times in row["others"].items():
        shown.append(f"{name} {times['p50']:.1f}" if "p50" in times else f"{name} failed")
    return "  ".join(shown)


def _share(row: Mapping[str, Any]) -> str:
    """What is predicted of the row's share of the least."""
    predicted = row["predicted_share"]
    return "nothing" if predicted is None else f"{predicted:.0%}"


def markdown(record: Mapping[str, Any]) -> str:
    """Return the kernels of a recorded file as a table: microseconds at the median.

    Raises
    ------
    ValueError
        If the record has no times of kernels.
    """
    items = record["items"]
    kernels = items.get("samplers", {}).get("found", {}).get("times", [])
    kernels = kernels + items.get("kernels", {}).get("found", [])
    if not kernels:
        raise ValueError(f"the record must have 'kernels', got {', '.join(record['items'])}")
    rows = []
    for row in kernels:
        best = row["ours_in_a_graph"] or row["ours"]
        others = ", ".join(
            f"{name} {times['p50']:.0f}" for name, times in row["others"].items() if "p50" in times
        )
        rows.append(
            [
                row["name"],
                f"{row['least_microseconds']:.1f}",
                f"{best['p50']:.1f}",
                f"{row['share_of_the_least']:.0%}",
                _share(row),
                others,
            ]
        )
    headings = ("", "least", "ours", "share of the least", "predicted", "others")
    return f"{origin(record)}\n\n{markdown_table(headings, rows)}"
