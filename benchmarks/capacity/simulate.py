"""How many replicas for a load, and which number of candidates: the real scheduler, simulated time.

    python benchmarks/capacity/simulate.py --out results/simulation.json --png ../docs/capacity.png
    python benchmarks/capacity/simulate.py --load 40 --max-wait-p99 1.0
    python benchmarks/capacity/simulate.py --plot results/simulation.json --png ../docs/capacity.png

The first form sweeps a replica's load for each number of candidates and writes the figures and a
plot. The second finds the least number of replicas that holds the limits, for each number of
candidates. The third draws the plot of a record again. Paths are relative to benchmarks/. What the
model takes for granted is in docs/capacity.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from stars_fast.benchmarks.capacity.plot import plot
from stars_fast.benchmarks.capacity.replica import GPUS, MODELS, Replica
from stars_fast.benchmarks.capacity.replicas_needed import Limits, replicas_needed, saturation
from stars_fast.benchmarks.capacity.simulation import AUTO, simulate
from stars_fast.benchmarks.capacity.workload import Workload
from stars_fast.benchmarks.flags import number
from stars_fast.benchmarks.measure import header
from stars_fast.tables import markdown_table

HERE = Path(__file__).resolve().parents[1]
#: Loads of the sweep, as parts of the highest saturation throughput.
LOADS = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1)
#: Fewer requests say nothing of a 99th percentile.
LEAST_REQUESTS = 100
#: Of `Limits`, by flag.
LIMITS = {
    "--max-wait-p99": "wait_seconds_p99",
    "--max-first-p99": "first_seconds_p99",
    "--max-end-p99": "end_seconds_p99",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the three forms."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args(given)
    limits = Limits(**{name: getattr(options, name) for name in LIMITS.values()})
    if options.load is not None and limits == Limits():
        parser.error(f"--load needs a limit: one of {', '.join(LIMITS)}")
    if options.load is None and limits != Limits():
        parser.error(f"{', '.join(LIMITS)} need --load")
    try:
        if options.plot is not None:
            plot(_read(options.plot), _png(options.png, options.plot))
        elif options.load is not None:
            answer(options, _workload(options), _replica(options), limits)
        else:
            run_sweep(options, shlex.join(["python", "benchmarks/capacity/simulate.py", *given]))
    except ValueError as error:  # of values that do not go together
        parser.error(str(error))
    return 0


def run_sweep(options: argparse.Namespace, command: str) -> None:
    """Sweep, print a table, and write what is asked for."""
    workload, replica = _workload(options), _replica(options)
    cells = (1 + len(LOADS)) * len(options.candidates)
    if options.requests < cells * LEAST_REQUESTS:
        raise ValueError(
            f"argument --requests: must be at least {cells * LEAST_REQUESTS}, "
            f"{LEAST_REQUESTS} for each of {cells} runs, got {options.requests}"
        )
    record = header(command, torch.device("cpu"))
    record["simulated"] = "times are arithmetic; nothing was measured on a GPU"
    record |= {"workload": asdict(workload), "replica": asdict(replica)}
    begun = time.perf_counter()
    record |= sweep(options, workload, replica)
    record["sweep_seconds"] = time.perf_counter() - begun
    print(table(record))
    print(f"{record['requests']} requests in {record['sweep_seconds']:.0f} s")
    if options.out is not None:
        target = HERE / options.out
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        plot(record, _png(options.png, options.out))


# The sweep


def sweep(options: argparse.Namespace, workload: Workload, replica: Replica) -> dict[str, Any]:
    """Simulate every number of candidates at every load; return the figures."""
    count = options.requests // ((1 + len(LOADS)) * len(options.candidates))
    total = count * (1 + len(LOADS)) * len(options.candidates)
    with tqdm(total=total, unit=" requests", desc="simulated", mininterval=1.0) as bar:
        top = {
            n: saturation(workload, replica, n, count=count, seed=options.seed, progress=bar.update)
            for n in options.candidates
        }
        highest = max(top.values())
        runs = []
        for load in LOADS:
            requests = workload.draw(count, load * highest, options.seed)
            for n in options.candidates:
                outcome = simulate(
                    requests, workload, replica, n, seed=options.seed, progress=bar.update
                )
                runs.append(
                    {
                        "candidates": _name(n),
                        "load": load,
                        "requests_per_second": load * highest,
                        **outcome.summary(),
                    }
                )
    return {
        "requests": total,
        "requests_per_run": count,
        "seed": options.seed,
        "gpu": options.gpu,
        "model": options.model,
        "reward_model": options.reward_model or options.model,
        "efficiency": options.efficiency,
        "saturation_requests_per_second": {_name(n): rate for n, rate in top.items()},
        "runs": runs,
    }


def table(record: dict[str, Any]) -> str:
    """Return a record's figures as Markdown."""
    headings = [
        "load", "requests/s", "N", "wait p50, p99 (s)", "first segment p50, p99 (s)",
        "end p50, p99 (s)", "drafted / accepted", "rows a round", "pages mean, max (%)",
        "preemptions a request",
    ]  # fmt: skip
    rows = []
    for run in record["runs"]:
        times = [
            f"{run[f'{name}_seconds_p50']:.2f}, {run[f'{name}_seconds_p99']:.2f}"
            for name in ("wait", "first", "end")
        ]
        pages = f"{100 * run['page_share_mean']:.0f}, {100 * run['page_share_max']:.0f}"
        cells = [
            f"{run['load']:.1f}",
            f"{run['requests_per_second']:.1f}",
            str(run["candidates"]),
            *times,
            f"{run['drafted_per_accepted']:.2f}",
            f"{run['rows_mean']:.0f}",
            pages,
            f"{run['preemptions_per_request']:.4f}",
        ]
        rows.append(cells)
    return markdown_table(headings, rows)


