"""``stars-fast report``: tables and plots of the records of ``stars-fast bench``."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stars_fast.benchmarks.plots import draw
from stars_fast.benchmarks.tables import as_markdown, suites_of, updated
from stars_fast.cli.errors import UsageError, file_errors
from stars_fast.cli.terminal import say


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``report`` to the command line."""
    parser = commands.add_parser(
        "report",
        help="tables and plots of recorded benchmarks",
        description="Print a record of `stars-fast bench --out` as Markdown tables, plot it, or "
        "rewrite the tables of Markdown files from the records that they name.",
        allow_abbrev=False,
    )
    parser.add_argument("record", nargs="?", metavar="RECORD", help="a recorded JSON file")
    parser.add_argument(
        "--plots", metavar="FOLDER", help="plot RECORD into this folder, one PNG per suite"
    )
    parser.add_argument(
        "--update",
        nargs="+",
        default=[],
        metavar="FILE",
        help="Markdown files; each table is between <!-- table SUITE RECORD --> and "
        "<!-- end of table -->, with RECORD relative to the file",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises
    ------
    UsageError
        Nothing to do, a file that cannot be read or is no record, or matplotlib is not installed.
    """
    if args.plots is not None:
        if args.record is None:
            raise UsageError("--plots needs a RECORD")
        if importlib.util.find_spec("matplotlib") is None:
            raise UsageError(
                "--plots needs matplotlib, which is not installed: pip install 'stars_fast[bench]'"
            )
    if args.record is None and not args.update:
        raise UsageError("give a RECORD, or --update FILE")
    for name in args.update:
        _update(Path(name))
    if args.record is None:
        return 0
    record = read_record(Path(args.record))
    if args.plots is not None:
        for path in draw(record, Path(args.plots)):
            say(f"wrote {path}")
        return 0
    for suite in suites_of(record):
        print(f"## {suite}\n\n{as_markdown(record, suite)}\n")
    return 0


def read_record(path: Path) -> Mapping[str, Any]:
    """Read a record.

    Raises
    ------
    UsageError
        If the file cannot be read, or is no record.
    """
    with file_errors():
        text = path.read_text(encoding="utf-8")
    record: Mapping[str, Any] = {}
    try:
        record = json.loads(text)
        complete = bool(suites_of(record))
    except (ValueError, TypeError, KeyError):
        complete = False
    if not complete:
        raise UsageError(f"{path} is no record of `stars-fast bench --out`")
    return record


def _update(path: Path) -> None:
    with file_errors():
        text = path.read_text(encoding="utf-8")
    try:
        new, tables = updated(text, path.parent, read_record)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    if not tables:
        raise UsageError(f"{path} has no line <!-- table SUITE RECORD -->")
    with file_errors():
        path.write_text(new, encoding="utf-8")
    say(f"{path}: {len(tables)} tables, {'changed' if new != text else 'unchanged'}")
