"""Text that is sent while it grows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stars_fast.server.transcript import TextDeltas
from stars_fast.text.decoders import overlap


def test_overlap_is_a_proper_beginning_of_the_stop_text() -> None:
    assert overlap("abc", "cd") == 1
    assert overlap("abab", "ababc") == 4
    assert overlap("ab", "ab") == 0  # then the response would have ended
    assert overlap("", "ab") == overlap("ab", "x") == 0


def test_the_beginning_of_a_stop_text_waits_until_it_is_decided() -> None:
    deltas = TextDeltas(["END"])
    assert deltas.push("one E", finished=False) == "one "
    assert deltas.push("one EN", finished=False) == ""
    assert deltas.push("one ENx E", finished=False) == "ENx "
    assert deltas.push("one ENx E", finished=True) == "E"


@given(
    st.lists(st.text("ab\U0001f600", min_size=1, max_size=6), max_size=5),
    st.text("ab\U0001f600", max_size=9),
)
def test_what_is_held_back_of_many_stop_texts(stops: list[str], text: str) -> None:
    held = max((overlap(text, stop) for stop in stops), default=0)
    assert TextDeltas(stops).push(text, finished=False) == text[: len(text) - held]
