"""``stars-fast bench`` and ``report`` from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stars_fast.benchmarks import runner
from stars_fast.cli import main


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"sampling", "pages", "attention", "scheduler", "round", "end-to-end"} <= set(names)


def test_runs_records_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own, as pytest does not run within pytest."""
    path = tmp_path / "record.json"
    script = "import sys; from stars_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        [*command, "bench", "pages", "scheduler", "--out", str(path)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "pages: fork_and_prune[3-48-aligned]" in done.stdout
    record = json.loads(path.read_text(encoding="utf-8"))
    assert {row["suite"] for row in record["benchmarks"]} == {"pages", "scheduler"}
    assert set(record["benchmarks"][0]["ours"]) == {"p20", "p50", "p80"}
    assert record["command"] == f"stars-fast bench pages scheduler --out {path}"
    assert not record["full"]
    assert main(["report", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "## pages" in shown
    assert "| `fork_and_prune[3-48-aligned]` | transformers |" in shown


def test_a_failing_benchmark_is_shown(tmp_path: Path) -> None:
    suite = tmp_path / "test_wrong.py"
    suite.write_text(
        '"""Wrong."""\n\ndef test_sides():\n    assert 1 == 2, "they differ"\n\n'
        "def test_others(benchmark):\n    benchmark.pedantic(int, rounds=1)\n"
    )
    record = tmp_path / "record.json"
    script = (
        "import sys; from pathlib import Path; from stars_fast.benchmarks import runner;"
        "from stars_fast.cli import main; runner.HERE = Path(sys.argv.pop());"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "bench", "wrong", "--out", str(record), str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={name: x for name, x in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "they differ" in done.stderr
    assert "wrong: others" in done.stdout  # what else was measured is not lost
    rows = json.loads(record.read_text(encoding="utf-8"))["benchmarks"]
    assert [row["name"] for row in rows] == ["others"]
    # Where the package is installed, this would outlive it, and hide an editable install.
    assert not (tmp_path / "__pycache__").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bench", "nothing"], "SUITE must be one of acceptance, attention, "),
        (["bench", "--out", "/nowhere/x.json"], "/nowhere/x.json"),
        (["report"], "give a RECORD"),
        (["report", "--plots", "x"], "--plots needs a RECORD"),
        (["report", "/nowhere/x.json"], "/nowhere/x.json"),
        (["report", "{bad}"], "is no record of"),
        (["report", "--update", "{bad}"], "has no line <!-- table"),
    ],
)
def test_bad_flags(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"benchmarks": [{}]}')
    assert main([str(bad) if word == "{bad}" else word for word in argv]) == 2
    assert message in capsys.readouterr().err


def test_suites_say_what_they_are_about() -> None:
    assert all(subject and not subject.endswith(".") for subject in runner.suites().values())
