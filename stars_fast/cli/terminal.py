"""What the commands say besides their results: messages and progress bars, on standard error."""

from __future__ import annotations

import sys


def say(message: str) -> None:
    """Write a line to standard error, under the name of the command."""
    print(f"stars-fast: {message}", file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """Without a terminal, keep transformers and the hub from drawing their progress bars."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
