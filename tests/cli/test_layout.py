"""The page that ``stars-fast demo`` prints."""

from __future__ import annotations

import io

import pytest

from stars_fast.cli.layout import Page, Response, comparison
from stars_fast.outputs import CompletionOutput, Segment

PLAIN = Response(
    CompletionOutput(
        0,
        " The plot is slow and the ending is worse.\n\nI left early.",
        list(range(40)),
        reward=-12.25,
        finish_reason="stop",
        segments=[
            Segment(0, 16, -3.0, -1.0, 1, "fallback"),
            Segment(16, 32, -7.5, -0.5, 1, "fallback"),
            Segment(32, 40, -12.25, 0.0, 1, "fallback"),
        ],
    ),
    gold=-0.75,
)
ALIGNED = Response(
    CompletionOutput(
        0,
        " The plot is slow at first, " + "but the people are warm and the music is lovely " * 3,
        list(range(28)),
        reward=4.5,
        finish_reason="stop",
        segments=[
            Segment(0, 16, 1.25, 1.5, 2, "test"),
            Segment(16, 28, 4.5, 5.0, 20, "fallback"),
        ],
    ),
    gold=0.5,
)


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_page_fits_its_width_and_holds_everything(width: int) -> None:
    title = "Prompt 1 of 64: Review of the kettle: " + "I bought it in spring. " * 6
    text = comparison(Page(width, colour=False), title, {"unaligned": PLAIN, "STARS": ALIGNED})
    assert max(map(len, text.splitlines())) <= width
    assert "\033" not in text
    assert text.isascii()
    for side, response in enumerate((PLAIN, ALIGNED)):
        column = [line.split("|")[side] for line in text.splitlines() if "|" in line]
        assert " ".join(response.completion.text.split()) in " ".join(" ".join(column).split())
    assert "40 tokens, reward -12.25, gold -0.75" in text
    assert "28 tokens, reward +4.50, gold +0.50" in text
    table = [line.split() for line in text.splitlines()[-4:]]
    assert table == [
        ["tokens", "unaligned", "STARS", "threshold", "attempts", "accepted", "by"],
        ["0-16", "-3.00", "+1.25", "+1.50", "2", "test"],
        ["16-32", "-7.50", "+4.50", "+5.00", "20", "fallback"],
        ["32-40", "-12.25"],
    ]


def test_an_empty_response_without_a_reward() -> None:
    empty = Response(CompletionOutput(0, "", [1], finish_reason="stop"), gold=0.0)
    text = comparison(Page(80, colour=False), "x", {"unaligned": empty, "vanilla": empty})
    assert "(empty)" in text
    assert "1 tokens, reward none, gold +0.00" in text


def test_fallbacks_stand_out_in_colour() -> None:
    text = comparison(Page(80, colour=True), "x", {"unaligned": PLAIN, "STARS": ALIGNED})
    (line,) = [line for line in text.splitlines() if "fallback" in line]
    assert line.startswith("\033[33m")
    assert line.endswith("\033[0m")


@pytest.mark.parametrize(("columns", "width"), [("40", 80), ("93", 93), ("500", 120)])
def test_width_follows_the_terminal(
    columns: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert Page.of(io.StringIO()) == Page(width, colour=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert Page.of(Terminal()).colour
    assert not Page.of(io.StringIO()).colour
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Page.of(Terminal()).colour
