"""Errors that end a command with a message instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(Exception):
    """Flags, input or files that the command cannot work with (exit code 2)."""


@contextmanager
def value_errors() -> Iterator[None]:
    """Turn what is wrong with a value, or with the records of a file, into a `UsageError`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None


@contextmanager
def file_errors() -> Iterator[None]:
    """Turn what the system says about a file that the user named into a `UsageError`."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from None
