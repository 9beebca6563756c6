"""Two responses to a prompt side by side, and their segments, in 80 to 120 columns of text."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TextIO

from stars_fast.outputs import CompletionOutput
from stars_fast.tables import text_table

_BETWEEN = " | "


@dataclass(frozen=True)
class Page:
    """How text is set.

    Attributes
    ----------
    width
        Columns, 80 to 120.
    colour
        Whether escape sequences for bold and coloured text are used.
    """

    width: int
    colour: bool

    @classmethod
    def of(cls, stream: TextIO) -> Page:
        """The page for `stream`: as wide as the terminal, 100 without one; colour on one only."""
        columns = shutil.get_terminal_size((100, 24)).columns
        colour = stream.isatty() and "NO_COLOR" not in os.environ
        return cls(min(max(columns, 80), 120), colour)

    def bold(self, text: str) -> str:
        """`text`, bold where there is colour."""
        return f"\033[1m{text}\033[0m" if self.colour else text

    def yellow(self, text: str) -> str:
        """`text`, yellow where there is colour."""
        return f"\033[33m{text}\033[0m" if self.colour else text


@dataclass(frozen=True)
class Response:
    """A response and its gold score."""

    completion: CompletionOutput
    gold: float

    @property
    def summary(self) -> str:
        """Length and scores in one line."""
        tokens = len(self.completion.token_ids)
        reward = _signed(self.completion.reward) or "none"
        return f"{tokens} tokens, reward {reward}, gold {self.gold:+.2f}"


def comparison(page: Page, title: str, sides: Mapping[str, Response]) -> str:
    """Two responses to a prompt, and what was decided on the way to the second.

    Parameters
    ----------
    page
        How to set it.
    title
        The prompt, in words for a heading.
    sides
        The unaligned and the aligned response, each under its name.
    """
    lines = [page.bold(line) for line in textwrap.wrap(title, page.width)]
    lines += ["-" * page.width]
    column = (page.width - len(_BETWEEN)) // 2
    lines += _side_by_side([_block(name, side, column) for name, side in sides.items()], column)
    lines += ["", *_segment_table(page, sides)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _block(name: str, response: Response, width: int) -> list[str]:
    paragraphs = response.completion.text.strip().splitlines() or ["(empty)"]
    text = [line for part in paragraphs for line in textwrap.wrap(part, width) or [""]]
    return [name, *text, "", response.summary]


def _side_by_side(blocks: Sequence[list[str]], column: int) -> list[str]:
    # The summaries, last in each block, stand on one line.
    rows = max(map(len, blocks))
    left, right = ([*b[:-1], *[""] * (rows - len(b)), b[-1]] for b in blocks)
    return [f"{a:<{column}}{_BETWEEN}{b}" for a, b in zip(left, right, strict=True)]


def _segment_table(page: Page, sides: Mapping[str, Response]) -> list[str]:
    heading = ("tokens", *sides, "threshold", "attempts", "accepted by")
    table: list[tuple[str, ...]] = [heading]
    for plain, aligned in zip_longest(*(side.completion.segments for side in sides.values())):
        segments = [segment for segment in (plain, aligned) if segment is not None]
        span = f"{segments[0].start}-{max(segment.end for segment in segments)}"
        rewards = [_signed(segment.reward if segment else None) for segment in (plain, aligned)]
        test = ("", "", "")
        if aligned is not None and aligned.threshold is not None:
            test = (_signed(aligned.threshold), str(aligned.attempts), aligned.accepted)
        table.append((span, *rewards, *test))
    return [
        page.yellow(line) if row[-1] == "fallback" else line
        for row, line in zip(table, text_table(table, left=()), strict=True)
    ]


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"
