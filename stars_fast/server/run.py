"""The server as a process: from an engine to a port, until a signal ends it."""

from __future__ import annotations

import asyncio
import importlib.util
import signal
import socket
from types import FrameType
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI

from stars_fast.engine.async_engine import AsyncEngine
from stars_fast.errors import EngineStoppedError
from stars_fast.server.app import create_app
from stars_fast.server.logs import configure_logs
from stars_fast.server.settings import ServerSettings

#: Seconds that connections have to take the last answers, once the engine has drained.
_LAST_SECONDS = 5


def uvicorn_config(app: FastAPI, **options: Any) -> uvicorn.Config:
    """Return how uvicorn serves the application: no web sockets, and requests that end.

    Without httptools its protocol is h11's, whose heads are limited too.
    """
    http: type[asyncio.Protocol] | Literal["auto"] = "auto"
    if importlib.util.find_spec("httptools") is not None:
        from stars_fast.server.connection import Connection

        http = Connection
    return uvicorn.Config(app, http=http, ws="none", log_config=None, access_log=False, **options)


class DrainingServer(uvicorn.Server):
    """A server that goes on answering until its engine has drained.

    So load balancers see /ready change, new requests get a 503 in JSON, and a stream whose time is
    over ends with an error event; uvicorn alone closes the port at once, and then the connections.

    Parameters
    ----------
    config
        Of the server.
    engine, drain_timeout
        What drains, and its seconds.
    """

    def __init__(self, config: uvicorn.Config, engine: AsyncEngine, drain_timeout: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_timeout = drain_timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drains = False
        self._drained: asyncio.Future[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal; at the second, end."""
        if self._loop is None or self._drains:
            super().handle_exit(sig, frame)
            self.force_exit = True
            return
        self._drains = True
        self._captured_signals.append(sig)
        self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        self._drained = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        await self._engine.drain(self._drain_timeout)
        self.should_exit = True


def run_server(engine: AsyncEngine, settings: ServerSettings, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM, then drain.

    Logs go to standard error as JSON lines. To be called on the main thread, which has the signals.

    Parameters
    ----------
    engine
        Whose server this is.
    settings
        Of the server.
    host, port
        To listen at; port 0 is any free one, which the log names.

    Raises
    ------
    EngineStoppedError
        If the engine has stopped by itself, and the server with it.
    """
    configure_logs()
    app = create_app(engine, settings)
    config = uvicorn_config(app, host=host, port=port, timeout_graceful_shutdown=_LAST_SECONDS)
    server = DrainingServer(config, engine, settings.drain_timeout)
    app.state.metrics.connections = lambda: len(server.server_state.connections)
    # Uvicorn raises the signal again when it has drained; that is not to end the process halfway.
    signal.signal(signal.SIGTERM, lambda *_: None)
    engine.call_when_ended(lambda: setattr(server, "should_exit", True))
    server.run()
    if engine.failure is not None:
        raise EngineStoppedError(f"the engine has stopped: {engine.failure!r}")
