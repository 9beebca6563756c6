"""Tables in Markdown and in columns of text, and what recorded figures were measured on."""

from __future__ import annotations

import re
import shlex
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


def shell_line(words: Sequence[str]) -> str:
    """Return a command as one line that can be pasted into a shell, bash, zsh or ksh.

    Only what holds a newline or another control character is quoted in their way.
    """
    return " ".join(
        shlex.quote(word) if word.isprintable() or not word else _ansi_quoted(word)
        for word in words
    )


def _ansi_quoted(word: str) -> str:
    escapes = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    letters = [
        escapes.get(c) or (c if c.isprintable() or ord(c) > 0x7F else f"\\x{ord(c):02x}")
        for c in word
    ]
    return "$'" + "".join(letters) + "'"


def _code(text: str) -> str:
    """Return text as Markdown code within a line, whatever backticks it has."""
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{ticks}{space}{text}{space}{ticks}"


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
        f"{header['commit'][:10]}{changed}: {_code(header['command'])}"
    )
