"""Servers as processes of their own: ``stars-fast serve``, and those of others."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

START_SECONDS = 180


@contextmanager
def server_process(
    flags: Sequence[str], log: Path, code: str = ""
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run ``stars-fast serve`` on a free port; yields its address and the process.

    `code` is run in it before.
    """
    program = f"{code}\nfrom stars_fast.cli import main; raise SystemExit(main())"
    with _process([sys.executable, "-c", program, "serve", "--port", "0", *flags], log) as process:
        found = _until(lambda: re.search(r"http://127\.0\.0\.1:\d+", log.read_text()), process, log)
        yield found.group(), process


@contextmanager
def other_server(command: Sequence[str], log: Path, port: int, **environment: str) -> Iterator[str]:
    """Run a server of others, told to listen at ``port``; yields its address once it answers."""
    import httpx

    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"{address}/v1/models", timeout=5)
            return True
        return False

    with _process(command, log, HF_HUB_OFFLINE="1", **environment) as process:
        _until(answers, process, log)
        yield address


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def _process(
    command: Sequence[str], log: Path, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program in the folder of its log, and end it."""
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=stream,
            cwd=log.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until(
    found: Callable[[], Result | None], process: subprocess.Popen[bytes], log: Path
) -> Result:
    deadline = time.monotonic() + START_SECONDS
    while not (result := found()):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return result
