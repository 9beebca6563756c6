"""Another program on the machine, which keeps one core busy at times."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Neighbour:
    """A process that computes while `busy`, and is stopped otherwise; for POSIX systems."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        self._send(signal.SIGSTOP)

    def __enter__(self) -> Neighbour:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Let it compute for the time of the block."""
        self._send(signal.SIGCONT)
        try:
            yield
        finally:
            self._send(signal.SIGSTOP)

    def _send(self, what: signal.Signals) -> None:
        os.kill(self._process.pid, what)
