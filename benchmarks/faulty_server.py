"""The server on the demo's language model, with a reward function that sometimes fails.

    python benchmarks/faulty_server.py

For `faults`. About one call in 200 raises, and about one text in 100 has no number for a reward;
which texts these are depends on nothing but the text.
"""

from __future__ import annotations

import itertools
import math
import sys
import zlib

from stars_fast import Engine, StarsParams, demo
from stars_fast.engine.async_engine import AsyncEngine
from stars_fast.server import ServerSettings
from stars_fast.server.run import run_server

#: Limits, small enough for requests to run into them.
MAX_RUNNING = 24
MAX_WAITING = 24
MAX_BODY_BYTES = 20_000
MAX_PROMPT_TOKENS = 200
REQUEST_TIMEOUT = 3.0


class Faulty:
    """A reward function with faults."""

    def __init__(self) -> None:
        self._calls = itertools.count(1)

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        """Score the texts, or raise."""
        if next(self._calls) % 200 == 0:
            raise ConnectionError("the reward model is away")
        return [
            self._one(prompt + response)
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    def _one(self, text: str) -> float:
        digest = zlib.crc32(text.encode())
        return math.nan if digest % 100 == 0 else (digest >> 8) % 1000 / 1000


def main() -> int:
    """Serve until SIGTERM."""
    engine = Engine(str(demo.model_dir()), Faulty(), num_pages=1000, max_rows=64)
    params = StarsParams(
        segment_length=8, max_tokens=24, max_attempts=4, target_reward=0.8, beta=0.1, candidates=1
    )
    settings = ServerSettings(
        "faulty",
        params,
        request_timeout=REQUEST_TIMEOUT,
        max_body_bytes=MAX_BODY_BYTES,
    )
    running = AsyncEngine(
        engine,
        max_running=MAX_RUNNING,
        max_waiting=MAX_WAITING,
        max_prompt_tokens=MAX_PROMPT_TOKENS,
    )
    run_server(running, settings, "127.0.0.1", 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
