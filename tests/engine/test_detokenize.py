"""Text of tokens: prompt and response are the decoded whole, in every family of tokenizers."""

from __future__ import annotations

from typing import Any

import pytest
from fuzz.texts import cleans_up, plain_text
from fuzz.texts import response_text as whole_minus_prompt
from fuzz.tokenizers import ALL_FAMILIES, has_byte_tokens, tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from stars_fast.engine.detokenize import (
    ResponseText,
    find_stop,
    response_text,
    token_offsets,
    token_text,
)
from stars_fast.prompts import Prompt
from stars_fast.server.transcript import TextDeltas
from stars_fast.text.decoders import CLEANED, NOTHING_HELD, cleaned, prompt_text

FACE = "\U0001f602"
WITH_BYTES = [family for family in ALL_FAMILIES if has_byte_tokens(family)]
TOKENIZERS: dict[str, Any] = {
    **{family: tokenizer(family, 520) for family in ALL_FAMILIES},
    "cleans_up": tokenizer("word_piece", 520, cleans_up=True),
    "slow": ByT5Tokenizer(extra_ids=0),
}
NOTHING = Prompt("", [])


def byte_ids(tok: Any, text: str) -> list[int]:
    """A text as byte tokens."""
    ids: list[int] = tok.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in text.encode()])
    return ids


def whole(tok: Any, ids: list[int]) -> str:
    """The text of a response to no prompt."""
    return response_text(tok, NOTHING).extended(ids).whole


def oracle(tok: Any, prompt: Prompt, ids: list[int]) -> str:
    """The decoded whole without the prompt's text."""
    if isinstance(tok, ByT5Tokenizer):
        before = tok.decode(prompt.token_ids, skip_special_tokens=True)
        text: str = tok.decode([*prompt.token_ids, *ids], skip_special_tokens=True)
        return text[len(before) :]
    return whole_minus_prompt(tok, prompt.text, prompt.token_ids, ids)


def ids_of(family: str, data: st.DataObject) -> list[int]:
    """Random tokens, whole and torn characters among them."""
    tok = TOKENIZERS[family]
    ids = data.draw(st.lists(st.integers(3, len(tok) - 1), max_size=45))
    if has_byte_tokens(family):
        some = st.text("\n\u20ac" + FACE, max_size=3).map(lambda text: byte_ids(tok, text))
        torn = st.lists(st.sampled_from(byte_ids(tok, "\n" + FACE)), max_size=4)
        for part in data.draw(st.lists(some | torn, max_size=4)):
            at = data.draw(st.integers(0, len(ids)))
            ids[at:at] = part
    words = data.draw(st.text("\u20ac\u00e9the 'n." + FACE, max_size=6))
    return ids + (tok(words, add_special_tokens=False)["input_ids"] or [3])


@pytest.mark.parametrize("family", TOKENIZERS)
@given(data=st.data())
def test_prompt_and_response_are_the_decoded_whole(family: str, data: st.DataObject) -> None:
    """However the response is cut into segments, and whatever is drawn beside it."""
    tok = TOKENIZERS[family]
    if data.draw(st.booleans()):
        words = data.draw(st.text("\u20ac\u00e9the 'n.\ufffd ", min_size=1, max_size=30))
        prompt = Prompt(words, tok(words)["input_ids"])
    else:
        ids = ids_of(family, data)
        prompt = Prompt(prompt_text(tok, ids), ids)
    ids = ids_of(family, data)
    text = response_text(tok, prompt)
    assert (text.text, text.decided) == ("", "")
    at = 0
    while at < len(ids):
        segment = ids[at : at + data.draw(st.integers(1, 24))]
        text.extended(ids_of(family, data))  # a candidate that is not taken
        longer = text.extended(segment)
        assert longer.text.startswith(text.text)
        text, at = longer, at + len(segment)
        assert text.whole == oracle(tok, prompt, ids[:at])
        waits = 8 if tok is TOKENIZERS["cleans_up"] else 1
        assert text.whole.startswith(text.text)
        assert len(text.whole) - len(text.text) <= waits
    both = plain_text(tok, prompt.token_ids + ids) if tok.is_fast else ""
    if tok.is_fast and not cleans_up(tok) and plain_text(tok, prompt.token_ids) == prompt.text:
        assert prompt.text + text.whole == both


