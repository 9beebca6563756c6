"""A server in a process of its own, for the scripts that load it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

_ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")
#: Torch included.
_START_SECONDS = 180.0
#: That a server has to end.
STOP_SECONDS = 60.0

#: Of this interpreter's environment.
COMMAND = (str(Path(sysconfig.get_path("scripts")) / "stars-fast"), "serve")


@dataclass
class Served:
    """A server that runs.

    Attributes
    ----------
    url
        Its address.
    process
        Itself.
    log
        What it writes.
    """

    url: str
    process: psutil.Process
    log: Path

    def resident_bytes(self) -> int:
        """Memory that it holds, the process of its front included."""
        both = (self.process, *self.process.children(recursive=True))
        return sum(int(one.memory_info().rss) for one in both)


@contextmanager
def served(
    command: Sequence[str], log: Path, environment: dict[str, str] | None = None
) -> Iterator[Served]:
    """Start a server, and stop it by SIGTERM, which it has to obey.

    Parameters
    ----------
    command
        That starts it; it must write its address on 127.0.0.1, as uvicorn does.
    log
        Where its output goes.
    environment
        Beside this process's.

    Raises
    ------
    RuntimeError
        If it ends before it serves, or not with 0 when it is told to end.
    """
    with started(command, log, environment) as (url, process):
        yield Served(url, psutil.Process(process.pid), log)
        process.send_signal(signal.SIGTERM)
        code = process.wait(STOP_SECONDS)
        if code != 0:
            raise RuntimeError(f"the server ended with {code}; {log} says more")


@contextmanager
def started(
    command: Sequence[str], log: Path, environment: dict[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start a server, and kill it at the end; gives its address and its process.

    Parameters and errors are those of `served`.
    """
    variables = {**os.environ, **(environment or {})}
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(list(command), stdout=stream, stderr=stream, env=variables)
    try:
        yield _address(process, log), process
    finally:
        process.kill()
        process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while (found := _ADDRESS.search(log.read_text(encoding="utf-8"))) is None:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the server did not start: {log.read_text(encoding='utf-8')}")
        time.sleep(0.05)
    return found.group()
