"""The ``stars-fast`` command."""

from stars_fast.cli.main import main

__all__ = ["main"]
