"""Text that is sent while it grows."""

from __future__ import annotations

from helpers.tiny_tokenizers import bpe_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from stars_fast.deltas import TextDeltas, overlap
from stars_fast.responses import decode, find_stop


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
    assert deltas.push("a\u20ac\ufffd\ufffd", finished=False) == "\u20ac"
    # A replacement character that the model did write goes out once it is known to be one.
    assert deltas.push("a\u20ac\ufffd!", finished=False) == "\ufffd!"
    assert deltas.push("a\u20ac\ufffd!\ufffd", finished=True) == "\ufffd"


def test_white_space_that_may_be_rewritten_waits() -> None:
    deltas = TextDeltas(rewrites_spaces=True)
    sent = deltas.push("they do n", finished=False)
    sent += deltas.push("they don't '", finished=False)
    sent += deltas.push("they don't'x no", finished=False)
    assert sent == "they don't'x"
    sent += deltas.push("they don't'x no", finished=True)
    assert sent == "they don't'x no"


@given(
    ids=st.lists(st.integers(3, 399), min_size=1, max_size=24),
    cuts=st.lists(st.integers(0, 24), max_size=6),
    stops=st.lists(st.text("theo .\u00e9", min_size=1, max_size=4), max_size=2),
    more=st.text("\u20ac\U0001f600\u00e9the ", max_size=6),
)
def test_deltas_add_up_and_hold_no_stop_text(
    ids: list[int], cuts: list[int], stops: list[str], more: str
) -> None:
    """Segments cut anywhere, inside characters and stop texts alike."""
    tokenizer = bpe_tokenizer()
    ids = ids + tokenizer(more, add_special_tokens=False)["input_ids"]
    deltas, sent, committed = TextDeltas(stops), "", list[int]()
    borders = sorted({min(cut, len(ids)) for cut in cuts} | {len(ids)})
    for border in borders:
        segment = ids[len(committed) : border]
        found = find_stop(tokenizer, committed, segment, stops)
        kept, at = found if found is not None else (len(segment), None)
        committed += segment[:kept]
        text = decode(tokenizer, committed)[:at]
        ended = found is not None or border == len(ids)
        sent += deltas.push(text, finished=ended)
        assert text.startswith(sent)
        assert not any(stop in sent for stop in stops)
        if ended:
            assert sent == text
            return