def streamed(
    tok: Any, prompt: Prompt, ids: list[int], ends: list[int], stops: list[str]
) -> tuple[list[int], str]:
    """A response in segments that end at `ends`: its tokens and text; what is sent is checked."""
    deltas = TextDeltas(stops)
    sent, kept = "", list[int]()
    text = response_text(tok, prompt)
    shown = ""
    for end in [*sorted({min(end, len(ids)) for end in ends if end}), len(ids)]:
        segment = ids[len(kept) : end]
        found = find_stop(text, segment, stops) if stops else None
        count, at = found if found is not None else (len(segment), None)
        kept += segment[:count]
        text = text.extended(segment[:count])
        over = found is not None or end == len(ids)
        shown = text.whole[:at] if over else text.text
        sent += deltas.push(shown, finished=over)
        assert shown.startswith(sent)
        assert not any(stop in sent.removesuffix("\ufffd") for stop in stops)
        if over:
            break
    assert sent == shown
    return kept, shown


@pytest.mark.parametrize("family", TOKENIZERS)
@given(data=st.data())
def test_ends_of_segments_change_nothing(family: str, data: st.DataObject) -> None:
    """Segments end anywhere, inside characters and stop texts alike."""
    tok = TOKENIZERS[family]
    prompt = Prompt("the film", tok("the film")["input_ids"])
    ids = ids_of(family, data)[-24:]
    stops = data.draw(
        st.lists(st.text("theo .\u00e9\n" + FACE, min_size=1, max_size=3), max_size=2)
    )
    ends = data.draw(st.lists(st.integers(1, 24), max_size=6))
    one_by_one = streamed(tok, prompt, ids, list(range(1, len(ids))), stops)
    assert streamed(tok, prompt, ids, ends, stops) == one_by_one
    assert streamed(tok, prompt, ids, [], stops) == one_by_one
    # The first token that completes a stop text ends the response.
    kept, shown = one_by_one
    for count in range(1, len(kept) + 1):
        text = response_text(tok, prompt).extended(kept[:count]).decided
        found = [text.find(stop) for stop in stops if stop in text]
        assert not found or (count == len(kept) and shown == text[: min(found)])


@pytest.mark.parametrize("family", ["sentencepiece_first", "sentencepiece_always", "llama2"])
def test_a_response_keeps_its_leading_space(family: str) -> None:
    tok = TOKENIZERS[family]
    first, *_ = tok("the", add_special_tokens=False)["input_ids"]
    assert tok.convert_ids_to_tokens(first) == "\u2581the"
    assert response_text(tok, Prompt("a", tok("a")["input_ids"])).extended([first]).text == " the"
    # Special tokens are no text for it to stand behind.
    assert response_text(tok, Prompt("", [tok.bos_token_id])).extended([first]).text == "the"
    assert token_text(tok, [first]) == " the"


