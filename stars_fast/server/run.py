"""The server as a process: from an engine to a port, until a signal ends it."""

from __future__ import annotations

import asyncio
import importlib.util
import math
import signal
from typing import Literal

import uvicorn

from stars_fast.engine.async_engine import AsyncEngine
from stars_fast.errors import EngineStoppedError
from stars_fast.server.app import create_app
from stars_fast.server.logs import configure_logs
from stars_fast.server.settings import ServerSettings


def http_protocol() -> type[asyncio.Protocol] | Literal["auto"]:
    """Return uvicorn's ``http``; without httptools that is h11, whose heads are limited."""
    if importlib.util.find_spec("httptools") is None:
        return "auto"
    from stars_fast.server.head_limit import LimitedHead

    return LimitedHead


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
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(engine, settings),
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            http=http_protocol(),
            timeout_graceful_shutdown=math.ceil(settings.drain_timeout),
        )
    )
    # Uvicorn raises the signal again when it has drained; that is not to end the process halfway.
    signal.signal(signal.SIGTERM, lambda *_: None)
    engine.call_when_ended(lambda: setattr(server, "should_exit", True))
    server.run()
    if engine.failure is not None:
        raise EngineStoppedError(f"the engine has stopped: {engine.failure!r}")
