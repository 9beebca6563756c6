"""The paper's setting (arXiv 2511.03827) on a GPU, one axis at a time.

    python benchmarks/paper.py [--out results/NAME.json] [--minutes 8] [--only STEP ...]

Language and reward model have the shape of Llama-2-7B and random weights: what is measured is the
engine, not the text. The acceptance rate is set by the target reward. Steps, the most important
first:

``centre``          batch 64, K 15, M 128, prompt 128, candidates auto, 50 % accepted, bfloat16
``vanilla``         the same without alignment: the floor
``first segment``   at batch 1, against K decode steps and one pass of the reward model
``overhead``        all accepted, a small reward model: time over that of ``vanilla``
``baselines``       the centre against (a) to (d) of `stars_fast.benchmarks.setting`
others              the centre with one setting changed, named after it

After ``--minutes`` no further step begins, and what was left out is listed. A step that fails is
recorded with its error. The requests of a batch are there from its start; the same ones run once
before, so that what is timed neither compiles nor captures.

Without a GPU, or with ``--small``, the same steps run on models of a few thousand parameters: that
the code works is all this shows, and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stars_fast.benchmarks.interpreter import ON_GPU, interpret_without_gpu

interpret_without_gpu()

import torch  # noqa: E402 - after the choice of the interpreter
from tqdm import tqdm  # noqa: E402

from stars_fast.benchmarks.flags import number  # noqa: E402
from stars_fast.benchmarks.measure import ceilings, default_device, header  # noqa: E402
from stars_fast.benchmarks.paper_bench import Bench  # noqa: E402
from stars_fast.benchmarks.paper_steps import judged, steps  # noqa: E402

HERE = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; return how many failed."""
    options = _parser().parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    small = options.small or not ON_GPU
    device = default_device()
    machine = ceilings(device, torch.float32 if small else torch.bfloat16, quick=small)
    command = " ".join(["python benchmarks/paper.py", *given])
    record: dict[str, Any] = {
        **header(command, device, options.commit),
        "weights": "random, so the acceptance rate is set by the target reward",
        "machine": asdict(machine),
        "steps": {},
        "left_out": [],
    }
    if small:
        print("small models, to see that the code works: no figures, nothing is written")
    chosen = [step for step in steps() if not options.only or step.name in options.only]
    bench = Bench(device, machine, small=small)
    begun = time.monotonic()
    with tqdm(chosen, unit="step", file=sys.stdout) as bar:
        for number, step in enumerate(bar):
            if time.monotonic() - begun > 60 * options.minutes:
                record["left_out"] = [step.name for step in chosen[number:]]
                break
            bar.set_description(step.name)
            record["steps"][step.name] = bench.measure(step)
            bar.write(line(step.name, record["steps"][step.name], small=small))
            record["targets"] = judged(record["steps"])
            _write(record, None if small else options.out)
    _write(record, None if small else options.out)
    print(f"\nrandom weights; left out: {', '.join(record['left_out']) or 'nothing'}")
    if not small:
        print(targets_table(judged(record["steps"])))
    return sum("failed" in found for found in record["steps"].values())


def _write(record: dict[str, Any], out: Path | None) -> None:
    if out is None:
        return
    target = HERE / out
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def line(name: str, found: Mapping[str, Any], *, small: bool = False) -> str:
    """Return a step's figures in a line or two; `small`: that it ran, and no figures."""
    if "failed" in found:
        return f"{name:<16} FAILED: {found['failed'][:300]}"
    if small:
        return f"{name:<16} ran"
    if "decode_steps_seconds" in found:
        parts = {
            "first segment": found["first_segment_seconds_p50"],
            "K steps": found["decode_steps_seconds"],
            "reward pass": found["reward_pass_seconds"],
            "prefill": found["prefill_seconds"],
        }
        shown = ", ".join(f"{label} {1e3 * value:.1f} ms" for label, value in parts.items())
        return f"{name:<16} {shown}: {found['over']:+.1%}"
    if "over" in found:
        shown = ", ".join(
            f"{side} {found[side]['accepted_tokens_per_second']:,.0f} tokens/s"
            for side in ("stars", "vanilla")
        )
        return f"{name:<16} {shown}: {found['over']:+.1%}"
    if "times_a" in found:
        shown = ", ".join(f"({side}) {found[f'times_{side}']:.1f}" for side in "abcd")
        rate = f"{found['accepted_tokens_per_second']:,.0f} accepted tokens/s"
        return f"{name:<16} {rate}, times that of {shown}"
    ratios = ", ".join(
        f"{phase['name']} {phase['measured_over_least']:.2f}"
        for phase in found["phases"]
        if phase["measured_over_least"] is not None
    )
    memory = f", {found['peak_memory_bytes'] / 1e9:.1f} GB" if "peak_memory_bytes" in found else ""
    return (
        f"{name:<16} {found['accepted_tokens_per_second']:,.0f} accepted tokens/s, "
        f"{found['drafted_tokens_per_second']:,.0f} drafted, {found['acceptance_rate']:.0%} pass, "
        f"first segment {1e3 * found['first_segment_seconds_p50']:.0f} ms, "
        f"{found['share_of_the_least']:.0%} of the roofline\n"
        f"{'':<16} measured / least: {ratios}; pages {found['pages_used']} of {found['pages']}"
        f"{memory}"
    )


def targets_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the targets beside what was measured, a line each."""
    words = {None: "not measured", True: "met", False: "missed"}
    lines = []
    for target in found:
        value = "-" if target["measured"] is None else f"{target['measured']:.4g}"
        lines.append(
            f"{target['name']:<58} {target['asked']:>14}  {value:>9}  {words[target['met']]}"
        )
    return "\n".join(lines)


# The command line


def _parser() -> argparse.ArgumentParser:
    names = [step.name for step in steps()]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, help="where to write the figures, from benchmarks/")
    add("--commit", default=None, help="if the checkout has no .git")
    add(
        "--minutes",
        type=number(float, low=0, open_low=True),
        default=8.0,
        help="after which no further step begins",
    )
    shown = ", ".join(names).replace("%", "%%")
    add("--only", nargs="+", choices=names, metavar="STEP", help=shown)
    add("--small", action="store_true", help="tiny models; always so without a GPU")
    return parser


if __name__ == "__main__":
    sys.exit(main())
