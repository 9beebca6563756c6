"""Our own server over the model of four letters, for engines whose model is there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

Connect = Callable[..., Any]


@pytest.fixture(scope="package")
def letters() -> Iterator[Any]:
    """A running server, `helpers.serving.Served`."""
    for package in ("fastapi", "uvicorn", "prometheus_client", "httpx", "openai"):
        pytest.importorskip(package, reason=f"needs {package}, of the extras server and test")
    from helpers.letter_law import letter_engine
    from helpers.serving import Gate, serving

    engine = letter_engine(reward=None, max_rows=256)
    with serving(engine, Gate(), max_running=256, max_waiting=1024) as served:
        yield served


@pytest.fixture
def connect(letters: Any) -> Iterator[Connect]:
    """Makes engines on that server; by tokens with ``tokens=True``, else by text."""
    from helpers.letter_law import reward_model
    from helpers.tiny_lm import letter_tokenizer

    from stars_fast import RemoteEngine

    with contextlib.ExitStack() as engines:

        def connected(*, tokens: bool, **options: Any) -> RemoteEngine:
            options = {"reward_model": reward_model, "retries": 0} | options
            tokenizer = letter_tokenizer() if tokens else None
            engine = RemoteEngine(f"{letters.url}/v1", tokenizer=tokenizer, **options)
            return engines.enter_context(engine)

        yield connected
