"""Check and time everything that runs on a GPU, in one call of less than ten minutes.

    pip install --no-build-isolation --no-deps .
    python benchmarks/gpu.py [--out results/NAME.json] [--commit ID] [--skip STEP ...]

Steps, in order; a step that fails is reported and the next one runs:

``tests``     the tests of the operators, kernels, models and engine, on the GPU
``memory``    compute-sanitizer, memcheck and racecheck, over the kernels on small shapes
``engine``    the engine's tokens on the GPU in float32 against the CPU's
``rounds``    decode steps of a 1.2B model, 64 rows: with the kernels, compiled, and without
``kernels``   each kernel's time, its share of the measured bandwidth, and its peers' times

Without a GPU the same steps run in Triton's interpreter on small shapes, as far as that goes:
nothing is timed for the record then, and nothing is written.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stars_fast.benchmarks.interpreter import ON_GPU, interpret_without_gpu

interpret_without_gpu()

import torch  # noqa: E402 - after the choice of the interpreter

from stars_fast.benchmarks.kernel_cases import FULL, TINY, Case, Job, all_cases  # noqa: E402
from stars_fast.benchmarks.least import Machine, Work  # noqa: E402
from stars_fast.benchmarks.measure import ceilings, header, percentiles  # noqa: E402

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
REPEATS = 30 if ON_GPU else 1

# The machine's own packages may be older or newer than those of constraints.txt, and warn.
ANY_VERSION = ["-o", "filterwarnings=default", "-o", "minversion=7.0"]
TESTS = ["tests/ops", "tests/kernels", "tests/models/test_paged.py", "tests/engine"]


def main() -> int:
    """Run the steps; return how many failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where to write the figures, from benchmarks/")
    parser.add_argument("--commit", default=None, help="if the checkout has no .git")
    parser.add_argument("--skip", nargs="*", default=[], choices=list(STEPS))
    parser.add_argument("--small", action="store_true", help="run every kernel once, and no more")
    parser.add_argument("--table", type=Path, help="print a recorded file as Markdown, and no more")
    options = parser.parse_args()
    if options.small:
        return run_small()
    if options.table is not None:
        print(markdown(json.loads((HERE / options.table).read_text(encoding="utf-8"))))
        return 0

    command = "python benchmarks/gpu.py " + " ".join(sys.argv[1:])
    record: dict[str, Any] = {**header(command, DEVICE, options.commit), **machine()}
    failed = []
    for name, step in STEPS.items():
        if name in options.skip:
            continue
        print(f"\n=== {name}", flush=True)
        begun = time.perf_counter()
        try:
            record[name] = step()
        except Exception as error:  # noqa: BLE001 - the other steps are worth having
            failed.append(name)
            record[name] = {"failed": f"{type(error).__name__}: {error}"}
            print(f"FAILED: {record[name]['failed'][-2000:]}")
        print(f"=== {name}: {time.perf_counter() - begun:.0f} s", flush=True)
        if options.out is not None and ON_GPU:
            target = HERE / options.out
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\nfailed: " + (", ".join(failed) or "nothing"))
    return len(failed)


# The machine


def machine() -> dict[str, Any]:
    """Return a GPU's measured ceilings."""
    if not ON_GPU:
        print("no GPU: Triton's interpreter, small shapes, no figures")
        return {}
    found = ceilings(DEVICE, torch.bfloat16)
    print(
        f"{found.name}: copies {found.bytes_per_second / 1e12:.2f} TB/s (read + written), bfloat16 "
        f"products {found.operations_per_second / 1e12:.0f} TFLOP/s"
    )
    return {
        "multiprocessors": torch.cuda.get_device_properties(DEVICE).multi_processor_count,
        "copy_bytes_per_second": found.bytes_per_second,
        "bf16_operations_per_second": found.operations_per_second,
    }


# Time


def timed(job: Job, sets: int, repeats: int = REPEATS) -> list[float]:
    """Seconds of single calls, input sets in turn, after a warm-up of each."""
    for number in range(max(3, sets) if ON_GPU else 1):
        job(number % sets)
    if not ON_GPU:
        begun = time.perf_counter()
        job(0)
        return [time.perf_counter() - begun]
    # Events around each call, all calls queued: the host's time between launches counts where the
    # device waits for it, as it would in a caller's loop.
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for number, (begin, end) in enumerate(events):
        begin.record()
        job(number % sets)
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in events]


