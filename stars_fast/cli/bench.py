"""``stars-fast bench``: the project's benchmarks, each beside its baseline."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path

from stars_fast.benchmarks.runner import SuiteError, run_suites, suites
from stars_fast.benchmarks.tables import as_text, lines_of
from stars_fast.cli.errors import UsageError, file_errors
from stars_fast.cli.model_flags import add_threads_flag, set_threads
from stars_fast.cli.terminal import say
from stars_fast.models.progress import quiet_libraries
from stars_fast.tables import shell_line

_EPILOG = """\
Without --full the sizes are small: this checks that everything runs and agrees, and measures
nothing. For figures, give --full on an otherwise idle machine. Both sides of a comparison run in
turn in one process, and their results are compared before they are timed. "ratio" is how many times
faster stars_fast is.
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``bench`` to the command line."""
    parser = commands.add_parser(
        "bench",
        help="run benchmarks",
        description="Run the project's benchmarks by suite and print the results.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", help="names of suites, see --list (default: all)"
    )
    parser.add_argument("--list", action="store_true", help="list the suites and exit")
    parser.add_argument("--full", action="store_true", help="full size, for figures")
    parser.add_argument(
        "-k", dest="select", default="", metavar="EXPRESSION", help="tests to run, as in pytest"
    )
    parser.add_argument(
        "--vllm-python",
        metavar="PATH",
        help="a Python that has vLLM for CPUs, which the suite cpu runs too (default: without it)",
    )
    parser.add_argument("--out", metavar="FILE", help="write the record as JSON")
    add_threads_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises
    ------
    UsageError
        An unknown suite, a file that cannot be written, or pytest is not installed.
    """
    known = suites()
    if args.list:
        width = max(map(len, known))
        print("\n".join(f"{name:<{width}}  {subject}" for name, subject in known.items()))
        return 0
    for name in args.suites:
        if name not in known:
            raise UsageError(f"SUITE must be one of {', '.join(known)}, got {name!r}")
    for package in ("pytest", "pytest_benchmark"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(
                f"bench needs {package}, which is not installed: pip install 'stars_fast[bench]'"
            )
    if args.vllm_python is not None and shutil.which(args.vllm_python) is None:
        raise UsageError(f"--vllm-python must be a program, got {args.vllm_python!r}")
    if args.out is not None:
        with file_errors():
            Path(args.out).open("a").close()  # now rather than when all has been measured
    set_threads(args)
    quiet_libraries()
    try:
        record = run_suites(
            args.suites or list(known),
            full=args.full,
            command=_command(args),
            select=args.select,
            vllm_python=args.vllm_python or "",
            use_tqdm=sys.stderr.isatty(),
        )
    except SuiteError as error:
        say(f"error: {error}")
        return 1
    print(as_text(lines_of(record)))
    if args.out is not None:
        with file_errors():
            text = json.dumps(record, indent=1) + "\n"
            Path(args.out).write_text(text, encoding="utf-8")
        say(f"wrote {args.out}")
    if record["failed"]:
        say(f"error: benchmarks failed; the others are above\n{record['failed']}")
        return 1
    return 0


def _command(args: argparse.Namespace) -> str:
    words = ["stars-fast", "bench", *args.suites]
    words += ["--full"] if args.full else []
    words += ["-k", args.select] if args.select else []
    words += ["--vllm-python", args.vllm_python] if args.vllm_python else []
    words += ["--out", args.out] if args.out else []
    words += ["--threads", str(args.threads)] if args.threads else []
    return shell_line(words)