class Counted:
    """A tokenizer's `decode` with what it is asked for counted."""

    def __init__(self, tok: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens = 0
        decode = type(tok).decode

        def counted(inner: Any, token_ids: list[int], **options: Any) -> str:
            self.tokens += len(token_ids)
            text: str = decode(inner, token_ids, **options)
            return text

        monkeypatch.setattr(type(tok), "decode", counted)


@pytest.mark.parametrize("family", TOKENIZERS)
def test_the_cost_of_a_segment_does_not_grow(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tok = TOKENIZERS[family]
    ids = tok("The film was slow \u20ac, isn't it? " * 100, add_special_tokens=False)["input_ids"]
    stray = tok.convert_tokens_to_ids("<0x80>") if has_byte_tokens(family) else ids[-1]
    ids += [stray] * 500
    text = response_text(tok, Prompt("the film", tok("the film")["input_ids"]))
    counted = Counted(tok, monkeypatch)
    costs = []
    for token in ids:
        before = counted.tokens
        text = text.extended([token])
        find_stop(text, [token], ["never"])
        costs.append(counted.tokens - before)
    assert max(costs) < 300  # U+FFFD are three byte tokens each


@pytest.mark.parametrize("family", WITH_BYTES)
def test_bytes_that_are_characters_are_decoded_as_ever(family: str) -> None:
    tok = TOKENIZERS[family]
    ids = [*tok("a film")["input_ids"], *byte_ids(tok, f"\n{FACE}\u20ac"), *tok("ab")["input_ids"]]
    text = whole(tok, ids)
    assert text == tok.decode(ids, skip_special_tokens=True)
    assert f"\n{FACE}\u20ac" in text


@pytest.mark.parametrize("family", WITH_BYTES)
def test_a_character_cut_short_leaves_the_rest_as_it_is(family: str) -> None:
    tok = TOKENIZERS[family]
    start = tok.convert_tokens_to_ids("t")
    for kept in (1, 2, 3):
        torn = byte_ids(tok, "\n" + FACE)[: 1 + kept]
        assert whole(tok, [start, *torn]) == "t\n\ufffd"
        assert whole(tok, [start, *torn, start]) == "t\n\ufffdt"
        assert find_stop(response_text(tok, NOTHING), [start, *torn], ["\n"]) == (2, 1)
    (stray,) = tok.convert_tokens_to_ids(["<0x80>"])
    for count in range(1, 100):
        text = response_text(tok, NOTHING).extended([start, *[stray] * count])
        assert text.text == "t" + "\ufffd" * (count - 1)  # all but the last byte


@pytest.mark.parametrize("family", WITH_BYTES)
def test_a_character_that_the_prompt_ends_within_is_the_responses(family: str) -> None:
    tok = TOKENIZERS[family]
    face = byte_ids(tok, FACE)
    ids = [*tok("the film")["input_ids"], *face[:2]]
    prompt = Prompt(prompt_text(tok, ids), ids)
    assert prompt.text.endswith("film")
    assert response_text(tok, prompt).whole == ""
    assert response_text(tok, prompt).extended(face[2:3]).whole == "\ufffd"
    assert response_text(tok, prompt).extended(face[2:]).text == FACE
    # One that the user wrote is no such character.
    written = Prompt("film\ufffd", tok("film\ufffd")["input_ids"])
    assert response_text(tok, written).whole == ""
    assert response_text(tok, written).extended(face).text == FACE


@pytest.mark.parametrize("family", WITH_BYTES)
def test_what_stands_for_no_text_ends_no_character(family: str) -> None:
    tok = TOKENIZERS[family]
    begin, end = byte_ids(tok, "\u0373")
    for silent in (tok.eos_token_id, len(tok) + 3):
        assert whole(tok, [begin, silent]) == "\ufffd"
        assert whole(tok, [begin, silent, end]) == "\u0373"


def test_names_of_bytes_alone_are_text() -> None:
    """Where the decoder takes no token for a byte, one of that name stands for itself."""
    tok = tokenizer("word_level", 400)
    tok.add_tokens([f"<0x{byte:02X}>" for byte in range(256)])
    ids = tok.convert_tokens_to_ids(["<0xF0>", "<0x41>"])
    assert whole(tok, ids) == tok.decode(ids) == "<0xF0> <0x41>"


@given(st.lists(st.text(" .?!,'ntmsvea", max_size=6), max_size=12))
def test_spaces_are_cleaned_in_pieces_as_in_one(pieces: list[str]) -> None:
    tok = TOKENIZERS["cleans_up"]
    done, held = "", NOTHING_HELD
    for piece in pieces:
        text, held = cleaned(piece, held)
        done += text
        assert sum(map(len, held)) <= sum(len(pattern) - 1 for pattern in CLEANED)
    text, held = cleaned("", held, flush=True)
    assert done + text == tok.clean_up_tokenization("".join(pieces))
    assert held == NOTHING_HELD


@pytest.mark.parametrize("family", TOKENIZERS)
def test_offsets_are_where_tokens_begin(family: str) -> None:
    tok = TOKENIZERS[family]
    text = f"The film was slow. {FACE}\u20ac It isn't bad at all, or is it? " * 3
    ids = tok(text, add_special_tokens=False)["input_ids"]
    prompt = Prompt("a", tok("a")["input_ids"])
    start = response_text(tok, prompt)
    offsets = token_offsets(tok, prompt, ids)
    assert offsets == [len(start.extended(ids[:i]).text) for i in range(len(ids))]
    for first in (17, len(ids) - 1):
        assert token_offsets(tok, prompt, ids, first, offsets[first]) == offsets[first:]
    assert token_offsets(tok, prompt, []) == []
    done = start.extended(ids).whole
    if cleans_up(tok):
        return  # the space before an "n't" is there until the "'" comes
    for i, token in enumerate(ids):
        piece = token_text(tok, [token])
        if "\ufffd" not in piece and token not in tok.all_special_ids:
            assert done[offsets[i] :].startswith(piece)


def test_without_a_tokenizer_there_is_no_text() -> None:
    text = response_text(None, Prompt("", [1, 2]))
    assert isinstance(text, ResponseText)
    assert text.extended([1, 2, 3]).whole == ""
    assert token_text(None, [1]) == ""
