"""The server under load: latency against the load that is offered, and a crowd of streams at once.

    python benchmarks/load.py [--requests 200] [--clients 1000] [--out results/NAME.json] [-- FLAGS]

Starts ``stars-fast serve`` with FLAGS (none: the demo's models) and streams from it:

- closed: as many clients as the server runs at once, each with the next request when one is done.
  What they get through is the server's saturation.
- open: requests arrive at random (Poisson), at parts of the saturation. A request's latency counts
  from when it was due, so a server that falls behind shows it.
- crowd: `--clients` streams that are opened at once; every one has to come to its end.

Prompts are the demo's, seeds differ. The clients share the machine with the server.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from stars_fast import demo
from stars_fast.benchmarks.clients import Answer, complete, many_connections
from stars_fast.benchmarks.flags import number
from stars_fast.benchmarks.measure import header, percentiles
from stars_fast.benchmarks.served import COMMAND, Served, served

HERE = Path(__file__).resolve().parent
#: Of times, in percent.
QUANTILES = (50, 95, 99)
#: Of the saturation.
PARTS = (0.25, 0.5, 0.75, 0.9, 1.1)


class Load:
    """Streams from a server.

    Parameters
    ----------
    server
        That is loaded.
    max_tokens
        Of each request.
    """

    def __init__(self, server: Served, max_tokens: int) -> None:
        self._url = server.url
        self._max_tokens = max_tokens
        self._prompts = itertools.cycle(demo.prompts(64))
        self._seeds = itertools.count()

    async def closed(self, count: int, clients: int) -> dict[str, Any]:
        """Have `clients` clients make `count` requests one after the other."""
        left = iter(range(count))

        async def client(one: Callable[[], Coroutine[Any, Any, Answer]]) -> list[Answer]:
            return [await one() for _ in left]

        return await self._run(
            f"closed, {clients} clients",
            count,
            lambda one: asyncio.gather(*(client(one) for _ in range(clients))),
        )

    async def open(self, count: int, rate: float) -> dict[str, Any]:
        """Have `count` requests arrive at random, `rate` a second."""
        arrivals = random.Random(0)

        async def all_of(
            one: Callable[[], Coroutine[Any, Any, Answer]],
        ) -> list[list[Answer]]:
            tasks, due = [], time.perf_counter()
            for _ in range(count):
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                tasks.append(asyncio.create_task(_since(due, one)))
                due += arrivals.expovariate(rate)
            return [list(await asyncio.gather(*tasks))]

        found = await self._run(f"open, {rate:.3g} a second", count, all_of)
        return {"offered_per_second": rate, **found}

    async def crowd(self, clients: int) -> dict[str, Any]:
        """Open `clients` streams at once."""

        async def all_of(
            one: Callable[[], Coroutine[Any, Any, Answer]],
        ) -> list[list[Answer]]:
            return [list(await asyncio.gather(*(one() for _ in range(clients))))]

        return await self._run(f"{clients} streams", clients, all_of)

    async def _run(
        self,
        name: str,
        count: int,
        all_of: Callable[[Callable[[], Coroutine[Any, Any, Answer]]], Any],
    ) -> dict[str, Any]:
        with tqdm(total=count, unit="request", desc=name, file=sys.stdout) as bar:
            async with many_connections() as session:

                async def one() -> Answer:
                    body = {
                        "prompt": next(self._prompts),
                        "seed": next(self._seeds),
                        "max_tokens": self._max_tokens,
                        "stream": True,
                        "stream_options": {"include_usage": True},
                    }
                    answer = await complete(session, self._url, body)
                    bar.update()
                    return answer

                begun = time.perf_counter()
                answers = list(itertools.chain.from_iterable(await all_of(one)))
                seconds = time.perf_counter() - begun
        return summary(answers, seconds)


async def _since(due: float, one: Callable[[], Coroutine[Any, Any, Answer]]) -> Answer:
    """Make a request, with its times counted from when it was due."""
    late = time.perf_counter() - due
    answer = await one()
    answer.chunks = [seconds + late for seconds in answer.chunks]
    answer.seconds += late
    return answer


def summary(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Return rates, and percentiles of the times of requests that came to their end."""
    good = [a for a in answers if a.status == 200 and a.complete and a.error is None]
    refused = sum(answer.status == 429 for answer in answers)
    return {
        "requests": len(answers),
        "complete": len(good),
        "refused": refused,
        "failed": len(answers) - len(good) - refused,
        "seconds": seconds,
        "requests_per_second": len(good) / seconds,
        "tokens_per_second": sum(answer.tokens for answer in good) / seconds,
        "first_segment": percentiles([a.chunks[0] for a in good if a.chunks], QUANTILES),
        "latency": percentiles([a.seconds for a in good], QUANTILES),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write the record if asked to; 1 if a request failed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    flags = [flag for flag in options.flags if flag != "--"]
    if not flags:
        flags = ["--max-running", "32", "--max-waiting", str(max(1000, options.clients))]
        flags += ["--target-reward", "auto", "--segment-length", "16"]
    with tempfile.TemporaryDirectory() as folder:
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        command = [*COMMAND, "--port", "0", *flags]
        with served(command, Path(folder) / "log", threads) as server:
            found = asyncio.run(_measure(Load(server, options.max_tokens), options))
    runs = [found["closed"], *found["open"], found["crowd"]]
    for run in runs:
        print(_line(run))
    failed = sum(run["failed"] for run in runs)
    if failed:
        print(f"{failed} requests failed")
    if options.out is not None:
        words = " ".join(["python benchmarks/load.py", *given])
        record = {**header(words, torch.device("cpu")), "flags": flags, "load": found}
        (HERE / options.out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


async def _measure(load: Load, options: argparse.Namespace) -> dict[str, Any]:
    await load.closed(options.together, options.together)  # warm
    closed = await load.closed(options.requests, options.together)
    rate = closed["requests_per_second"]
    opened = [
        {"part": part, **await load.open(options.requests, part * rate)} for part in options.parts
    ]
    return {"closed": closed, "open": opened, "crowd": await load.crowd(options.clients)}


def _line(run: dict[str, Any]) -> str:
    def times(name: str) -> str:
        return "/".join(f"{seconds:.2f}" for seconds in run[name].values())

    offered = run.get("offered_per_second")
    return (
        f"{run['requests']} requests"
        + ("" if offered is None else f" at {offered:.2f}/s")
        + f": {run['complete']} complete, {run['refused']} refused, {run['failed']} failed, "
        f"{run['requests_per_second']:.2f}/s, {run['tokens_per_second']:.0f} tokens/s, "
        f"first segment {times('first_segment')} s, whole {times('latency')} s (p50/p95/p99)"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--requests", type=number(int, low=1), default=200, help="of the closed and each open run")
    add("--together", type=number(int, low=1), default=32, help="clients of the closed run")
    add("--clients", type=number(int, low=1), default=1000, help="streams of the crowd")
    add("--max-tokens", type=number(int, low=1), default=64, help="of each request")
    add("--parts", type=number(float, low=0, open_low=True), nargs="*", default=PARTS)
    add("--out", type=Path, help="where to write the figures, from benchmarks/")
    add("flags", nargs="*", help="of stars-fast serve, behind --")
    return parser


if __name__ == "__main__":
    sys.exit(main())
