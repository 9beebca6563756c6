"""What guards an output that a later run may continue: one run at a time, the same settings."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stars_fast.cli.errors import UsageError, file_errors
from stars_fast.cli.terminal import say


def beside(output: Path, what: str) -> Path:
    """Return the file that keeps something about an output, ``OUTPUT.what.json``."""
    return output.with_name(f"{output.name}.{what}.json")


def write_json(path: Path, value: object) -> None:
    """Write a file in one step: an interrupted run leaves the whole file or none."""
    partial = path.with_name(path.name + ".partial")
    with file_errors():
        partial.write_text(json.dumps(value, indent=2, default=dict) + "\n", encoding="utf-8")
        partial.replace(path)


@contextmanager
def only_writer(output: Path) -> Iterator[None]:
    """Hold ``OUTPUT.lock``, which is gone afterwards; the system frees it where a process is ended.

    Raises
    ------
    UsageError
        Another process holds it.
    """
    target = output.resolve()
    path = target.with_name(target.name + ".lock")
    while True:
        with file_errors():
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"{output} is being written by another run: wait for it, or give another "
                    "--output"
                ) from None
            if not _names(path, descriptor):
                continue  # another run has just ended, and taken the file away
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def _names(path: Path, descriptor: int) -> bool:
    """Whether a path is that of an open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def check_settings(output: Path, settings: Mapping[str, Any]) -> None:
    """Compare the settings of a run with those of the run that it continues, if they were kept.

    Raises
    ------
    UsageError
        The run before had others; the message says which.
    """
    path = beside(output, "settings")
    if not path.exists():
        if output.exists() and output.stat().st_size:
            say(f"{path} is missing: the settings of the run before are not compared")
        return
    try:
        before = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        raise UsageError(f"{path} is damaged; delete it to go on without comparing") from None
    now = json.loads(json.dumps(settings, default=dict))
    # What one of two versions does not know is at its default in the other.
    other = [
        f"{name} {before[name]!r}, not {now[name]!r}"
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name]
    ]
    if other:
        raise UsageError(
            f"--resume: {output} was made with {'; '.join(other)}: give the same, or another "
            "--output"
        )
