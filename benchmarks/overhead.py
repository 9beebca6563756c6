"""What the server costs over the bare engine: the same requests through both, in turn.

    python benchmarks/overhead.py [--requests 512] [--rows 64] [--repeats 5] [--shape SMALL] ...

All requests are there at once, many more than the engine has rows for, so it is saturated on both
sides. `Engine.generate` takes them as a list; a server on the same engine streams them over HTTP to
clients in a process of their own: as `stars-fast serve` does, with its front in a process beside
the engine's, and as applications do that have all in one process. Then requests come one at a time,
and the time to the first segment is taken on all sides. Texts must be the same. Torch has one
thread unless OMP_NUM_THREADS says otherwise, so that on two cores the clients have one.

Beside the times, which a busy machine moves, stand the seconds of a core that the engine's process
and the front have used.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import numpy as np
import psutil
import torch

from stars_fast import Engine, StarsParams, demo
from stars_fast.benchmarks import models
from stars_fast.benchmarks.flags import number
from stars_fast.benchmarks.measure import header
from stars_fast.benchmarks.server_thread import server_thread, server_with_front
from stars_fast.demo.openings import HELD_OUT
from stars_fast.engine.async_engine import AsyncEngine
from stars_fast.engine.batches import BatchEngine
from stars_fast.server import ServerSettings

HERE = Path(__file__).resolve().parent
SHAPES = ("demo", *(name for name, x in vars(models).items() if isinstance(x, models.Shape)))

#: Seconds, texts, and the seconds to each first segment.
Results = tuple[float, list[str], list[float]]


@dataclass
class Way:
    """A way that the requests take.

    Attributes
    ----------
    run
        Runs prompts, at once or one after the other; gives seconds, texts, and the seconds to the
        first segments.
    front
        A process that works beside this one.
    seconds, cpu_seconds, front_cpu_seconds
        Of each run with all requests at once: by the clock, and those of a core that this process
        and the front have used.
    first_seconds
        To the first segment of each request that came alone.
    """

    run: Callable[[list[Any], bool], Results]
    front: psutil.Process | None = None
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    front_cpu_seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)

    def saturate(self, prompts: list[Any]) -> list[str]:
        """Run the prompts at once; the texts."""
        own, front = time.process_time(), self._front_cpu()
        seconds, texts, _ = self.run(prompts, True)
        self.seconds.append(seconds)
        self.cpu_seconds.append(time.process_time() - own)
        self.front_cpu_seconds.append(self._front_cpu() - front)
        return texts

    def one_by_one(self, prompts: list[Any]) -> list[str]:
        """Run the prompts one after the other; the texts."""
        _, texts, firsts = self.run(prompts, False)
        self.first_seconds += firsts
        return texts

    def _front_cpu(self) -> float:
        if self.front is None:
            return 0.0
        times = self.front.cpu_times()
        return float(times.user + times.system)

    def record(self, bare: Way, requests: int) -> dict[str, Any]:
        """Return what it cost over the bare engine; CPU seconds are those of a request."""
        overheads = [b / a - 1 for a, b in zip(bare.seconds, self.seconds, strict=True)]
        more = [b - a for a, b in zip(bare.cpu_seconds, self.cpu_seconds, strict=True)]
        return {
            "seconds": self.seconds,
            "overhead": float(np.median(overheads)),
            "overheads": [min(overheads), max(overheads)],
            "more_cpu_seconds": float(np.median(more)) / requests,
            "front_cpu_seconds": float(np.median(self.front_cpu_seconds)) / requests,
            "first_segment": float(np.median(self.first_seconds)),
            "first_segment_ratio": float(
                np.median(self.first_seconds) / np.median(bare.first_seconds)
            ),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the record if asked to."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    engine, prompts, params = _setting(options)
    alone = list(islice(cycle(prompts), options.alone))
    settings = ServerSettings("bench", params)
    with ExitStack() as stack:
        clients = stack.enter_context(_clients())
        room = {"max_running": len(prompts)}
        front_url, hosted = stack.enter_context(server_with_front(engine, settings, **room))
        thread_url = stack.enter_context(server_thread(AsyncEngine(engine, **room), settings))

        def bare(prompts: list[Any], at_once: bool) -> Results:
            # Where the server's rounds run, too; between requests its thread only waits.
            return hosted.thread.ask(lambda e: _generate(e, prompts, params, at_once)).result()

        ways = {
            "engine": Way(bare),
            "front": Way(
                lambda *task: _streamed(clients, front_url, *task),
                psutil.Process(hosted.front.process.pid),
            ),
            "thread": Way(lambda *task: _streamed(clients, thread_url, *task)),
        }
        for repeat in range(options.repeats + 1):
            _same({name: way.saturate(prompts) for name, way in ways.items()})
            took = (f"{name} {way.seconds[-1]:.2f} s" for name, way in ways.items())
            print(", ".join(took), flush=True)
            _same({name: way.one_by_one(alone) for name, way in ways.items()})
            if repeat == 0:  # that was to warm up
                for way in ways.values():
                    for times in (way.seconds, way.cpu_seconds, way.front_cpu_seconds):
                        times.clear()
                    way.first_seconds.clear()
    engine_way = ways.pop("engine")
    found = {name: way.record(engine_way, len(prompts)) for name, way in ways.items()}
    bare_cpu = float(np.median(engine_way.cpu_seconds)) / len(prompts)
    first = float(np.median(engine_way.first_seconds))
    print(
        f"{options.shape}, {len(prompts)} requests: engine {np.median(engine_way.seconds):.2f} s, "
        f"{1e3 * bare_cpu:.2f} ms of a core each; alone {1e3 * first:.1f} ms to the first segment"
    )
    for name, one in found.items():
        low, high = one["overheads"]
        print(
            f"{name}: overhead {one['overhead']:.1%} ({low:.1%} to {high:.1%}); in the engine's "
            f"process {1e3 * one['more_cpu_seconds']:+.2f} ms of a core each "
            f"({one['more_cpu_seconds'] / bare_cpu:+.1%}), in the front "
            f"{1e3 * one['front_cpu_seconds']:.2f} ms; first segment "
            f"x {one['first_segment_ratio']:.2f}"
        )
    if options.out is not None:
        record = {
            **header(" ".join(["python benchmarks/overhead.py", *given]), torch.device("cpu")),
            "shape": options.shape,
            "requests": len(prompts),
            "rows": options.rows,
            "tokens": len(prompts) * options.max_tokens,
            "engine_seconds": engine_way.seconds,
            "engine_cpu_seconds": bare_cpu,
            "engine_first_segment": first,
            **found,
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


def _generate(
    engine: BatchEngine,
    prompts: list[Any],
    params: StarsParams,
    at_once: bool,
) -> Results:
    """Run the prompts without a server."""
    each = [replace(params, seed=i) for i in range(len(prompts))]
    texts: list[str] = []
    firsts: list[float] = []
    begun = time.perf_counter()
    if at_once:
        outputs = engine.generate(prompts, each, use_tqdm=False)
        texts = [output.outputs[0].text for output in outputs]
        return time.perf_counter() - begun, texts, firsts
    for prompt, one in zip(prompts, each, strict=True):
        begun_alone = time.perf_counter()
        engine.add_request("alone", prompt, one)
        seen = False
        while engine.has_unfinished():
            for output in engine.step():
                if not seen:
                    firsts.append(time.perf_counter() - begun_alone)
                seen = True
                if output.finished:
                    texts.append(output.outputs[0].text)
    return time.perf_counter() - begun, texts, firsts


def _streamed(
    clients: subprocess.Popen[str],
    url: str,
    prompts: list[Any],
    at_once: bool,
) -> Results:
    """Run the prompts through a server; all as the clients saw it."""
    assert clients.stdin is not None
    assert clients.stdout is not None
    clients.stdin.write(json.dumps({"url": url, "prompts": prompts, "at_once": at_once}) + "\n")
    clients.stdin.flush()
    answer = json.loads(clients.stdout.readline())
    return answer["seconds"], answer["texts"], answer["firsts"]


def _same(texts: dict[str, list[str]]) -> None:
    for name, found in texts.items():
        if found != texts["engine"]:
            raise SystemExit(f"the texts of {name} are not the engine's")


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
    add("--alone", type=number(int, low=1), default=20, help="requests that come one at a time")
    add("--repeats", type=number(int, low=1), default=5)
    add("--out", type=Path, help="where to write the figures, from benchmarks/")
    return parser


if __name__ == "__main__":
    sys.exit(main())
