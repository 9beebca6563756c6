"""The ``stars-fast`` command line.

`main` is also what other code calls to run a command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``stars-fast``; returns the exit code.

    Parameters
    ----------
    argv
        Arguments after the name of the command; those of the process if None.
    """
    try:
        from stars_fast.cli.commands import run  # takes long enough for a Ctrl-C
    except KeyboardInterrupt:
        print("stars-fast: interrupted", file=sys.stderr)
        return 130
    return run(argv)
