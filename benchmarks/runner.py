"""Runs suites of this folder and keeps what they measured.

A suite is a file ``test_NAME.py``: pytest runs it, pytest-benchmark times it, and each test leaves
in ``extra_info`` what it compared (`stars_fast.benchmarks.compare.Compare`).
"""

from __future__ import annotations

import ast
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from tqdm import tqdm

HERE = Path(__file__).resolve().parent


class SuiteError(Exception):
    """Suites of which nothing could be measured."""


def suites() -> dict[str, str]:
    """Name and subject of each suite."""
    found = {}
    for path in sorted(HERE.glob("test_*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        name = path.stem.removeprefix("test_").replace("_", "-")
        found[name] = text.splitlines()[0].rstrip(".")
    return found


def run_suites(
    names: Sequence[str],
    *,
    full: bool,
    command: str,
    select: str = "",
    vllm_python: str = "",
    use_tqdm: bool = True,
) -> dict[str, Any]:
    """Run suites and return the record.

    Parameters
    ----------
    names
        Of `suites`.
    full
        At full size, on a machine that does nothing else; or small, to see that all runs.
    command
        That makes the record again, for its head.
    select
        An expression of pytest's ``-k`` that selects tests.
    vllm_python
        A Python that has vLLM for CPUs, for the suite ``cpu``; empty: without it.
    use_tqdm
        Show a progress bar on standard error.

    Returns
    -------
    dict
        `stars_fast.benchmarks.measure.header`; under ``benchmarks`` a row of each test: suite,
        name, what it kept in ``extra_info``, and the seconds of pytest-benchmark's rounds; under
        ``failed`` what pytest printed if any test failed, else nothing. Others are kept all the
        same.

    Raises
    ------
    ValueError
        A name that is no suite.
    SuiteError
        If no test was measured, with what pytest printed.
    """
    from stars_fast.benchmarks.interpreter import interpret_without_gpu  # imports torch

    interpret_without_gpu()
    import pytest

    from stars_fast.benchmarks.measure import default_device, header

    known = suites()
    for name in names:
        if name not in known:
            raise ValueError(f"suite must be one of {', '.join(known)}, got {name!r}")
    head = header(command, default_device())
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        arguments = [
            "--disable-plugin-autoload",  # others take seconds to load, and may run tests at once
            *("-p", "pytest_benchmark.plugin"),
            *(str(HERE / f"test_{name.replace('-', '_')}.py") for name in names),
            f"--rootdir={HERE}",
            f"--config-file={_config(Path(folder))}",
            f"--benchmark-json={raw}",
            *(["--full"] if full else []),
            *(["-k", select] if select else []),
            *([f"--vllm-python={vllm_python}"] if vllm_python else []),
        ]
        printed = io.StringIO()
        # What pytest prints is for whoever writes a suite; it is shown where a test fails.
        with (
            _without("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"),
            _no_bytecode(),
            _Progress(sys.stderr, show=use_tqdm) as progress,
            redirect_stdout(printed),
            redirect_stderr(printed),
        ):
            code = pytest.main(arguments, plugins=[progress])
        if code == pytest.ExitCode.NO_TESTS_COLLECTED:
            raise SuiteError(f"no test is selected by {select!r}" if select else "no test ran")
        # pytest-benchmark leaves the file empty where it has measured nothing.
        text = raw.read_text(encoding="utf-8") if raw.exists() else ""
        if not text:
            raise SuiteError(printed.getvalue().strip())
    return head | {
        "full": full,
        "benchmarks": [_row(b) for b in json.loads(text)["benchmarks"]],
        "failed": printed.getvalue().strip() if code != pytest.ExitCode.OK else "",
    }


@contextmanager
def _without(*variables: str) -> Iterator[None]:
    """Leave variables out of the environment: those of a pytest that this is called from."""
    held = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """Leave nothing of pytest's beside the suites: an uninstall would not find it."""
    held, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = held


def _config(folder: Path) -> Path:
    """Write settings of pytest that do not depend on where the package is installed."""
    path = folder / "pytest.ini"
    path.write_text(
        "[pytest]\naddopts = --import-mode=importlib -p no:cacheprovider -q --tb=short "
        "--disable-warnings --benchmark-quiet\n",
        encoding="utf-8",
    )
    return path


def _row(benchmark: dict[str, Any]) -> dict[str, Any]:
    suite = Path(benchmark["fullname"].partition("::")[0]).stem.removeprefix("test_")
    stats = benchmark["stats"]
    return {
        "suite": suite.replace("_", "-"),
        "name": benchmark["name"].removeprefix("test_"),
        **benchmark["extra_info"],
        "seconds": {name: stats[name] for name in ("rounds", "min", "median", "max")},
    }


class _Progress:
    """A pytest plugin: a bar of the tests that have ended, named after the one that runs."""

    def __init__(self, stream: Any, *, show: bool) -> None:  # noqa: ANN401 - a text stream
        # A copy, since pytest catches what is written to the streams themselves.
        self._stream = os.fdopen(os.dup(stream.fileno()), "w") if show else None
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._stream is not None:
            self._stream.close()

    def pytest_collection_finish(self, session: Any) -> None:  # noqa: ANN401 - pytest's
        """Begin the bar."""
        if self._stream is not None:
            self._bar = tqdm(
                total=len(session.items), file=self._stream, unit="benchmark", dynamic_ncols=True
            )

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Say which test runs."""
        if self._bar is not None:
            self._bar.set_description(nodeid.partition("::")[2].removeprefix("test_"))

    def pytest_runtest_logfinish(self) -> None:
        """Count a test."""
        if self._bar is not None:
            self._bar.update()
