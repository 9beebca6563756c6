"""Check and time what runs on a GPU, in stages for a card that is at hand for minutes.

    pip install --no-build-isolation --no-deps .
    python benchmarks/gpu.py --stage 1 --require-gpu [--out results/NAME.json] [--commit ID]

Stage 1, four minutes, tells the most:

``kernels agree``      every kernel in bfloat16, as a 7B model's step runs it, against its oracle
``captured``           replayed steps against eager ones; then graphs that go and come
``devices agree``      the engine's tokens on the GPU in float32 against the CPU's
``large steps``        decode steps of a 7B model, 192 rows: milliseconds, and the top 20 kernels
``centre``             the paper's setting, beside its prediction

Stage 2 has the rest of the paper's setting, a 1.2B model's steps by side, prompts and scoring by
each form of attention, and each kernel's time with its peers', the sampler's with vLLM's and
FlashInfer's. Stage 3 has the tests and compute-sanitizer. An item that fails is recorded with its
error and the next one runs; the record is written after each. After ``--seconds`` no further item
begins, and what was left out is listed. Commands write to logs beside the record as they go.

Without a GPU the same items run in Triton's interpreter on small shapes, as far as that goes:
nothing is timed for the record then, and nothing is written.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stars_fast.benchmarks.flags import number
from stars_fast.benchmarks.gpu_stages.cache import use_cache
from stars_fast.benchmarks.gpu_stages.items import Item, run_items
from stars_fast.benchmarks.interpreter import ON_GPU, interpret_without_gpu

HERE = Path(__file__).resolve().parent
# Seconds after which no further item of a stage begins.
_SECONDS = {1: 240.0, 2: 560.0, 3: 560.0}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a stage; return how many items failed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.require_gpu and not ON_GPU:
        parser.error("--require-gpu: torch finds no CUDA device here")
    interpret_without_gpu()
    if options.cache is not None:
        use_cache(options.cache)
    # Not before: Triton reads how it is to run, and where its cache is, when it is imported.
    from stars_fast.benchmarks.gpu_stages import checks, kernels
    from stars_fast.benchmarks.measure import default_device, header

    if options.table is not None:
        print(kernels.markdown(json.loads((HERE / options.table).read_text(encoding="utf-8"))))
        return 0
    if options.run_kernels:
        checks.run_kernels()
        return 0
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python benchmarks/gpu.py", *given])
    record: dict[str, Any] = {
        **header(command, default_device(), options.commit),
        "stage": options.stage,
    }
    if not ON_GPU:
        print("no GPU: Triton's interpreter, small shapes, no figures, nothing is written")
    out = HERE / options.out if options.out is not None and ON_GPU else None
    logs = HERE / "results" / "logs" if out is None else out.with_suffix("")
    seconds = options.seconds or _SECONDS[options.stage]
    items = stage_items(options.stage, logs, seconds)
    names = [item.name for item in items]
    if unknown := set(options.only) - set(names):
        parser.error(f"--only must be among {', '.join(names)}, got {', '.join(sorted(unknown))}")
    chosen = [item for item in items if not options.only or item.name in options.only]
    failed = run_items(chosen, record, out, seconds)
    print(f"\nfailed: {', '.join(failed) or 'nothing'}")
    print(f"left out: {', '.join(record['left_out']) or 'nothing'}")
    return len(failed)


def stage_items(stage: int, logs: Path, seconds: float) -> list[Item]:
    """Return the items of a stage, the most important first.

    Parameters
    ----------
    stage
        1, 2 or 3.
    logs
        Folder of the logs of commands.
    seconds
        That one command may take.
    """
    from stars_fast.benchmarks.gpu_stages import (
        attention_forms,
        checks,
        engines,
        kernels,
        paper_setting,
        samplers,
        steps,
    )

    if stage == 1:
        return [
            Item("ceilings", kernels.measure_ceilings),
            Item("kernels agree", kernels.check_kernels),
            Item("captured", engines.compare_captured),
            Item("bucket replaced", engines.replace_only_bucket),
            Item("waiting step", engines.refuse_waiting_step),
            Item("devices agree", engines.compare_devices),
            Item("large steps", steps.time_large_steps),
            Item("centre", paper_setting.measure_centre),
        ]
    if stage == 2:
        return [
            Item("paper", paper_setting.measure_rest),
            Item("steps", steps.time_sides),
            Item("attention forms", attention_forms.time_forms),
            Item("samplers", samplers.time_samplers),
            Item("kernels", kernels.time_kernels),
        ]
    return [
        *(Item(x, functools.partial(checks.run_tests, x, logs, seconds)) for x in checks.TESTS),
        *(
            Item(x, functools.partial(checks.run_sanitizer, x, logs, seconds))
            for x in ("memcheck", "racecheck")
        ),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--stage", type=int, choices=sorted(_SECONDS), default=1)
    add("--require-gpu", action="store_true", help="end with an error if torch finds none")
    add("--only", nargs="+", default=[], metavar="ITEM", help="of the stage")
    add(
        "--seconds",
        type=number(float, low=0, open_low=True),
        help=f"after which no item begins; by stage: {_SECONDS}",
    )
    add("--out", type=Path, help="where to write the figures, from benchmarks/")
    add("--commit", default=None, help="if the checkout has no .git")
    add("--cache", type=Path, help="folder of compiled kernels, from scripts/gpu_bundle.py")
    add("--table", type=Path, help="print a recorded file's kernels as Markdown, and no more")
    add("--run-kernels", action="store_true", help="check every kernel once, and no more")
    return parser


if __name__ == "__main__":
    sys.exit(main())
