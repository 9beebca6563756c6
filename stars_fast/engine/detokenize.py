"""The text of a response: the same for its tokens, wherever its segments end."""

from __future__ import annotations

from collections.abc import Sequence
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


#: Byte values by the id of their token, of each tokenizer; empty where bytes have none.
_BYTE_TOKENS: WeakKeyDictionary[PreTrainedTokenizerBase, dict[int, int]] = WeakKeyDictionary()


def _byte_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, int]:
    known = _BYTE_TOKENS.get(tokenizer)
    if known is None:
        vocabulary = tokenizer.get_vocab()
        names = {f"<0x{byte:02X}>": byte for byte in range(256)}
        known = {vocabulary[name]: byte for name, byte in names.items() if name in vocabulary}
        # Names alone say nothing: the decoder has to take them for bytes.
        if len(known) < 256 or "<0x41>" in tokenizer.decode([vocabulary["<0x41>"]]):
            known = {}
        _BYTE_TOKENS[tokenizer] = known
    return known


def _valid_utf8(ids: list[int], byte_tokens: dict[int, int]) -> list[int]:
    """Return the ids, with the bytes of U+FFFD in the place of those that are no character."""
    if byte_tokens.keys().isdisjoint(ids):
        return ids
    token_of = {byte: token for token, byte in byte_tokens.items()}
    valid: list[int] = []
    run = bytearray()
    for token in [*ids, -1]:
        byte = byte_tokens.get(token)
        if byte is not None:
            run.append(byte)
            continue
        valid += [token_of[byte] for byte in run.decode(errors="replace").encode()]
        run.clear()
        valid.append(token)
    return valid[:-1]
