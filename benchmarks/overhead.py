"""What the server costs over the bare engine: the same requests through both, in one process.

    python benchmarks/overhead.py [--requests 512] [--rows 64] [--repeats 5] [--shape SMALL] ...

All requests are there at once, many more than the engine has rows for, so it is saturated on both
sides. `Engine.generate` takes them as a list; the server, on the same engine, streams them over
HTTP to clients in a process of their own. The two take turns; texts must be the same. Torch has one
thread unless OMP_NUM_THREADS says otherwise, so that on two cores the clients have one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import numpy as np
import torch

from stars_fast import Engine, RequestOutput, StarsParams, demo
from stars_fast.benchmarks import models
from stars_fast.benchmarks.flags import number
from stars_fast.benchmarks.measure import header
from stars_fast.benchmarks.server_thread import server_thread
from stars_fast.demo.openings import HELD_OUT
from stars_fast.engine.async_engine import AsyncEngine
from stars_fast.server import ServerSettings

HERE = Path(__file__).resolve().parent
SHAPES = ("demo", *(name for name, x in vars(models).items() if isinstance(x, models.Shape)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the record if asked to."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    engine, prompts, params = _setting(options)
    each = [replace(params, seed=i) for i in range(options.requests)]
    bare: list[float] = []
    served: list[float] = []
    outputs: list[RequestOutput] = []
    with _clients() as clients:
        for repeat in range(options.repeats + 1):
            begun = time.perf_counter()
            outputs = engine.generate(prompts, each, use_tqdm=False)
            bare.append(time.perf_counter() - begun)
            seconds, texts = _serve(engine, clients, prompts, params)
            served.append(seconds)
            if texts != [output.outputs[0].text for output in outputs]:
                raise SystemExit("the server's texts are not the engine's")
            print(f"engine {bare[-1]:.2f} s, server {seconds:.2f} s", flush=True)
            if repeat == 0:
                bare.clear()
                served.clear()  # that was to warm up
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    segments = sum(len(output.outputs[0].segments) for output in outputs)
    overheads = [b / a - 1 for a, b in zip(bare, served, strict=True)]
    overhead = float(np.median(overheads))
    print(
        f"{options.shape}, {options.requests} requests, {tokens} tokens in {segments} segments: "
        f"engine {tokens / np.median(bare):.0f} tokens/s, server {tokens / np.median(served):.0f}: "
        f"overhead {overhead:.1%} (median of {min(overheads):.1%} to {max(overheads):.1%})"
    )
    if options.out is not None:
        record = {
            **header(" ".join(["python benchmarks/overhead.py", *given]), torch.device("cpu")),
            "shape": options.shape,
            "requests": options.requests,
            "rows": options.rows,
            "tokens": tokens,
            "segments": segments,
            "engine_seconds": bare,
            "server_seconds": served,
            "overhead": overhead,
        }
        (HERE / options.out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def _setting(options: argparse.Namespace) -> tuple[Engine, list[Any], StarsParams]:
    """The engine, its prompts, and parameters with a target that about half the attempts reach."""
    params = StarsParams(
        segment_length=options.segment_length, max_tokens=options.max_tokens, ignore_eos=True
    )
    if options.shape == "demo":
        engine = Engine.demo(max_rows=options.rows)
        held_out = demo.prompts(min(options.requests, HELD_OUT))
        prompts: list[Any] = list(islice(cycle(held_out), options.requests))
    else:
        shape = getattr(models, options.shape)
        engine = models.id_engine(
            models.language_model(shape),
            models.reward_model(shape),
            shape,
            max_rows=options.rows,
        )
        prompts = models.prompts(shape, options.requests, 32, 64)
    found = engine.calibrate(prompts[:16], 0.5, params=params, use_tqdm=False)
    return engine, prompts, replace(params, target_reward=found.target_reward, alpha=1.0)


def _serve(
    engine: Engine, clients: subprocess.Popen[str], prompts: list[Any], params: StarsParams
) -> tuple[float, list[str]]:
    """Run the requests through a server on this engine; the seconds, as the clients saw them."""
    running = AsyncEngine(engine, max_running=len(prompts))
    with server_thread(running, ServerSettings("bench", params)) as url:
        assert clients.stdin is not None
        assert clients.stdout is not None
        clients.stdin.write(json.dumps({"url": url, "prompts": prompts}) + "\n")
        clients.stdin.flush()
        answer = json.loads(clients.stdout.readline())
    return answer["seconds"], answer["texts"]


@contextmanager
def _clients() -> Iterator[subprocess.Popen[str]]:
    """The process that the clients are in; it reads tasks from its input."""
    command = [sys.executable, str(HERE / "clients.py")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="demo", help="of the models; demo: those it ships with")
    add("--requests", type=number(int, low=1), default=512)
    add("--rows", type=number(int, low=1), default=64, help="candidates in a round at most")
    add("--segment-length", type=number(int, low=1), default=16, help="K")
    add("--max-tokens", type=number(int, low=1), default=64, help="M")
    add("--repeats", type=number(int, low=1), default=5)
    add("--out", type=Path, help="where to write the figures, from benchmarks/")
    return parser


if __name__ == "__main__":
    sys.exit(main())
