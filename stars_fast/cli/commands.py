"""The command line: its commands, and how it reports errors."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from stars_fast.cli import bench, demo, generate, report, serve
from stars_fast.cli import eval as evaluate
from stars_fast.cli.errors import UsageError
from stars_fast.cli.terminal import say
from stars_fast.errors import StarsFastError


def run(argv: Sequence[str] | None) -> int:
    """Run a command, see `stars_fast.cli.main`."""
    parser = argparse.ArgumentParser(
        prog="stars-fast",
        description="Align a language model while it decodes, segment by segment (STARS).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"stars-fast {version('stars-fast')}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate.add_command(commands)
    demo.add_command(commands)
    serve.add_command(commands)
    evaluate.add_command(commands)
    bench.add_command(commands)
    report.add_command(commands)
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code: int = args.run(args)
    except UsageError as error:
        say(f"error: {error}")
        return 2
    except BrokenPipeError:
        # The reader has left; what Python still wants to flush at exit has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (StarsFastError, OSError) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    return code
