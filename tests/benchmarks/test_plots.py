"""Plots of records: what is on which axis."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from stars_fast.benchmarks import plots


def row(name: str, seconds: float, tokens: int = 64, **work: float) -> dict[str, Any]:
    return {"name": name, "work": work, "tokens": tokens, "ours": {"p50": seconds}, "others": {}}


@pytest.mark.parametrize(
    ("suite", "title", "rows", "x", "y", "labels"),
    [
        (
            "cpu",
            "32 tokens of 8 rows, 2 threads",
            [
                row("context[2-512]", 4.0, context=512, threads=2, rows=8),
                row("context[2-32]", 2.0, context=32, threads=2, rows=8),
                row("tokens[2-8]", 1.0, threads=2, rows=8),
            ],
            [32, 512],
            [32.0, 16.0],
            ("context (tokens)", "tokens/s"),
        ),
        (
            "cpu",
            "32 tokens of 16 rows",
            [row(f"tokens[{t}-16]", 4.0 / t, threads=t, rows=16) for t in (2, 1)]
            + [row("tokens[2-4]", 1.0, threads=2, rows=4)],
            [1, 2],
            [16.0, 32.0],
            ("threads", "tokens/s"),
        ),
        (
            "acceptance",
            "16 requests",
            [row("rate[0.6]", 0.64, acceptance=40.0), row("rate[0.8]", 1.28, acceptance=20.0)],
            [20.0, 40.0],
            [20.0, 10.0],
            ("acceptance (% of attempts pass)", "ms of an accepted token"),
        ),
    ],
    ids=["context", "threads", "acceptance"],
)
def test_axes(
    suite: str,
    title: str,
    rows: list[dict[str, Any]],
    x: list[float],
    y: list[float],
    labels: tuple[str, str],
) -> None:
    (panel,) = (panel for panel in plots.PANELS[suite] if panel.title == title)
    ax = Figure().subplots()
    plots._fill(ax, panel, panel.rows(rows))
    (line,) = ax.get_lines()
    assert list(line.get_xdata()) == x
    assert list(line.get_ydata()) == pytest.approx(y)
    assert (ax.get_xlabel(), ax.get_ylabel()) == labels
    assert ax.get_xscale() == ("linear" if suite == "acceptance" else "log")
