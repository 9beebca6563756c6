"""The server on the demo's language model, with a reward function that sometimes fails.

    python benchmarks/faulty_server.py

For `faults`. About one call in 60 goes wrong, in each of the ways of `FAULTS` in turn, and about
one text in 100 has no number for a reward; which texts these are depends on nothing but the text.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

from stars_fast import Engine, StarsParams, demo
from stars_fast.server import ServerSettings
from stars_fast.server.host import EngineHost, FrontProcess
from stars_fast.server.run import run_server

#: Limits, small enough for requests to run into them.
MAX_RUNNING = 24
MAX_WAITING = 24
MAX_BODY_BYTES = 20_000
MAX_PROMPT_TOKENS = 200
REQUEST_TIMEOUT = 3.0
#: Seconds that a call of the reward function has; one that hangs takes twice as long.
REWARD_TIMEOUT = 0.5


def _raise(error: BaseException) -> None:
    raise error


#: What goes wrong with whole calls; a call may end its process, hang, or return anything.
FAULTS: tuple[Callable[[], Any], ...] = (
    lambda: _raise(ConnectionError("the reward model is away")),
    lambda: _raise(SystemExit(1)),
    lambda: time.sleep(2 * REWARD_TIMEOUT),
    lambda: _raise(KeyboardInterrupt()),
    lambda: _raise(GeneratorExit()),
    lambda: _raise(asyncio.CancelledError()),
    lambda: None,
    lambda: {"reward": 1.0},
    lambda: 1.0,
    lambda: asyncio.sleep(2 * REWARD_TIMEOUT),
    lambda: itertools.repeat(1.0),
)


class Faulty:
    """A reward function with faults."""

    def __init__(self) -> None:
        self._calls = itertools.count(1)

    def __call__(self, prompts: list[str], responses: list[str]) -> Any:  # noqa: ANN401
        """Score the texts, or do what is wrong."""
        number, rest = divmod(next(self._calls), 60)
        if rest == 0:
            return FAULTS[number % len(FAULTS)]()
        return [
            self._one(prompt + response)
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    def _one(self, text: str) -> float:
        digest = zlib.crc32(text.encode())
        return math.nan if digest % 100 == 0 else (digest >> 8) % 1000 / 1000


def main() -> int:
    """Serve until SIGTERM."""
    engine = Engine(
        str(demo.model_dir()),
        Faulty(),
        num_pages=1000,
        max_rows=64,
        reward_timeout=REWARD_TIMEOUT,
    )
    params = StarsParams(
        segment_length=8, max_tokens=24, max_attempts=4, target_reward=0.8, beta=0.1, candidates=1
    )
    settings = ServerSettings(
        "faulty",
        params,
        request_timeout=REQUEST_TIMEOUT,
        max_body_bytes=MAX_BODY_BYTES,
    )
    with FrontProcess() as front:
        running = EngineHost(
            engine,
            front,
            settings,
            "127.0.0.1",
            0,
            max_running=MAX_RUNNING,
            max_waiting=MAX_WAITING,
            max_prompt_tokens=MAX_PROMPT_TOKENS,
        )
        run_server(running)
    return 0


if __name__ == "__main__":
    sys.exit(main())