# The answer to a load


def answer(
    options: argparse.Namespace, workload: Workload, replica: Replica, limits: Limits
) -> None:
    """Print how many replicas hold the limits, for each number of candidates, and the best."""
    asked = [
        f"{name.replace('_seconds_', ' ')} at most {limit:g} s"
        for name, limit in asdict(limits).items()
        if limit is not None
    ]
    print(
        f"{options.load:g} requests/s, {', '.join(asked)}; {options.model} on "
        f"{replica.machine.name}, efficiency {options.efficiency:g}, simulated"
    )
    headings = ["N", "replicas", *(f"{name} p99 (s)" for name in ("wait", "first segment", "end"))]
    found, rows = {}, []
    for n in tqdm(options.candidates, desc="candidates", leave=False):
        least = replicas_needed(
            workload,
            replica,
            n,
            options.load,
            limits,
            count=options.trial_requests,
            most=options.max_replicas,
            seed=options.seed,
        )
        if least is None:
            rows.append([_name(n), f"more than {options.max_replicas}", "", "", "", ""])
            continue
        replicas, figures = least
        found[n] = (replicas, figures["drafted_per_accepted"])
        cells = [f"{figures[name]:.2f}" for name in (*LIMITS.values(), "drafted_per_accepted")]
        rows.append([_name(n), str(replicas), *cells])
    print(markdown_table([*headings, "drafted/accepted"], rows))
    if not found:
        print(f"answer: no N holds the limits with at most {options.max_replicas} replicas")
        return
    best = min(found, key=lambda n: found[n])
    print(
        f"answer: {found[best][0]} replicas, N = {_name(best)} "
        "(the fewest replicas, then the least waste)"
    )


# Files


