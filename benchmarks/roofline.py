"""Each phase of a run against the least time that the machine allows.

    python benchmarks/roofline.py [--out results/NAME.json] [--shape SMALL] [--requests 16] ...

Measures the machine's copy bandwidth and matrix rate, finds the target reward for the acceptance
rate asked for, runs the engine, and prints measured / least phase by phase. The least counts the
weights once a decode step and once a pass of the reward model, each cached key and value once (a
prefix that candidates share once for all), and the models' arithmetic; see `least` and `observe`.
Weights are random. Without options: a model of 14.7M parameters in float32 on a CPU, the shape of
Llama-3.2-1B in bfloat16 on a GPU, with a reward model of the same shape.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from stars_fast import StarsParams
from stars_fast.benchmarks import models, observe
from stars_fast.benchmarks.acceptance import target_for
from stars_fast.benchmarks.flags import number
from stars_fast.benchmarks.least import Machine
from stars_fast.benchmarks.measure import ceilings, default_device, header
from stars_fast.benchmarks.models import id_engine, language_model, prompts, reward_model
from stars_fast.tables import text_table

HERE = Path(__file__).resolve().parent
SHAPES = {name: x for name, x in vars(models).items() if isinstance(x, models.Shape)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PAGE_SIZE = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the record if asked to."""
    device = default_device()
    options = _parser(device).parse_args(arguments)
    if options.kv_dtype == "fp8" and device.type != "cuda":
        raise SystemExit("--kv-dtype must be auto without a GPU, got 'fp8'")
    command = ["python benchmarks/roofline.py", *(sys.argv[1:] if arguments is None else arguments)]
    print(f"measuring the ceilings of {device}", flush=True)
    machine = ceilings(device, DTYPES[options.dtype], quick=options.quick)
    runs = measure(options, device, machine)
    run = sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]
    print(_heading(options, machine, run))
    print(table(run))
    if options.out is not None:
        record = {
            **header(" ".join(command), device, options.commit),
            "machine": asdict(machine),
            "setting": {k: v for k, v in vars(options).items() if k not in ("out", "commit")},
            "seconds_of_all_runs": [run.seconds for run in runs],
            "median_run": run.record(),
        }
        target = HERE / options.out
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {target}")
    return 0


def measure(
    options: argparse.Namespace, device: torch.device, machine: Machine
) -> list[observe.Run]:
    """Build the engine, find the target, and run the same requests `options.repeats` times."""
    shape, count = SHAPES[options.shape], options.requests
    placed: dict[str, Any] = {"device": device, "dtype": DTYPES[options.dtype]}
    rows = max_rows(count, options.candidates)
    pages = pages_needed(
        count, rows, options.prompt, options.max_tokens, options.segment_length, PAGE_SIZE
    )
    engine = id_engine(
        language_model(shape, **placed),
        reward_model(
            replace(SHAPES[options.reward_shape or options.shape], vocab_size=shape.vocab_size),
            **placed,
        ),
        shape,
        page_size=PAGE_SIZE,
        num_pages=pages,
        reward_num_pages=pages,
        max_rows=rows,
        prefix_caching=False,  # so that a repeat prefills again
        kv_dtype=options.kv_dtype,
        device_timing=device.type == "cuda",
    )
    plain = StarsParams(
        segment_length=options.segment_length,
        max_tokens=options.max_tokens,
        candidates=options.candidates,
        alpha=1.0,
        ignore_eos=True,
    )
    asked = prompts(shape, count, options.prompt, options.prompt)
    runs = []
    with tqdm(total=options.repeats + 2, unit="run", desc="target", file=sys.stdout) as bar:
        target = target_for(engine, asked, plain, options.acceptance, tolerance=options.tolerance)
        bar.update()
        params = seeded(replace(plain, target_reward=target), count)
        for number in range(options.repeats + 1):
            bar.set_description("run" if number else "warm")
            runs.append(observe.run(engine, asked, params, machine))
            bar.update()
    return runs[1:]


