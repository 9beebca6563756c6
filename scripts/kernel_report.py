"""Compile every form of every kernel for every architecture, and print what each takes.

    python scripts/kernel_report.py [--only TEXT] [--skip TEXT ...] [--arch 90 ...] [--json FILE]

Needs no GPU. Exits with 1 if a form spills registers to memory or takes more shared memory than
the architecture has.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

from stars_fast.kernels.aot import ARCHITECTURES, SHARED_LIMIT, Resources, Variant, resources

MODULES = (
    "philox", "pages", "sample", "adjust", "token_logprobs", "top_tokens", "attention",
)  # fmt: skip
VARIANTS: list[Variant] = [
    form
    for module in MODULES
    for form in importlib.import_module(f"stars_fast.kernels.{module}").variants()
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
        }
        for (number, capability), taken in zip(jobs, done, strict=True)
    ]
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    width = max((len(str(row["name"])) for row in rows), default=0)
    print(f"{'form':<{width}}  arch   warps  stages  registers  spilled B  shared B")
    for row in rows:
        print(
            f"{row['name']:<{width}}  sm_{row['capability']:<4}{row['warps']:>5}{row['stages']:>8}"
            f"{row['registers']:>11}{row['local_bytes']:>11}{row['shared_bytes']:>10}"
            + ("" if row["fits"] else "  DOES NOT FIT")
        )
    return 0 if all(row["fits"] for row in rows) else 1


def _resources(job: tuple[int, int]) -> Resources:
    return resources(VARIANTS[job[0]], job[1])


if __name__ == "__main__":
    sys.exit(main())
