"""Compile every form of every kernel for every architecture, and print what each takes.

    python scripts/kernel_report.py [--only TEXT] [--skip TEXT ...] [--arch 90 ...] [--json FILE]

Needs no GPU. Exits with 1 if a form spills registers to memory, takes more shared memory than the
architecture has, or has fewer buffers for what its loops load ahead than it needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import pkgutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

from stars_fast import kernels
from stars_fast.kernels.aot import ARCHITECTURES, SHARED_LIMIT, Resources, Variant, resources
from stars_fast.tables import text_table

_MODULES = (
    importlib.import_module(f"stars_fast.kernels.{module.name}")
    for module in pkgutil.iter_modules(kernels.__path__)
)
VARIANTS: list[Variant] = [
    form for module in _MODULES if hasattr(module, "variants") for form in module.variants()
]


def main() -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="forms whose name has this text")
    parser.add_argument(
        "--skip", nargs="*", default=[], help="no forms whose name has one of these"
    )
    parser.add_argument("--arch", nargs="*", type=int, choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--json", type=Path, help="also write the rows to a file")
    options = parser.parse_args()
    jobs = [
        (number, capability)
        for number, variant in enumerate(VARIANTS)
        for capability in variant.capabilities
        if capability in options.arch
        and options.only in variant.name
        and not any(x in variant.name for x in options.skip)
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        done = list(tqdm(pool.map(_resources, jobs), total=len(jobs), unit="form"))
    rows = [
        {
            "name": VARIANTS[number].name,
            "capability": capability,
            "warps": VARIANTS[number].num_warps,
            "stages": VARIANTS[number].num_stages,
            **dataclasses.asdict(taken),
            "fits": taken.local_bytes == 0 and taken.shared_bytes <= SHARED_LIMIT[capability],
            "overlaps": _overlaps(VARIANTS[number], taken),
        }
        for (number, capability), taken in zip(jobs, done, strict=True)
    ]
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    table = [
        ["form", "arch", "warps", "stages", "registers", "spilled B", "shared B", "buffers", ""]
    ]
    for row in rows:
        names = ("warps", "stages", "registers", "local_bytes", "shared_bytes")
        numbers = [str(row[name]) for name in names]
        buffers = " ".join(map(str, row["buffers"]))
        faults = [] if row["fits"] else ["DOES NOT FIT"]
        faults += [] if row["overlaps"] else ["DOES NOT OVERLAP"]
        name, arch = str(row["name"]), f"sm_{row['capability']}"
        table.append([name, arch, *numbers, buffers, ", ".join(faults)])
    print("\n".join(text_table(table, left=(0, 1))))
    return 0 if all(row["fits"] and row["overlaps"] for row in rows) else 1


def _overlaps(variant: Variant, taken: Resources) -> bool:
    return min(taken.buffers, default=0) >= variant.min_buffers


def _resources(job: tuple[int, int]) -> Resources:
    return resources(VARIANTS[job[0]], job[1])


if __name__ == "__main__":
    sys.exit(main())
