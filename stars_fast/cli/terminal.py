"""What the commands say besides their results, on standard error."""

from __future__ import annotations

import sys


def say(message: str) -> None:
    """Write a line to standard error, under the name of the command."""
    print(f"stars-fast: {message}", file=sys.stderr, flush=True)
