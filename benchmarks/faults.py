"""Requests with faults of every kind: each must be answered once, and nothing may be left behind.

    python benchmarks/faults.py [--requests 20000] [--clients 64] [--out results/NAME.json]

Clients that stream, that leave in the middle or at once, bodies that are wrong in a dozen ways,
requests too long for their time or their queue, on a server whose reward function sometimes raises
or returns NaN (`faulty_server`). Few prompts and seeds are used again and again: whenever a request
succeeds, its text must be that of every other with the same prompt and seed, whatever went wrong
beside it. The function also hangs, raises what would end a process, and returns what are no
rewards: none of that may end the server. At the end nothing may run or wait, no page may be held,
each request must be in the log once, and memory must be flat over the last quarter: before that,
oneDNN compiles kernels for new shapes of batches, and keeps them.

Then what a hostile client (`hostile`) and a new user (`processes`) try, on ``stars-fast serve`` as
it comes: a table says what held. Ends with 1 and a list of what is wrong if not all did.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
from tqdm import tqdm

from stars_fast import demo
from stars_fast.benchmarks import hostile, processes
from stars_fast.benchmarks.clients import Answer, complete, many_connections, read_metrics
from stars_fast.benchmarks.faulty_server import MAX_BODY_BYTES, MAX_PROMPT_TOKENS
from stars_fast.benchmarks.flags import number
from stars_fast.benchmarks.measure import header
from stars_fast.benchmarks.served import COMMAND, Served, served

HERE = Path(__file__).resolve().parent
#: How often each kind of request is made.
KINDS = {"whole": 4, "stream": 6, "leave": 3, "vanish": 2, "slow": 1, "bad": 4}
#: What the server may answer where a body is right. 429: its queue is full; 500: no reward.
ALLOWED = {200, 429, 500, 504}
_PROMPTS = [prompt[:60] for prompt in demo.prompts(8)]
_SEEDS = 6
#: Seconds that a client stays away when the queue was full.
_BACK_OFF = 0.5
#: What is wrong with a body, and the status it must get.
BAD: list[tuple[bytes, int]] = [
    (b"{", 400),
    (b"[]", 400),
    (b'{"prompt": "a", "max_tokens": -1}', 400),
    (b'{"prompt": "a", "max_tokens": "many"}', 400),
    (b'{"prompt": ""}', 400),
    (b'{"prompt": [99999999]}', 400),
    (b'{"prompt": "a", "model": "another"}', 404),
    (b'{"prompt": "a", "stars": {"beta": -1}}', 400),
    (b'{"prompt": "a", "stars": {"colour": 1}}', 400),
    (b'{"prompt": "a", "suffix": "b"}', 400),
    (json.dumps({"prompt": "good " * (MAX_PROMPT_TOKENS + 1)}).encode(), 400),
    (b'{"prompt": "' + b"a" * MAX_BODY_BYTES + b'"}', 413),
]


@dataclass
class Findings:
    """What was seen.

    Attributes
    ----------
    statuses
        How often each status came, by kind; 0: the client left before there was one.
    errors
        How often streams ended in an error, by its first words.
    wrong
        What should not have been.
    resident
        Bytes that the server held, as requests were made.
    logged
        Ids of requests that the server must have in its log once.
    quiet
        Ids that may be there once or, as the client left at once, not at all.
    """

    statuses: dict[str, Counter[int]] = field(default_factory=lambda: {k: Counter() for k in KINDS})
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    logged: set[str] = field(default_factory=set)
    quiet: set[str] = field(default_factory=set)


class Run:
    """Makes the requests.

    Parameters
    ----------
    server
        That is loaded.
    count
        Requests.
    seed
        Of what is asked for.
    """

    def __init__(self, server: Served, count: int, seed: int) -> None:
        self._server = server
        self._count = count
        self._random = random.Random(seed)
        self._texts: dict[tuple[str, int, int], str] = {}
        self._made = 0
        self.found = Findings()

    async def run(self, clients: int) -> None:
        """Make them, `clients` at a time, and wait until the server has nothing to do."""
        with tqdm(total=self._count, unit="request", desc="requests", file=sys.stdout) as bar:
            async with many_connections() as session:
                await asyncio.gather(*(self._client(session, bar) for _ in range(clients)))
                await self._wait_until_idle(session)

    async def _client(self, session: aiohttp.ClientSession, bar: tqdm[Any]) -> None:
        while self._made < self._count:
            self._made += 1
            made = self._made  # others go on meanwhile
            if made % max(1, self._count // 200) == 0:
                self.found.resident.append(self._server.resident_bytes())
                async with session.get(f"{self._server.url}/health") as response:
                    if response.status != 200:
                        self.found.wrong.append(f"/health answered {response.status}")
            kind = self._random.choices(list(KINDS), list(KINDS.values()))[0]
            await self._request(session, kind, f"{kind}-{made}")
            bar.update()

    async def _request(self, session: aiohttp.ClientSession, kind: str, name: str) -> None:
        found = self.found
        if kind == "bad":
            body, wanted = self._random.choice(BAD)
            answer = await complete(session, self._server.url, body, request_id=name)
            found.statuses[kind][answer.status] += 1
            if answer.status not in (wanted, 429) or answer.error is None:
                found.wrong.append(f"{body[:60]!r} got {answer.status}, not {wanted}")
            return
        key = (
            self._random.choice(_PROMPTS),
            self._random.randrange(_SEEDS),
            450 if kind == "slow" else 24,
        )
        content: dict[str, Any] = dict(zip(("prompt", "seed", "max_tokens"), key, strict=True))
        content["stream"] = kind != "whole"
        leave_after = 1 if kind == "leave" else None
        try:
            if kind == "vanish":
                found.quiet.add(name)
                patience = self._random.random() * 0.05
                async with asyncio.timeout(patience):
                    await complete(session, self._server.url, content, request_id=name)
                return
            found.logged.add(name)
            answer = await complete(
                session, self._server.url, content, request_id=name, leave_after=leave_after
            )
        except TimeoutError:
            found.statuses[kind][0] += 1
            return
        except aiohttp.ClientError as error:
            found.wrong.append(f"{name}: {type(error).__name__}: {error}")
            return
        self._judge(kind, name, key, answer)
        if answer.status == 429:
            await asyncio.sleep(_BACK_OFF)

    def _judge(self, kind: str, name: str, key: tuple[str, int, int], answer: Answer) -> None:
        found = self.found
        found.statuses[kind][answer.status] += 1
        if answer.status not in ALLOWED:
            found.wrong.append(f"{name}: {answer.status}: {answer.error}")
            return
        if answer.error is not None:
            found.errors[str(answer.error["message"])[:60]] += 1
        if answer.status == 429 and not answer.headers.get("Retry-After", "").isdecimal():
            found.wrong.append(f"{name}: 429 without Retry-After")
        if kind == "leave":
            return
        if not answer.complete:
            found.wrong.append(f"{name}: the answer ends in the middle")
        if answer.status == 200 and answer.error is None:
            known = self._texts.setdefault(key, answer.text)
            if known != answer.text:
                found.wrong.append(f"{name}: {answer.text!r}, and before {known!r}")

    async def _wait_until_idle(self, session: aiohttp.ClientSession) -> None:
        deadline = time.monotonic() + 30
        while True:
            async with session.get(f"{self._server.url}/metrics") as response:
                values = read_metrics(await response.text())
            names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            busy = {name: values[f"stars:{name}"] for name in names if values[f"stars:{name}"]}
            if not busy:
                return
            if time.monotonic() > deadline:
                self.found.wrong.append(f"left behind: {busy}")
                return
            await asyncio.sleep(0.1)


def check_log(text: str, found: Findings) -> None:
    """Every request that was taken has one line, and no line is of a fault of the server's."""
    events = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    times = Counter(e["request_id"] for e in events if e["event"] == "request")
    for name in found.logged:
        if times[name] != 1:
            found.wrong.append(f"{name} is in the log {times[name]} times")
    for name in found.quiet:
        if times[name] > 1:
            found.wrong.append(f"{name} is in the log {times[name]} times")
    found.wrong += [f"in the log: {e['exception'][-200:]}" for e in events if "exception" in e]
    found.wrong += [f"in the log: {line}" for line in text.splitlines() if "Traceback" in line]