def _read(path: Path) -> dict[str, Any]:
    """Return a record. Raises ValueError if there is none."""
    try:
        record: dict[str, Any] = json.loads((HERE / path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"argument --plot: {HERE / path} cannot be read: {error}") from error
    if "saturation_requests_per_second" not in record:
        raise ValueError(f"argument --plot: {HERE / path} is no record of this command")
    return record


def _png(asked: Path | None, record: Path) -> Path:
    return HERE / (asked if asked is not None else record.with_suffix(".png"))


# The command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, help="where to write the sweep's figures, and a plot beside them")
    add("--png", type=Path, help="where to write the plot instead")
    add("--plot", type=Path, help="draw the plot of this record, and no more")
    whole, positive = number(int, low=1), number(float, low=0, open_low=True)
    add("--requests", type=whole, default=1_000_000, help="of the sweep in all (%(default)s)")
    add("--seed", type=number(int, low=0, high=2**32 - 1), default=0)
    add(
        "--candidates",
        type=_candidates,
        nargs="+",
        default=[1, 2, 4, 8, AUTO],
        help="numbers, or auto (1 2 4 8 auto)",
    )

    group = parser.add_argument_group("the answer to a load")
    group.add_argument("--load", type=positive, help="requests per second in all")
    for flag, name in LIMITS.items():
        what = {"wait": "to the first round", "first": "to the first segment", "end": "to the end"}
        seconds = f"seconds from arrival {what[name.partition('_')[0]]}, 99th percentile"
        group.add_argument(flag, type=positive, dest=name, metavar="SECONDS", help=seconds)
    group.add_argument("--max-replicas", type=whole, default=1024, help="to try (%(default)s)")
    group.add_argument(
        "--trial-requests",
        type=number(int, low=LEAST_REQUESTS),
        default=20_000,
        help="requests of each trial, to one replica (%(default)s)",
    )

    group = parser.add_argument_group("a replica")
    group.add_argument("--gpu", choices=list(GPUS), default="h200", help="(%(default)s)")
    group.add_argument("--bytes-per-second", type=positive, help="measured, for the data sheet's")
    group.add_argument("--operations-per-second", type=positive, help="the same, of bfloat16")
    share = number(float, low=0, high=1, open_low=True)
    group.add_argument(
        "--efficiency",
        type=share,
        default=0.6,
        help="part of the ceilings that rounds reach: the project's target (%(default)s)",
    )
    group.add_argument("--model", choices=list(MODELS), default="llama-2-7b", help="(%(default)s)")
    group.add_argument("--reward-model", choices=list(MODELS), help="(the same as --model)")
    group.add_argument("--max-rows", type=whole, default=256, help="(%(default)s)")
    group.add_argument("--max-prefill-tokens", type=whole, default=8192, help="(%(default)s)")
    group.add_argument(
        "--overhead",
        type=number(float, low=0),
        default=1e-3,
        help="seconds of a round that the host takes (%(default)s)",
    )
    group.add_argument(
        "--memory-share",
        type=share,
        default=0.9,
        help="of the GPU's memory, for weights and pages (%(default)s)",
    )

    group = parser.add_argument_group("the workload")
    ranges: dict[str, Callable[[str], float | str]] = {
        "prompt_mean": number(float, low=1),
        "prompt_spread": number(float, low=0),
        "prompt_max": whole,
        "response_mean": number(float, low=1),
        "max_tokens": whole,
        "segment_length": whole,
        "max_attempts": whole,
        "pass_rate": share,
        "pass_concentration": positive,
    }
    for field in fields(Workload):
        flag = "--" + field.name.replace("_", "-")
        group.add_argument(
            flag, type=ranges[field.name], default=field.default, help="(%(default)s)"
        )
    return parser


def _candidates(text: str) -> int:
    value = number(int, low=1, words=("auto",))(text)
    return AUTO if value == "auto" else int(value)


def _name(candidates: int) -> str:
    return "auto" if candidates == AUTO else str(candidates)


def _workload(options: argparse.Namespace) -> Workload:
    return Workload(**{field.name: getattr(options, field.name) for field in fields(Workload)})


def _replica(options: argparse.Namespace) -> Replica:
    gpu = GPUS[options.gpu]
    machine = replace(
        gpu.machine,
        bytes_per_second=options.bytes_per_second or gpu.machine.bytes_per_second,
        operations_per_second=options.operations_per_second or gpu.machine.operations_per_second,
    )
    return Replica.of(
        replace(gpu, machine=machine),
        MODELS[options.model],
        MODELS[options.reward_model or options.model],
        efficiency=options.efficiency,
        memory_share=options.memory_share,
        max_rows=options.max_rows,
        max_prefill_tokens=options.max_prefill_tokens,
        overhead=options.overhead,
    )


if __name__ == "__main__":
    sys.exit(main())
