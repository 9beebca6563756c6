"""Commands whose output goes to a log as it comes, and is there though they run over."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path


def run_streamed(
    command: Sequence[str], log: Path, *, seconds: float, cwd: Path, **environment: str
) -> str:
    """Run a command and return its last line.

    Parameters
    ----------
    command
        Ended, with the processes that it started, once `seconds` are over.
    log
        Gets output and errors as they come.
    seconds
        That it may take.
    cwd
        Where it runs.
    environment
        Variables beside those of this process.

    Raises
    ------
    RuntimeError
        If it fails or runs over; the error has the end of the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as to:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=os.environ | environment,
            stdout=to,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=seconds)
            ended = f"exit {status}"
        except subprocess.TimeoutExpired:
            status, ended = 1, f"still running after {seconds:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
    print(lines[-1])
    if status:
        raise RuntimeError(f"{ended}; {log} ends:\n" + "\n".join(lines[-40:]))
    return lines[-1]
