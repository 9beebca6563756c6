"""How a tokenizer decodes: ids in, text out, its bytes and its spaces cared for.

Beside `decode` of the tokenizer itself: bytes that are no character are U+FFFD one by one, in every
family, and the cleaning of spaces can be had of a text that comes in pieces.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeGuard, cast
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What bytes that are no character, or not yet one, are decoded to.
HALF_CHARACTER = "\ufffd"
#: Tokens that decide how the next one is decoded, by far: those of two characters would do.
CONTEXT = 16
#: What ``clean_up_tokenization_spaces`` does, one after the other: the space in front goes, and
#: of " ' " the one behind as well.
CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
#: What the steps of cleaning have held back of no text.
NOTHING_HELD = ("",) * len(CLEANED)


class Decodes(Protocol):
    """What is asked of a tokenizer whose texts are read and not written."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> object:
        """Return the text of the ids."""
        ...


class Decoder:
    """How one tokenizer decodes."""

    def __init__(self, tokenizer: Decodes | None) -> None:
        self._bytes: _ByteTokens | None = None
        self._silent: frozenset[int] = frozenset()
        self._known: Callable[[int], bool] = self._decodes_to_text
        self._decode: _Decode = getattr(tokenizer, "decode", _nothing)
        self._before: tuple[int, ...] = ()
        self.cleans_up = False
        #: Whether a token stands for text; remembered, as a round asks for every token it commits.
        self.speaks = functools.cache(self._speaks)
        if _is_tokenizer(tokenizer):
            special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
            self._silent = frozenset({*special, *tokenizer.all_special_ids})
            self._known = _knows(tokenizer)
            self._bytes = _byte_tokens(tokenizer)
            self.cleans_up = _cleans_up(tokenizer)
            self._decode = _decode_of(tokenizer, cleans_up=self.cleans_up)
            self._before = self._plain_token(tokenizer)

    def _speaks(self, token: int) -> bool:
        return token not in self._silent and self._known(token)

    def _decodes_to_text(self, token: int) -> bool:
        return bool(self.decode((token,)))

    def last_of(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """Return the last tokens that stand for text, as many as decide what follows."""
        found: list[int] = []
        for token in reversed(token_ids):
            if len(found) == CONTEXT:
                break
            if self.speaks(token):
                found.append(token)
        return tuple(reversed(found))

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Return the text of the ids as a text of its own, its spaces as they are.

        Bytes that are not UTF-8 become U+FFFD as everywhere, one for each character that is cut
        short. Decoders with byte fallback (Llama 2, Mistral, Gemma) would make a whole run of byte
        tokens U+FFFD while its last character lacks a byte: text that has been read would change.
        """
        ids = [token for token in token_ids if self._known(token)] if special else list(token_ids)
        if self._bytes is not None:
            silent = frozenset[int]() if special else self._silent
            ids = _valid_utf8(ids, self._bytes, silent)
        return str(self._decode(ids, skip_special_tokens=not special))

    def piece(self, token_ids: Sequence[int]) -> str:
        """Return the text that the ids are behind another text."""
        before = self.decode(self._before, special=True)
        return self.decode((*self._before, *token_ids), special=True)[len(before) :]

    def trimmed(
        self, window: tuple[int, ...], decoded: str, taken: int
    ) -> tuple[tuple[int, ...], int]:
        """Return the window without the tokens that are far from its end, if it is long."""
        if len(window) <= 2 * CONTEXT:
            return window, taken
        kept = window[-CONTEXT:]
        # What it begins with may change, not what it ends with.
        text = self.decode(kept)
        begin = len(text) - (len(decoded) - taken)
        near = max(0, begin - CONTEXT // 4)
        if begin <= 0 or not decoded.endswith(text[near:]):
            return window, taken
        return kept, begin

    def _plain_token(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        for text in ("a", "1", ".", "A"):  # a small vocabulary may lack some of them
            ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"][-1:])
            if ids and self.speaks(ids[0]) and self.decode(ids).strip():
                return ids
        return ()


_DECODERS: WeakKeyDictionary[PreTrainedTokenizerBase, Decoder] = WeakKeyDictionary()


def decoder_of(tokenizer: Decodes | None) -> Decoder:
    """Return how a tokenizer decodes; with None everything is empty."""
    if not _is_tokenizer(tokenizer):
        return Decoder(tokenizer)
    if tokenizer not in _DECODERS:
        _DECODERS[tokenizer] = Decoder(tokenizer)
    return _DECODERS[tokenizer]


def _is_tokenizer(tokenizer: Decodes | None) -> TypeGuard[PreTrainedTokenizerBase]:
    """Whether it is one of transformers', which is not imported for this."""
    return hasattr(tokenizer, "added_tokens_decoder")


def prompt_text(tokenizer: Decodes, token_ids: Sequence[int]) -> str:
    """Return the text of a prompt given as ids, special tokens included.

    A character that it ends within is left to the response.
    """
    decoder = decoder_of(tokenizer)
    text = decoder.decode(token_ids, special=True)
    if decoder.cleans_up:
        text, _ = cleaned(text, NOTHING_HELD, flush=True)
    return text.removesuffix(HALF_CHARACTER)


class _Decode(Protocol):
    def __call__(self, token_ids: list[int], *, skip_special_tokens: bool) -> object: ...


def _nothing(token_ids: list[int], *, skip_special_tokens: bool) -> str:
    return ""


def _decode_of(tokenizer: PreTrainedTokenizerBase, *, cleans_up: bool) -> _Decode:
    """Return what decodes without cleaning up.

    Where transformers only hands the ids on, this is whom it hands them to: a round decodes some
    hundred short texts, and looking at each of their ids takes longer than that.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    own = {"decode": "tokenization_utils_base", "_decode": "tokenization_utils_tokenizers"}
    if backend is not None and all(
        getattr(type(tokenizer), name).__module__ == f"transformers.{module}"
        for name, module in own.items()
    ):
        return cast("_Decode", backend.decode)
    if cleans_up:
        return cast(
            "_Decode", functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
        )
    return tokenizer.decode


def _knows(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], bool]:
    """Return what says whether a tokenizer has an id; of models there may be more."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return lambda token: backend.id_to_token(token) is not None
    size = 1 + max(tokenizer.get_vocab().values(), default=-1)
    return lambda token: 0 <= token < size


def halves(text: str) -> int:
    """Return how many U+FFFD a text ends with."""
    return len(text) - len(text.rstrip(HALF_CHARACTER))


# Spaces that are cleaned up


def _cleans_up(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer takes spaces out of what it has decoded, as word pieces need it."""
    if not tokenizer.clean_up_tokenization_spaces:
        return False
    name = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return type(getattr(backend, "model", None)).__name__ != "BPE" or getattr(tokenizer, name)


def cleaned(
    text: str, held: tuple[str, ...], *, flush: bool = False
) -> tuple[str, tuple[str, ...]]:
    """Clean up the spaces of a text that comes in pieces.

    Parameters
    ----------
    held
        What each step has kept back: the beginning of what it replaces, if it goes on so.
    flush
        Nothing follows.
    """
    after: list[str] = []
    for pattern, before in zip(CLEANED, held, strict=True):
        text = before + text
        kept = 0 if flush else overlap(text.split(pattern)[-1], pattern)
        end = len(text) - kept
        after.append(text[end:])
        text = text[:end].replace(pattern, pattern.strip())
    return text, tuple(after)


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with and goes beyond."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


# Tokens of single bytes


@dataclass(frozen=True)
class _ByteTokens:
    """Tokens that a decoder takes for single bytes: value by token, token by value."""

    byte_of: dict[int, int]
    token_of: list[int]


def _byte_tokens(tokenizer: PreTrainedTokenizerBase) -> _ByteTokens | None:
    """Return the tokens of bytes; None where bytes have none."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = cast("list[int]", tokenizer.convert_tokens_to_ids(names))
    # What is missing has the id of another token, or none. Names alone say nothing, either: the
    # decoder has to take them for bytes.
    if (
        None in tokens
        or tokenizer.convert_ids_to_tokens(tokens) != names
        or "<0x41>" in str(tokenizer.decode([tokens[0x41]]))
    ):
        return None
    return _ByteTokens({token: byte for byte, token in enumerate(tokens)}, tokens)


def _valid_utf8(ids: list[int], bytes_: _ByteTokens, silent: frozenset[int]) -> list[int]:
    """Return the ids, with the bytes of U+FFFD in the place of those that are no character.

    What stands for no text ends no character, and is left out.
    """
    if bytes_.byte_of.keys().isdisjoint(ids):
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
        elif token not in silent:
            end_run()
            valid.append(token)
    end_run()
    return valid