def seeded(params: StarsParams, count: int) -> list[StarsParams]:
    """Return the parameters of each request, with the seeds that `target_for` uses."""
    return [replace(params, seed=i) for i in range(count)]


def max_rows(requests: int, candidates: int | Literal["auto"]) -> int:
    """Return the rows of a round for `requests` requests; for "auto" four each, at least 32."""
    return requests * candidates if candidates != "auto" else max(32, 4 * requests)


def pages_needed(
    requests: int, rows: int, prompt: int, max_tokens: int, segment_length: int, page_size: int
) -> int:
    """Return pages with which no request waits and no candidate is given up."""
    branch = -(-segment_length // page_size) + 1
    # Prompt and response apart, for the padding between; a kept attempt of each; a percent spare.
    committed = -(-prompt // page_size) + -(-max_tokens // page_size) + 2
    return int(1.02 * (requests * (committed + branch) + rows * branch)) + 64


# The terminal


def _heading(options: argparse.Namespace, machine: Machine, run: observe.Run) -> str:
    counts = run.counts
    return (
        f"\n{machine.name}: {machine.bytes_per_second / 1e9:.1f} GB/s copied (read + written), "
        f"{machine.operations_per_second / 1e9:,.0f} GFLOP/s of {options.dtype} products\n"
        f"{options.shape}, random weights; {options.requests} requests, prompt {options.prompt}, "
        f"K {options.segment_length}, M {options.max_tokens}, candidates {options.candidates}\n"
        f"{run.acceptance_rate:.1%} of attempts accepted, {counts['rounds']:.0f} rounds, "
        f"{counts['accepted_tokens'] / run.seconds:,.1f} accepted tokens/s, "
        f"{counts['drafted_tokens'] / run.seconds:,.1f} drafted\n"
    )


def table(run: observe.Run) -> str:
    """Return the phases of a run, and the whole, as lines of text."""
    rows = [["phase", "seconds", "share", "least", "measured / least", "GB", "GFLOP"]]
    for phase in run.phases:
        work = [f"{phase.work.bytes / 1e9:.2f}", f"{phase.work.operations / 1e9:.1f}"]
        rows.append([*_times(phase.name, phase.seconds, run.seconds, phase.least_seconds), *work])
    rows.append([*_times("whole", run.seconds, run.seconds, run.least_seconds), "", ""])
    return "\n".join(text_table(rows))


def _times(name: str, seconds: float, whole: float, least: float) -> list[str]:
    ratio = f"{seconds / least:.2f}" if least else "-"
    return [name, f"{seconds:.4f}", f"{seconds / whole:.1%}", f"{least:.4f}", ratio]


# The command line


def _parser(device: torch.device) -> argparse.ArgumentParser:
    on_gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, help="where to write the figures, from benchmarks/")
    add("--commit", default=None, help="if the checkout has no .git")
    add("--shape", choices=SHAPES, default="ONE_BILLION" if on_gpu else "SMALL")
    add("--reward-shape", choices=SHAPES, default=None, help="that of the language model if unset")
    add("--requests", type=number(int, low=1), default=64 if on_gpu else 16)
    add("--prompt", type=number(int, low=1), default=128, help="tokens of each prompt")
    add("--segment-length", type=number(int, low=1), default=32, help="K")
    add("--max-tokens", type=number(int, low=1), default=128, help="M")
    add("--candidates", type=number(int, low=1, words=("auto",)), default="auto")
    add("--acceptance", type=part, default=0.5, help="part of the attempts that pass")
    add("--tolerance", type=part, default=0.05, help="of --acceptance, when the target is found")
    add("--dtype", choices=DTYPES, default="bfloat16" if on_gpu else "float32")
    add("--kv-dtype", choices=["auto", "fp8"], default="auto")
    add("--repeats", type=number(int, low=1), default=3, help="the run of the median time is shown")
    add("--quick", action="store_true", help="measure the ceilings on small arrays: no figures")
    return parser


def part(text: str) -> float:
    """Read a number in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
