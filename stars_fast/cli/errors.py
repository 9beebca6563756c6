"""Errors that end a command with a message instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(Exception):
    """Flags, input or files that the command cannot work with (exit code 2)."""


class LineError(UsageError):
    """An input line that is no request.

    Attributes
    ----------
    line
        Its number, from 1.
    reason
        What is wrong with it.
    """

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"input line {line}: {reason}")
        self.line = line
        self.reason = reason


@contextmanager
def file_errors() -> Iterator[None]:
    """Turn what the system says about a file that the user named into a `UsageError`."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from None
