"""Plots of recorded results: how the cost of each side grows with the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Panel:
    """Axes with the rows of a suite along one number.

    Attributes
    ----------
    test
        What the names of its benchmarks begin with.
    along
        The number in ``work`` on the horizontal axis.
    title
        What else it is for.
    fixed
        Other numbers of ``work``, and facts, that a row must have.
    unit
        Of the number.
    per_token
        Show what a token costs in milliseconds, along a linear axis, in place of tokens a second.
    """

    test: str
    along: str
    title: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    unit: str = ""
    per_token: bool = False

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The rows that it shows, from left to right."""
        chosen = [
            row
            for row in rows
            if row["name"].startswith(self.test)
            and self.along in row.get("work", {})
            and all((row | row["work"]).get(name) == value for name, value in self.fixed.items())
        ]
        return sorted(chosen, key=lambda row: row["work"][self.along])


#: Of each suite that has an axis.
PANELS = {
    "sampling": [
        Panel(
            "sample", "rows", f"{name}, vocabulary 32,000", {"vocabulary": 32_000, "filter": name}
        )
        for name in ("temperature", "top-k 40", "top-p 0.95")
    ],
    "cpu": [
        Panel("tokens", "rows", "32 tokens, 2 threads", {"threads": 2}),
        Panel("tokens", "rows", "32 tokens, 1 thread", {"threads": 1}),
        Panel("tokens", "threads", "32 tokens of 16 rows", {"rows": 16}),
        Panel("context", "context", "32 tokens of 8 rows, 2 threads", {"threads": 2}, "tokens"),
        Panel("draw", "rows", "one draw, top-k 40, 2 threads", {"threads": 2}),
        Panel("draw", "rows", "one draw, top-k 40, 1 thread", {"threads": 1}),
    ],
    "pages": [
        Panel("fork", "candidates", "1,024 tokens and half a page", {"context": 1024, "tail": 8}),
        Panel("fork", "context", "8 candidates, half a page", {"candidates": 8, "tail": 8}),
        Panel("fork", "context", "8 candidates, on a page's edge", {"candidates": 8, "tail": 0}),
    ],
    "attention": [
        Panel("decode", "candidates", "4 requests, prefixes of 1,024", {"prefix": 1024}),
        Panel("decode", "prefix", "4 requests with 4 candidates", {"candidates": 4}),
    ],
    "scheduler": [
        Panel("plan", "rows", "nothing waits", {"waiting": 0, "candidates": 1}),
        Panel("plan", "rows", "100,000 requests wait", {"waiting": 100_000, "candidates": 1}),
    ],
    "round": [
        Panel("draft", "rows", "draft 32 tokens after 64"),
        Panel("score", "rows", "score 32 tokens after 256", {"context": 256}),
        Panel("score", "context", "score 32 tokens of 8 rows", {"rows": 8}),
    ],
    "acceptance": [
        Panel("rate", "acceptance", "16 requests", unit="% of attempts pass", per_token=True)
    ],
    "end-to-end": [
        Panel("requests", "requests", "requests at once"),
        Panel("candidates", "candidates", "candidates of 16 requests"),
    ],
}


def draw(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw each suite of a record that has an axis to ``folder/SUITE.png``; returns the files."""
    import matplotlib as mpl

    mpl.use("Agg")  # no display is asked for
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for suite, panels in PANELS.items():
        of_suite = [row for row in record.get("benchmarks", []) if row["suite"] == suite]
        shown = [(panel, panel.rows(of_suite)) for panel in panels]
        shown = [(panel, rows) for panel, rows in shown if len(rows) > 1]
        if not shown:
            continue
        figure, axes = pyplot.subplots(
            1, len(shown), figsize=(4.6 * len(shown), 3.6), squeeze=False, layout="constrained"
        )
        for ax, (panel, rows) in zip(axes[0], shown, strict=True):
            _fill(ax, panel, rows)
        figure.suptitle(f"{suite}: {record['device']}, {record['torch_threads']} threads")
        path = folder / f"{suite}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        written.append(path)
    return written


def _fill(ax: Any, panel: Panel, rows: Sequence[Mapping[str, Any]]) -> None:  # noqa: ANN401
    per_second = all("tokens" in row for row in rows)
    along = [row["work"][panel.along] for row in rows]
    sides = dict.fromkeys(name for row in rows for name in row.get("others", {}))

    def value(row: Mapping[str, Any], seconds: float) -> float:
        if panel.per_token:
            return 1e3 * seconds / float(row["tokens"])
        return float(row["tokens"]) / seconds if per_second else seconds

    def values(times: Sequence[Mapping[str, float] | None]) -> list[float]:
        return [
            float("nan") if t is None else value(row, t["p50"])
            for row, t in zip(rows, times, strict=True)
        ]

    ax.plot(along, values([row["ours"] for row in rows]), "o-", label="stars_fast", color="C3")
    for number, name in enumerate(sides):
        times = [row.get("others", {}).get(name) for row in rows]
        ax.plot(along, values(times), "s--", label=name, color=f"C{(0, 1, 2, 4)[number % 4]}")
    if not panel.per_token:
        ax.set_xscale("log", base=2)
    if per_second:
        ax.set_ylim(bottom=0)
    else:
        ax.set_yscale("log")
    ax.set_xticks(along, [f"{x:,.0f}" for x in along], rotation=30)
    ax.set_xlabel(f"{panel.along} ({panel.unit})" if panel.unit else panel.along)
    rate = "ms of an accepted token" if panel.per_token else "tokens/s"
    ax.set_ylabel(rate if per_second else "seconds")
    ax.set_title(panel.title, fontsize=10)
    ax.grid(visible=True, which="major", alpha=0.3)
    ax.legend(fontsize=8)
