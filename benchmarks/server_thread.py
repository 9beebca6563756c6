"""A server on a thread of this process, for what has to be in one process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from stars_fast.engine.async_engine import AsyncEngine
from stars_fast.server import ServerSettings, create_app
from stars_fast.server.run import uvicorn_config

_SECONDS = 30.0


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
            deadline = time.monotonic() + _SECONDS
            while not server.started:
                if not thread.is_alive() or time.monotonic() > deadline:
                    raise RuntimeError("the server did not start")
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(_SECONDS)
            engine.close(_SECONDS)
    if thread.is_alive():
        raise RuntimeError("the server did not end")
