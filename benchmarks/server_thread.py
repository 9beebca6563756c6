"""Servers on an engine of this process: all in it, or with their front in a process beside it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn

from stars_fast.engine.async_engine import AsyncEngine
from stars_fast.engine.batches import BatchEngine
from stars_fast.server import ServerSettings, create_app
from stars_fast.server.host import EngineHost, FrontProcess
from stars_fast.server.uvicorn_config import uvicorn_config

_SECONDS = 30.0
#: That a front has to start: it imports much.
_FRONT_SECONDS = 120.0


@contextmanager
def server_thread(engine: AsyncEngine, settings: ServerSettings) -> Iterator[str]:
    """Serve on a free port of 127.0.0.1; gives the address, and drains at the end.

    Raises
    ------
    RuntimeError
        If it does not start or end in time.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        app = create_app(engine, settings)
        server = uvicorn.Server(uvicorn_config(app))
        thread = threading.Thread(target=lambda: server.run([listener]))
        thread.start()
        try:
            _wait(lambda: server.started, thread.is_alive, _SECONDS)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(_SECONDS)
            engine.close(_SECONDS)
    if thread.is_alive():
        raise RuntimeError("the server did not end")


@contextmanager
def server_with_front(
    engine: BatchEngine, settings: ServerSettings, **options: Any
) -> Iterator[tuple[str, EngineHost]]:
    """Serve as `stars-fast serve`, on a thread; gives the address and the engine, and drains.

    `options` are those of `EngineHost`.

    Raises
    ------
    RuntimeError
        If it does not start or end in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = probe.getsockname()
    with FrontProcess() as front:
        running = EngineHost(engine, front, settings, *address, **options)
        drain = threading.Event()
        thread = threading.Thread(target=lambda: running.serve(drain.is_set))
        thread.start()

        def listens() -> bool:
            with suppress(OSError), socket.create_connection(address):
                return True
            return False

        try:
            _wait(listens, thread.is_alive, _FRONT_SECONDS)
            yield f"http://127.0.0.1:{address[1]}", running
        finally:
            drain.set()
            thread.join(_SECONDS)
            running.close()
    if thread.is_alive():
        raise RuntimeError("the server did not end")


def _wait(started: Callable[[], bool], lives: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not started():
        if not lives() or time.monotonic() > deadline:
            raise RuntimeError("the server did not start")
        time.sleep(0.01)
