"""A server on a free port, over the model of four letters, and how tests talk to it.

Import it after the packages of the extras server and test were found to be installed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
from helpers.gate import Gate
from helpers.tiny_lm import letter_model, letter_tokenizer

from stars_fast import Engine, StarsParams
from stars_fast.benchmarks.clients import read_metrics
from stars_fast.benchmarks.server_thread import server_thread, server_with_front
from stars_fast.engine.async_engine import AsyncEngine
from stars_fast.engine.engine_thread import EngineThread
from stars_fast.server import ServerSettings

PARAMS = StarsParams(
    segment_length=4,
    max_tokens=12,
    max_attempts=3,
    target_reward=0.5,
    temperature=1.0,
    top_k=0,
    ignore_eos=True,
)


@dataclass
class Served:
    """A running server."""

    url: str
    engine: EngineThread[Any]
    gate: Gate
    clients: list[openai.OpenAI] = field(default_factory=list)

    def client(self, **options: Any) -> openai.OpenAI:
        settings = {"api_key": "none", "max_retries": 0, "timeout": 60.0}
        self.clients.append(openai.OpenAI(base_url=f"{self.url}/v1", **(settings | options)))
        return self.clients[-1]

    def post(self, body: dict[str, Any], path: str = "/v1/completions") -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60)

    def metrics(self) -> dict[str, float]:
        return read_metrics(httpx.get(f"{self.url}/metrics").text)

    def idle(self) -> bool:
        busy = self.engine.num_running + self.engine.num_waiting
        return busy == 0 and self.engine.stats()["pages_used"] == 0


@contextmanager
def serving(
    engine: Engine,
    gate: Gate,
    settings: ServerSettings | None = None,
    *,
    front: bool = False,
    **options: Any,
) -> Iterator[Served]:
    """Serve on a thread; with `front`, which takes longer to start, as `stars-fast serve` does."""
    settings = settings or ServerSettings("letters", PARAMS)
    with contextlib.ExitStack() as stack:
        running: EngineThread[Any]
        if front:
            url, host = stack.enter_context(server_with_front(engine, settings, **options))
            running = host.thread
        else:
            running = own = AsyncEngine(engine, **options)
            url = stack.enter_context(server_thread(own, settings))
        served = Served(url, running, gate)
        try:
            yield served
        finally:
            gate.open.set()
            for client in served.clients:
                client.close()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def letter_engine(gate: Gate, **options: Any) -> Engine:
    settings: dict[str, Any] = {"num_pages": 400, "page_size": 4, "max_rows": 8}
    return Engine(letter_model(), gate, tokenizer=letter_tokenizer(), **(settings | options))
