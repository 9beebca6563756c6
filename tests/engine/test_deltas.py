"""Text that is sent while it grows."""

from __future__ import annotations

from stars_fast.server.transcript import TextDeltas, overlap


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


def test_half_a_character_waits_for_the_rest() -> None:
    deltas = TextDeltas()
    assert deltas.push("a\ufffd", finished=False) == "a"
    # What is no character goes out once that is known; of one that lacks bytes there is one.
    assert deltas.push("a\u20ac\ufffd\ufffd", finished=False) == "\u20ac\ufffd"
    assert deltas.push("a\u20ac\ufffd\ufffd!", finished=False) == "\ufffd!"
    assert deltas.push("a\u20ac\ufffd\ufffd!\ufffd", finished=True) == "\ufffd"


def test_white_space_that_may_be_rewritten_waits() -> None:
    deltas = TextDeltas(rewrites_spaces=True)
    sent = deltas.push("they do n", finished=False)
    sent += deltas.push("they don't '", finished=False)
    sent += deltas.push("they don't'x no", finished=False)
    assert sent == "they don't'x"
    sent += deltas.push("they don't'x no", finished=True)
    assert sent == "they don't'x no"