def tried(folder: Path) -> dict[str, str | None]:
    """Return why each row did not hold, None where it did."""
    log = folder / "served.log"
    body = {"prompt": "The film", "max_tokens": 48, "seed": 1}
    with served([*COMMAND, "--port", "0"], log) as server:
        found = hostile.attack(hostile.Target(server.url, body))
    for name, row in processes.ROWS.items():
        own = Path(tempfile.mkdtemp(dir=folder))
        found[name] = hostile.why(partial(row, own))
    return found


def growth(resident: Sequence[int]) -> float:
    """Bytes that memory grew by over the last quarter, along the line through it."""
    late = np.asarray(resident[-(len(resident) // 4) :], float)
    return float(np.polyfit(np.arange(len(late)), late, 1)[0] * len(late)) if len(late) > 1 else 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print what was found, write it if asked to; 0 if nothing is wrong."""
    options = _parser().parse_args(arguments)
    command = ["python benchmarks/faults.py", *(sys.argv[1:] if arguments is None else arguments)]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log = (options.log or Path(folder) / "log").resolve()
        server_command = [sys.executable, str(HERE / "faulty_server.py")]
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        with served(server_command, log, threads) as server:
            run = Run(server, options.requests, options.seed)
            asyncio.run(run.run(options.clients))
        found = run.found
        check_log(log.read_text(encoding="utf-8"), found)
        rows = {} if options.load_only else tried(Path(folder))
    megabytes = growth(found.resident) / 2**20
    if megabytes > options.max_growth:
        found.wrong.append(f"memory grew by {megabytes:.1f} MiB")
    for kind, statuses in found.statuses.items():
        print(f"{kind:<8}", ", ".join(f"{s}: {n}" for s, n in sorted(statuses.items())))
    print("errors  ", ", ".join(f"{n} x {text}" for text, n in found.errors.most_common()))
    first, last = found.resident[0] / 2**20, found.resident[-1] / 2**20
    print(
        f"memory   {first:.0f} MiB first, {last:.0f} last, {megabytes:+.1f} over the last quarter"
    )
    for name, why in rows.items():
        print(f"{'held' if why is None else 'FAILED':<8} {name}{'' if why is None else f': {why}'}")
        if why is not None:
            found.wrong.append(f"{name}: {why}")
    if options.out is not None:
        record = {
            **header(" ".join(command), torch.device("cpu")),
            "requests": options.requests,
            "seconds": time.monotonic() - begun,
            "statuses": {kind: dict(sorted(x.items())) for kind, x in found.statuses.items()},
            "errors": dict(found.errors),
            "resident_mib": [round(x / 2**20, 1) for x in found.resident],
            "growth_mib": megabytes,
            "rows": rows,
            "wrong": found.wrong,
        }
        (HERE / options.out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for line in found.wrong[:50]:
        print("WRONG   ", line)
    print(f"{len(found.wrong)} wrong of {options.requests} requests")
    return 1 if found.wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--requests", type=number(int, low=1), default=20_000)
    add("--clients", type=number(int, low=1), default=64, help="at a time")
    add("--seed", type=number(int, low=0), default=0, help="of what is asked for")
    add("--max-growth", type=number(float, low=0), default=8.0, help="of memory, in MiB")
    add("--load-only", action="store_true", help="not what hostile clients and new users try")
    add("--log", type=Path, help="where the server's log stays")
    add("--out", type=Path, help="where to write what was found, from benchmarks/")
    return parser


if __name__ == "__main__":
    sys.exit(main())