def replayed(job: Job, sets: int) -> list[float] | None:
    """Seconds of a call inside a CUDA graph of one call of each set; None if it has none."""
    if not ON_GPU:
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        job(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    calls = max(8, sets)
    try:
        with torch.cuda.graph(graph):
            for number in range(calls):
                job(number % sets)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return [seconds / calls for seconds in timed(lambda _: graph.replay(), 1, repeats=20)]


def microseconds(seconds: list[float] | None) -> dict[str, float] | None:
    """Return microseconds at 20, 50 and 80 %."""
    if seconds is None:
        return None
    return {name: value * 1e6 for name, value in percentiles(seconds).items()}


# Steps


def run_tests() -> dict[str, Any]:
    """Run the tests, all on the device that is here."""
    tests = TESTS if ON_GPU else [*TESTS[:2]]
    return {"closing line": _run([sys.executable, "-m", "pytest", "-q", *ANY_VERSION, *tests])}


def run_sanitizer() -> dict[str, Any]:
    """Run compute-sanitizer over every kernel, on small shapes."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or not ON_GPU:
        print("skipped: no compute-sanitizer, or no GPU")
        return {"skipped": "no compute-sanitizer, or no GPU"}
    lines = {}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", "--target-processes", "all"]
        command += [sys.executable, __file__, "--small"]
        # Without the caching allocator, so that each tensor's end is the end of its memory.
        lines[check] = _run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return lines


def run_small() -> int:
    """Check every case on small shapes."""
    for case in all_cases(TINY, DEVICE):
        case.check()
    if ON_GPU:
        torch.cuda.synchronize()
    print("every kernel ran")
    return 0


def compare_engines() -> dict[str, Any]:
    """Run the demo's prompts on the GPU and on the CPU, in float32, with the same seeds."""
    from stars_fast import Engine, StarsParams

    prompts = ["Write a review of a kettle.", "Write a review of a film."] * (8 if ON_GPU else 1)
    tokens = 64 if ON_GPU else 8
    settings = [
        StarsParams(
            segment_length=16 if ON_GPU else 4,
            target_reward=0.5,
            beta=0.3,
            max_tokens=tokens,
            max_attempts=4,
            top_p=1.0 if i % 2 else 0.95,
            seed=i,
        )
        for i in range(len(prompts))
    ]
    found = {}
    sides: dict[str, dict[str, Any]] = {
        "cpu": {"device": "cpu", "backend": "pytorch"},
        "kernels": {"device": DEVICE, "backend": "triton"},
    }
    for name, options in sides.items():
        engine = Engine.demo(dtype=torch.float32, max_rows=64, num_pages=1024, **options)
        outputs = engine.generate(prompts, settings, use_tqdm=False)
        assert [output.error for output in outputs] == [None] * len(outputs)
        found[name] = [output.outputs[0].token_ids for output in outputs]
    same = sum(a == b for a, b in zip(found["cpu"], found["kernels"], strict=True))
    print(f"{same} of {len(prompts)} responses of {tokens} tokens are the same")
    # A near tie may fall the other way, and what follows it then differs.
    assert same >= 0.9 * len(prompts), found
    return {"responses": len(prompts), "tokens": tokens, "same": same}


def time_rounds() -> list[dict[str, Any]]:
    """Time unaligned rounds of the engine; the least is to read the weights once a step."""
    from stars_fast import Engine, StarsParams
    from stars_fast.benchmarks.models import ONE_BILLION, language_model, prompts
    from stars_fast.benchmarks.models import TINY as TINY_MODEL

    shape, dtype = (ONE_BILLION, torch.bfloat16) if ON_GPU else (TINY_MODEL, torch.float32)
    model = language_model(shape)
    torch.nn.Module.to(model, DEVICE, dtype)
    weights = sum(p.nbytes for p in model.parameters())
    bandwidth = ceilings(DEVICE, dtype).bytes_per_second if ON_GPU else 0.0
    steps = 128 if ON_GPU else 4
    params = StarsParams(
        method="vanilla", max_tokens=steps, segment_length=min(32, steps), seed=0, ignore_eos=True
    )
    asked = prompts(shape, 64 if ON_GPU else 2)
    rows = []
    sides: dict[str, dict[str, Any]] = {
        "kernels": {"backend": "triton"},
        "kernels, compiled": {"backend": "triton", "compile_model": True},
        "PyTorch's operators": {"backend": "pytorch"},
    }
    for name, options in sides.items():
        engine = Engine(model, max_rows=64, num_pages=4096 if ON_GPU else 64, **options)
        engine.generate(asked, params, use_tqdm=False)  # captures and compiles
        begun = time.perf_counter()
        engine.generate(asked, params, use_tqdm=False)
        seconds = (time.perf_counter() - begun) / steps
        rows.append({"name": name, "rows": len(asked), "milliseconds_per_step": seconds * 1e3})
        if ON_GPU:
            rows[-1]["least_milliseconds"] = weights / bandwidth * 1e3
            rows[-1]["captured"] = str(getattr(engine.loop.drafter, "captures", None))
        print(rows[-1] if ON_GPU else f"{name}: ran")
        del engine
        gc.collect()
    return rows


def time_kernels() -> list[dict[str, Any]]:
    """Check and time each case and its peers."""
    found = ceilings(DEVICE, torch.bfloat16, quick=not ON_GPU)
    rows = []
    for case in all_cases(FULL if ON_GPU else TINY, DEVICE):
        case.check()
        row = _time_case(case, found)
        rows.append(row)
        print(_line(row), flush=True)
        del case
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()
    return rows


def _time_case(case: Case, machine: Machine) -> dict[str, Any]:
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
        except (RuntimeError, TypeError, ValueError) as error:
            row["others"][name] = {"failed": f"{type(error).__name__}: {error}"}
    if ON_GPU:
        least = Work(case.least_bytes, case.operations).seconds(machine)
        best = row["ours_in_a_graph"] or row["ours"]
        row["least_microseconds"] = least * 1e6
        row["share_of_the_least"] = least * 1e6 / best["p50"]
    return row


def _line(row: dict[str, Any]) -> str:
    """One row of the table: microseconds at the median."""
    if not ON_GPU:
        return f"{row['name']:<58} ran and agrees"
    shown = [f"{row['name']:<58} least {row['least_microseconds']:9.1f} us"]
    shown.append(f"ours {row['ours']['p50']:9.1f}")
    if row["ours_in_a_graph"]:
        shown.append(f"in a graph {row['ours_in_a_graph']['p50']:9.1f}")
    shown.append(f"({row['share_of_the_least']:.0%})")
    for name, times in row["others"].items():
        shown.append(f"{name} {times['p50']:.1f}" if "p50" in times else f"{name} failed")
    return "  ".join(shown)


def markdown(record: dict[str, Any]) -> str:
    """Return the kernels of a recorded file as a table: microseconds at the median."""
    versions = record["versions"]
    bandwidth = record["copy_bytes_per_second"] / 1e12
    machine = f"{record['device']}, copies {bandwidth:.2f} TB/s, commit {record['commit'][:10]}"
    lines = [
        f"{machine}, torch {versions['torch']}, triton {versions['triton']}; `{record['command']}`",
        "",
        "| | least | ours | share of the least | others |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in record["kernels"]:
        best = row["ours_in_a_graph"] or row["ours"]
        others = ", ".join(
            f"{name} {times['p50']:.0f}" for name, times in row["others"].items() if "p50" in times
        )
        lines.append(
            f"| {row['name']} | {row['least_microseconds']:.1f} | {best['p50']:.1f} "
            f"| {row['share_of_the_least']:.0%} | {others} |"
        )
    return "\n".join(lines)


def _run(command: list[str], **environment: str) -> str:
    """Run a command, show how it ended, and return its last line."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    closing = (done.stdout.strip().splitlines() or ["no output"])[-1]
    print(closing)
    if done.returncode:
        print((done.stdout + done.stderr)[-6000:])
        raise RuntimeError(f"exit {done.returncode}: {closing}")
    return closing


STEPS: dict[str, Callable[[], Any]] = {
    "tests": run_tests,
    "memory": run_sanitizer,
    "engine": compare_engines,
    "rounds": time_rounds,
    "kernels": time_kernels,
}

if __name__ == "__main__":
    sys.exit(main())
