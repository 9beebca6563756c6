"""Records to tables and plots; the tables in the repository are those of its records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stars_fast.benchmarks.plots import PANELS, draw
from stars_fast.benchmarks.tables import as_markdown, as_text, lines_of, updated

ROOT = Path(__file__).parents[2]


def times(middle: float) -> dict[str, float]:
    return {"p20": middle * 0.9, "p50": middle, "p80": middle * 1.2}


def row(suite: str, name: str, ours: float, others: dict[str, float], **facts: Any) -> Any:
    return {
        "suite": suite,
        "name": name,
        "ours": times(ours),
        "others": {key: times(value) for key, value in others.items()},
        "ratio": {key: value / ours for key, value in others.items()},
        "seconds": {"rounds": 1, "min": ours, "median": ours, "max": ours},
        **facts,
    }


RECORD = {
    "command": "stars-fast bench --full",
    "commit": "0123456789abcdef",
    "uncommitted_changes": False,
    "date": "2026-01-02",
    "device": "A Processor",
    "torch_threads": 2,
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "benchmarks": [
        row("end-to-end", "public_loop[a]", 2.0, {"a: no cache": 30.0}, tokens=400),
        row("end-to-end", "continuous[1]", 2.0, {"d: continuous": 9.0}, tokens=400),
        row("end-to-end", "continuous[4]", 2.0, {"d: continuous": 5.0}, tokens=400),
        row("end-to-end", "requests[1]", 1.0, {"c: lockstep": 3.0}, tokens=40,
            work={"requests": 1}),
        row("end-to-end", "requests[4]", 2.0, {"c: lockstep": 8.0}, tokens=160,
            work={"requests": 4}),
        row("pages", "fork[1]", 3e-5, {"transformers": 6.1e-3}),
        {"suite": "kernels", "name": "kernels", "seconds": {"median": 0.25}},
        {"suite": "scheduler", "name": "plan", "ours": times(1e-3),
         "microseconds_per_row": times(0.25)},
    ],
}  # fmt: skip


def test_lines() -> None:
    found = {line.benchmark: line for line in lines_of(RECORD)}
    loop = found["public_loop[a]"]
    assert (loop.ours, loop.theirs, loop.shown_ratio) == ("200 tokens/s", "13.3 tokens/s", "15")
    fork = found["fork[1]"]
    assert (fork.ours, fork.theirs, fork.shown_ratio) == ("30 us", "6.1 ms", "203")
    assert (found["kernels"].ours, found["kernels"].shown_ratio) == ("250 ms", "")
    assert found["plan"].ours == "0.25 us a row"
    text = as_text(lines_of(RECORD)).splitlines()
    assert len(text) == 1 + len(RECORD["benchmarks"])
    assert {len(line) for line in text if not line.endswith(("row", "ms"))} == {len(text[0])}


def test_latency_against_load() -> None:
    times = {"p50": 0.5, "p95": 1.5, "p99": 2.25}
    run = {"requests": 1000, "complete": 999, "requests_per_second": 12.345,
           "tokens_per_second": 789.4, "first_segment": times, "latency": times}  # fmt: skip
    load = {"closed": run, "open": [{**run, "part": 0.25}], "crowd": run}
    table = as_markdown({**RECORD, "load": load}, "load").splitlines()
    shown = "| 1,000 | 999 | 12.3 | 789 | 500 ms | 1.5 s | 2.25 s | 500 ms | 1.5 s | 2.25 s |"
    assert table[2:5] == [
        f"| saturated {shown}",
        f"| 25% of that, at random {shown}",
        f"| all at once {shown}",
    ]


def test_phases_against_the_least_time() -> None:
    run = {
        "seconds": 8.0,
        "least_seconds": 2.0,
        "phases": [
            {"name": "plan", "seconds": 0.001, "least_seconds": 0},
            {"name": "draft", "seconds": 6.0, "least_seconds": 1.5},
        ],
    }
    table = as_markdown({**RECORD, "median_run": run}, "roofline").splitlines()
    assert table[2:4] == [
        "| draft | 6 s | 75.0% | 1.5 s | 4.00 |",
        "| whole | 8 s | 100.0% | 2 s | 4.00 |",
    ]


def test_a_baseline_counts_in_its_best_form() -> None:
    table = as_markdown(RECORD, "end-to-end")
    assert "| 80.0 tokens/s | 200 tokens/s | 2.5 |" in table  # with 4 candidates
    assert "44.4" not in table  # with 1
    assert "lockstep" not in table  # an axis, for the plots
    assert table.endswith(
        "A Processor, 2 threads, torch 2.13.0, transformers 5.23.0, 2026-01-02, commit "
        "0123456789: `stars-fast bench --full`"
    )


def test_update_writes_between_the_marks_and_nothing_else(tmp_path: Path) -> None:
    text = (
        "before\n<!-- table pages x/r.json -->\nold\n<!-- end of table -->\nafter\n"
        "<!-- table end-to-end r.json -->\n<!-- end of table -->\n"
    )
    read = []
    new, found = updated(text, tmp_path, lambda path: read.append(path) or RECORD)
    assert found == ["pages", "end-to-end"]
    assert read == [tmp_path / "x/r.json", tmp_path / "r.json"]
    assert new.startswith("before\n<!-- table pages x/r.json -->\n| ")
    assert "old" not in new
    assert "<!-- end of table -->\nafter\n" in new
    assert updated(new, tmp_path, lambda _: RECORD)[0] == new


def test_a_suite_that_was_not_recorded() -> None:
    with pytest.raises(ValueError, match="no suite 'sampling'"):
        as_markdown(RECORD, "sampling")


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    loads = [
        {
            "suite": "scheduler",
            "name": "plan",
            "ours": times(n),
            "work": {"rows": n, "waiting": 0},
            "candidates": 1,
        }
        for n in (1, 8)
    ]
    written = draw({**RECORD, "benchmarks": RECORD["benchmarks"] + loads}, tmp_path / "plots")
    assert [path.name for path in written] == ["scheduler.png", "end-to-end.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_a_panel_takes_its_rows_alone_in_order() -> None:
    panel = PANELS["end-to-end"][0]
    shown = panel.rows([r for r in RECORD["benchmarks"] if r["suite"] == "end-to-end"][::-1])
    assert [r["name"] for r in shown] == ["requests[1]", "requests[4]"]


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md", "docs/serving.md"])
def test_tables_in_the_repository_are_those_of_the_records(name: str) -> None:
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    new, found = updated(
        text, path.parent, lambda record: json.loads(record.read_text(encoding="utf-8"))
    )
    assert found
    assert new == text, f"run: stars-fast report --update {name}"
