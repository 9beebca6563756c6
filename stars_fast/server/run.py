"""The server as a process: from an engine to a port, until a signal ends it."""

from __future__ import annotations

import signal
from types import FrameType

from stars_fast.errors import EngineStoppedError
from stars_fast.server.host import EngineHost
from stars_fast.server.logs import configure_logs


class _ForcedError(Exception):
    """A second signal."""


def run_server(running: EngineHost) -> None:
    """Serve until SIGINT or SIGTERM, then drain.

    Logs go to standard error as JSON lines. To be called on the main thread, which has the signals.

    Parameters
    ----------
    running
        The engine and its front.

    Raises
    ------
    EngineStoppedError
        If the engine has stopped by itself, and the server with it, or the front has.
    KeyboardInterrupt
        It has ended by SIGINT.
    """
    configure_logs()
    signals: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        if len(signals) > 1:
            raise _ForcedError

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    code = 0
    try:
        running.serve(lambda: bool(signals))
        code = running.front.process.wait()
    except _ForcedError:
        running.front.process.kill()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        running.close()
    if running.thread.failure is not None:
        raise EngineStoppedError(f"the engine has stopped: {running.thread.failure!r}")
    if code != 0:
        raise EngineStoppedError(f"the process with the connections has ended with {code}")
    if signal.SIGINT in signals:
        raise KeyboardInterrupt
