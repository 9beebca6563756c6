"""Text of tokens: the same wherever segments end, in every family of tokenizers."""

from __future__ import annotations

from typing import Any

import pytest
from fuzz.tokenizers import FAMILIES, has_byte_tokens, tokenizer
from hypothesis import given
from hypothesis import strategies as st

from stars_fast.engine.detokenize import decode, find_stop, rewrites_spaces, settled, token_offsets
from stars_fast.server.transcript import TextDeltas

FACE = "\U0001f602"
WITH_BYTES = [family for family in FAMILIES if has_byte_tokens(family)]
TOKENIZERS = {
    **{family: tokenizer(family, 520) for family in FAMILIES},
    "cleans_up": tokenizer("word_piece", 520, cleans_up=True),
}


def byte_ids(tok: Any, text: str) -> list[int]:
    """A text as byte tokens."""
    ids: list[int] = tok.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in text.encode()])
    return ids


def streamed(tok: Any, ids: list[int], ends: list[int], stops: list[str]) -> tuple[list[int], str]:
    """A response in segments that end at `ends`: its tokens and text; what is sent is checked."""
    deltas = TextDeltas(stops, rewrites_spaces=rewrites_spaces(tok))
    sent, committed = "", list[int]()
    for end in [*sorted({min(end, len(ids)) for end in ends if end}), len(ids)]:
        segment = ids[len(committed) : end]
        found = find_stop(tok, committed, segment, stops)
        kept, at = found if found is not None else (len(segment), None)
        committed += segment[:kept]
        text = decode(tok, committed)[:at]
        over = found is not None or end == len(ids)
        sent += deltas.push(text, finished=over)
        assert text.startswith(sent)
        assert not any(stop in settled(sent) for stop in stops)
        if over:
            break
    assert sent == text
    return committed, text


@pytest.mark.parametrize("family", TOKENIZERS)
@given(data=st.data())
def test_ends_of_segments_change_nothing(family: str, data: st.DataObject) -> None:
    """Segments end anywhere, inside characters and stop texts alike."""
    tok = TOKENIZERS[family]
    ids = data.draw(st.lists(st.integers(3, len(tok) - 1), max_size=16))
    if has_byte_tokens(family):
        some = st.text("\n\u20ac" + FACE, max_size=3).map(lambda text: byte_ids(tok, text))
        torn = st.lists(st.sampled_from(byte_ids(tok, "\n" + FACE)), max_size=4)
        for part in data.draw(st.lists(some | torn, max_size=4)):
            at = data.draw(st.integers(0, len(ids)))
            ids[at:at] = part
    ids += tok(data.draw(st.text("\u20ac\u00e9the 'n.", max_size=6)), add_special_tokens=False)[
        "input_ids"
    ] or [3]
    stops = data.draw(
        st.lists(st.text("theo .\u00e9\n" + FACE, min_size=1, max_size=3), max_size=2)
    )
    ends = data.draw(st.lists(st.integers(1, 24), max_size=6))
    one_by_one = streamed(tok, ids, list(range(1, len(ids))), stops)
    assert streamed(tok, ids, ends, stops) == one_by_one
    assert streamed(tok, ids, [], stops) == one_by_one


@pytest.mark.parametrize("family", WITH_BYTES)
def test_bytes_that_are_characters_are_decoded_as_ever(family: str) -> None:
    tok = TOKENIZERS[family]
    ids = [*tok("a film")["input_ids"], *byte_ids(tok, f"\n{FACE}\u20ac"), *tok("ab")["input_ids"]]
    text = decode(tok, ids)
    assert text == tok.decode(ids, skip_special_tokens=True)
    assert f"\n{FACE}\u20ac" in text


@pytest.mark.parametrize("family", WITH_BYTES)
def test_a_character_cut_short_leaves_the_rest_as_it_is(family: str) -> None:
    tok = TOKENIZERS[family]
    start = tok.convert_tokens_to_ids("t")
    for kept in (1, 2, 3):
        torn = byte_ids(tok, "\n" + FACE)[: 1 + kept]
        assert decode(tok, [start, *torn]) == "t\n\ufffd"
        assert decode(tok, [start, *torn, start]) == "t\n\ufffdt"
        assert find_stop(tok, [], [start, *torn], ["\n"]) == (2, 1)
    (stray,) = tok.convert_tokens_to_ids(["<0x80>"])
    deltas, sent = TextDeltas(), ""
    for count in range(1, 20):
        sent += deltas.push(decode(tok, [start, *[stray] * count]), finished=False)
        assert len(sent) == count  # all but the last byte


@pytest.mark.parametrize("family", WITH_BYTES)
def test_what_stands_for_no_text_ends_no_character(family: str) -> None:
    tok = TOKENIZERS[family]
    begin, end = byte_ids(tok, "\u0373")
    for silent in (tok.eos_token_id, len(tok) + 3):
        assert decode(tok, [begin, silent]) == "\ufffd"
        assert decode(tok, [begin, silent, end]) == "\u0373"


def test_names_of_bytes_alone_are_text() -> None:
    """Where the decoder takes no token for a byte, one of that name stands for itself."""
    tok = tokenizer("word_level", 400)
    tok.add_tokens([f"<0x{byte:02X}>" for byte in range(256)])
    ids = tok.convert_tokens_to_ids(["<0xF0>", "<0x41>"])
    assert decode(tok, ids) == tok.decode(ids) == "<0xF0> <0x41>"


@pytest.mark.parametrize("family", TOKENIZERS)
def test_offsets_are_where_tokens_begin(family: str) -> None:
    tok = TOKENIZERS[family]
    text = f"The film was slow. {FACE}\u20ac It isn't bad at all, or is it? " * 3
    ids = tok(text, add_special_tokens=False)["input_ids"]
    offsets = token_offsets(tok, ids)
    assert offsets == [len(settled(decode(tok, ids[:i]))) for i in range(len(ids))]
    assert token_offsets(tok, ids, 17) == offsets[17:]
    assert token_offsets(tok, [], 0) == []
    whole = decode(tok, ids)
    if rewrites_spaces(tok):
        return  # the space before an "n't" is there until the "'" comes
    for i, token in enumerate(ids):
        alone = tok.decode([token]).strip().removeprefix("##")
        if "\ufffd" not in alone and token not in tok.all_special_ids:
            assert whole[offsets[i] :].lstrip().startswith(alone)
