"""Tables in Markdown and in columns of text, and what recorded figures were measured on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; a cell may have any text."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    )


def text_table(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Return rows as lines of text, each column as wide as its widest cell.

    Parameters
    ----------
    rows
        The headings among them.
    left
        Numbers of the columns that are set flush left; the others are set flush right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:{'<' if number in left else '>'}{width}}"
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def origin(header: Mapping[str, Any]) -> str:
    """Return the line that says where the figures of a record are from.

    Parameters
    ----------
    header
        As `stars_fast.benchmarks.measure.header` makes it.
    """
    versions = header["versions"]
    changed = " with uncommitted changes" if header["uncommitted_changes"] else ""
    return (
        f"{header['device']}, {header['torch_threads']} threads, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, {header['date']}, commit "
        f"{header['commit'][:10]}{changed}: `{header['command']}`"
    )
