"""The text of a response: the same for its tokens, wherever its segments end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

#: What bytes that are no character, or not yet one, are decoded to.
HALF_CHARACTER = "\ufffd"
_CONTEXT = 16  # tokens that decide how the next one is decoded, by far


class Decodes(Protocol):
    """What is asked of a tokenizer whose texts are read and not written."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> object:
        """Return the text of the ids."""
        ...


def decode(tokenizer: Decodes | None, token_ids: Sequence[int]) -> str:
    """Return the text of a response, special tokens left out; empty without a tokenizer.

    Bytes that are not UTF-8 become U+FFFD as everywhere, one for each character that is cut short.
    Decoders with byte fallback (Llama 2, Mistral, Gemma) would make a whole run of byte tokens
    U+FFFD while its last character lacks a byte: text that has been read would change.
    """
    if tokenizer is None:
        return ""
    ids = list(token_ids)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        ids = _valid_utf8(ids, _byte_tokens(tokenizer))
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def settled(text: str) -> str:
    """Return the part of a decoded text that more tokens do not change.

    A character that lacks bytes, three at most, is one U+FFFD at the end. Where the tokenizer
    `rewrites_spaces`, the last word may change, too.
    """
    return text.removesuffix(HALF_CHARACTER)


def rewrites_spaces(tokenizer: Decodes | None) -> bool:
    """Whether white space depends on what follows it (``clean_up_tokenization_spaces``)."""
    return bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))


def token_offsets(tokenizer: Decodes | None, token_ids: Sequence[int], first: int = 0) -> list[int]:
    """Return where in a response's text each of its tokens begins, from number `first` on.

    A token that continues a character begins where the character does.
    """

    def length(begin: int, end: int) -> int:
        return len(settled(decode(tokenizer, token_ids[begin:end])))

    offsets = [length(0, first)]
    for end in range(first + 1, len(token_ids)):
        begin = max(0, end - _CONTEXT)
        offsets.append(offsets[-1] + length(begin, end) - length(begin, end - 1))
    return offsets[: len(token_ids) - first]


def find_stop(
    tokenizer: Decodes,
    committed: list[int],
    segment: list[int],
    stops: Sequence[str],
) -> tuple[int, int] | None:
    """Return where a stop text ends the response, if the segment completes one.

    Returns
    -------
    tuple[int, int] or None
        The fewest tokens of the segment that complete a stop text, and where that text begins in
        the response's text.
    """

    def begin(kept: int) -> int | None:
        text = settled(decode(tokenizer, committed + segment[:kept]))
        return min((at for at in map(text.find, stops) if at >= 0), default=None)

    if not rewrites_spaces(tokenizer) and begin(len(segment)) is None:
        return None
    for kept in range(1, len(segment) + 1):
        found = begin(kept)
        if found is not None:
            return kept, found
    return None


@dataclass(frozen=True)
class _ByteTokens:
    """The tokens of single bytes, and those that stand for no text.

    Attributes
    ----------
    byte_of
        Value by token.
    token_of
        Token by value.
    silent
        Special tokens, which are left out of texts.
    size
        Tokens known; ids from here on are left out, too.
    """

    byte_of: dict[int, int]
    token_of: list[int]
    silent: frozenset[int]
    size: int


#: None where bytes have no tokens.
_BYTE_TOKENS: WeakKeyDictionary[PreTrainedTokenizerBase, _ByteTokens | None] = WeakKeyDictionary()


def _byte_tokens(tokenizer: PreTrainedTokenizerBase) -> _ByteTokens | None:
    if tokenizer not in _BYTE_TOKENS:
        _BYTE_TOKENS[tokenizer] = _find_byte_tokens(tokenizer)
    return _BYTE_TOKENS[tokenizer]


def _find_byte_tokens(tokenizer: PreTrainedTokenizerBase) -> _ByteTokens | None:
    vocabulary = tokenizer.get_vocab()
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    # Names alone say nothing: the decoder has to take them for bytes.
    if not vocabulary.keys() >= set(names) or "<0x41>" in tokenizer.decode([vocabulary["<0x41>"]]):
        return None
    tokens = [vocabulary[name] for name in names]
    silent = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return _ByteTokens(
        {token: byte for byte, token in enumerate(tokens)},
        tokens,
        frozenset({*silent, *tokenizer.all_special_ids}),
        len(tokenizer),
    )


def _valid_utf8(ids: list[int], bytes_: _ByteTokens | None) -> list[int]:
    """Return the ids, with the bytes of U+FFFD in the place of those that are no character.

    What stands for no text ends no character, and is left out.
    """
    if bytes_ is None or bytes_.byte_of.keys().isdisjoint(ids):
        return ids
    valid: list[int] = []
    run = bytearray()

    def end_run() -> None:
        text = run.decode(errors="replace")
        valid.extend(bytes_.token_of[byte] for byte in text.encode())
        run.clear()

    for token in ids:
        byte = bytes_.byte_of.get(token)
        if byte is not None:
            run.append(byte)
        elif token not in bytes_.silent and token < bytes_.size:
            end_run()
            valid.append(token)
    end_run()
    return valid
