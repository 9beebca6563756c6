"""Tables of recorded results: for the terminal, and for Markdown files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stars_fast.tables import markdown_table, origin, text_table

#: What a side of the end-to-end suite is, in words.
SIDES = {
    "a: no cache": "(a) the loop as public code has it: one prompt at a time, no KV cache, whole "
    "texts to the reward model",
    "b: cache": "(b) the same loop with transformers' KV cache",
    "c: lockstep": "(c) the same as a padded batch that waits for its slowest prompt",
    "d: continuous": "(d) segments from transformers' continuous batching",
    "e: entropy-ended": "(e) segments that end by entropy (CARDS), on this engine",
    "f: generate": "(f) no alignment, `vanilla` against `model.generate`",
    "f: generate_batch": "(f) no alignment, `vanilla` against `model.generate_batch`",
    "stars": "`vanilla` against `stars`: what alignment costs",
}


@dataclass(frozen=True)
class Line:
    """A comparison.

    Attributes
    ----------
    suite, benchmark
        Where it is from.
    against
        The other side; empty where there is none.
    ours, theirs
        Rate or time at the median, with its unit.
    ratio
        How many times faster ours is; None where there is no other side.
    """

    suite: str
    benchmark: str
    against: str
    ours: str
    theirs: str
    ratio: float | None

    @property
    def shown_ratio(self) -> str:
        """The ratio with two or three digits."""
        if self.ratio is None:
            return ""
        return f"{self.ratio:.0f}" if self.ratio >= 100 else f"{self.ratio:.3g}"


def suites_of(record: Mapping[str, Any]) -> list[str]:
    """Suites of a record; ``roofline`` and ``load`` are those of the scripts of these names."""
    if "median_run" in record:
        return ["roofline"]
    if "load" in record:
        return ["load"]
    return list(dict.fromkeys(row["suite"] for row in record["benchmarks"]))


def lines_of(record: Mapping[str, Any], suite: str | None = None) -> list[Line]:
    """Comparisons of a record, of one suite if it is named."""
    lines = []
    for row in record["benchmarks"]:
        if suite is not None and row["suite"] != suite:
            continue
        show = _rate(row["tokens"]) if "tokens" in row else _time
        mine = row["ours"]["p50"] if "ours" in row else row["seconds"]["median"]
        ours = show(mine)
        if "microseconds_per_row" in row:
            ours = f"{row['microseconds_per_row']['p50']:.2f} us a row"
        others = row.get("others", {})
        if not others:
            lines.append(Line(row["suite"], row["name"], "", ours, "", None))
        for name, times in others.items():
            lines.append(
                Line(row["suite"], row["name"], name, ours, show(times["p50"]), row["ratio"][name])
            )
    return lines


def _rate(tokens: float) -> Callable[[float], str]:
    return lambda seconds: f"{tokens / seconds:,.{0 if tokens / seconds >= 100 else 1}f} tokens/s"


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


# For the terminal


def as_text(lines: Sequence[Line]) -> str:
    """Set comparisons in columns."""
    cells = [
        (f"{x.suite}: {x.benchmark}", x.ours, x.against, x.theirs, x.shown_ratio) for x in lines
    ]
    headings = ("benchmark", "ours", "against", "theirs", "ratio")
    return "\n".join(text_table([headings, *cells], left=(0, 2)))


# For Markdown


def as_markdown(record: Mapping[str, Any], suite: str) -> str:
    """A suite's table, and a line that says what it was measured on and by which command.

    Raises
    ------
    ValueError
        If the record has nothing of the suite.
    """
    if suite not in suites_of(record):
        raise ValueError(f"the record has no suite {suite!r}")
    if suite == "roofline":
        return _with_origin(*_phases(record["median_run"]), record)
    if suite == "load":
        return _with_origin(*_loads(record["load"]), record)
    lines = lines_of(record, suite)
    rows = [(SIDES.get(x.against, x.benchmark), x) for x in lines]
    if suite == "end-to-end":
        rows = _best_of_each(rows)
        headings = ["against", "theirs", "stars_fast", "ratio"]
        cells = [[label, x.theirs, x.ours, x.shown_ratio] for label, x in rows]
    else:
        headings = ["", "against", "theirs", "stars_fast", "ratio"]
        cells = [[f"`{x.benchmark}`", x.against, x.theirs, x.ours, x.shown_ratio] for _, x in rows]
    return _with_origin(headings, cells, record)


def _phases(run: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Measured and least seconds, phase by phase and of the whole run."""
    whole = {"name": "whole", "seconds": run["seconds"], "least_seconds": run["least_seconds"]}
    headings = ["phase", "measured", "share", "least", "measured / least"]
    cells = [
        [
            phase["name"],
            _time(phase["seconds"]),
            f"{phase['seconds'] / run['seconds']:.1%}",
            _time(phase["least_seconds"]),
            f"{phase['seconds'] / phase['least_seconds']:.2f}",
        ]
        for phase in [*run["phases"], whole]
        if phase["least_seconds"]
    ]
    return headings, cells


def _loads(load: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Rates and times of the closed run, of each open one and of the crowd."""
    headings = [
        "load", "requests", "complete", "a second", "tokens/s",
        "first segment p50", "p95", "p99", "whole p50", "p95", "p99",
    ]  # fmt: skip
    runs = [("saturated", load["closed"])]
    runs += [(f"{run['part']:.0%} of that, at random", run) for run in load["open"]]
    runs.append(("all at once", load["crowd"]))
    cells = [
        [
            name,
            f"{run['requests']:,}",
            f"{run['complete']:,}",
            f"{run['requests_per_second']:.3g}",
            f"{run['tokens_per_second']:.0f}",
            *(_time(run["first_segment"][q]) for q in ("p50", "p95", "p99")),
            *(_time(run["latency"][q]) for q in ("p50", "p95", "p99")),
        ]
        for name, run in runs
    ]
    return headings, cells


def _with_origin(
    headings: Sequence[str], cells: Sequence[Sequence[str]], record: Mapping[str, Any]
) -> str:
    return f"{markdown_table(headings, cells)}\n\n{origin(record)}"


def _best_of_each(rows: Sequence[tuple[str, Line]]) -> list[tuple[str, Line]]:
    """Where a baseline was run in several forms, such as numbers of candidates, its best one."""
    best: dict[str, Line] = {}
    for label, line in rows:
        if line.benchmark.startswith(("candidates", "requests")):
            continue  # the engine along an axis, for the plots
        if label not in best or (line.ratio or 0) < (best[label].ratio or 0):
            best[label] = line
    return list(best.items())


_BLOCK = re.compile(
    r"(<!-- table (?P<suite>\S+) (?P<record>\S+) -->\n).*?(?=<!-- end of table -->)", re.DOTALL
)


def updated(
    text: str, folder: Path, read: Callable[[Path], Mapping[str, Any]]
) -> tuple[str, list[str]]:
    """Write a Markdown text's tables anew.

    Parameters
    ----------
    text
        With tables between ``<!-- table SUITE RECORD -->`` and ``<!-- end of table -->``.
    folder
        That the paths of records start from: the Markdown file's.
    read
        Gives the record of a path.

    Returns
    -------
    The text, and the tables' suites in order.
    """
    found: list[str] = []

    def table(block: re.Match[str]) -> str:
        found.append(block["suite"])
        return block[1] + as_markdown(read(folder / block["record"]), block["suite"]) + "\n"

    return _BLOCK.sub(table, text), found
