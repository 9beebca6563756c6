"""What the ids of a response say: its text, what ends it, and what ends a clause or a sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_CLOSING = "[\\s\"')\\]}”’»]*"  # noqa: RUF001
_SENTENCE = re.compile(f"[.!?。！？…]{_CLOSING}$")  # noqa: RUF001
_CLAUSE = re.compile(f"[,;:，；：、]{_CLOSING}$")  # noqa: RUF001


def plain_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The text of ids, special tokens left out.

    A run of byte tokens is UTF-8 in which what is invalid becomes U+FFFD, as in Python. (Decoders
    of byte tokens give up a whole run instead for one byte that is.)
    """
    decoder = tokenizer.backend_tokenizer.decoder
    if decoder is None or "ByteFallback" not in str(decoder):
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))
    pieces: list[str] = []
    run = b""
    special = special_ids(tokenizer)
    for token in token_ids:
        piece = tokenizer.convert_ids_to_tokens(token)
        if token in special or piece is None:  # beyond the tokenizer's vocabulary
            continue
        byte = _BYTE.fullmatch(piece)
        if byte:
            run += bytes.fromhex(byte[1])
            continue
        if run:
            pieces.append(run.decode("utf-8", errors="replace"))
            run = b""
        pieces.append(piece)
    if run:
        pieces.append(run.decode("utf-8", errors="replace"))
    return str(decoder.decode(pieces))


def special_ids(tokenizer: Any) -> set[int]:
    """The ids of tokens that are no text."""
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def border_level(tokenizer: Any, token: int) -> int:
    """What ends with a token: nothing (0), a clause (1), a sentence (2)."""
    text = str(tokenizer.decode([token])) if token < len(tokenizer) else ""
    if "\n" in text or _SENTENCE.search(text):
        return 2
    return 1 if _CLAUSE.search(text) else 0


@dataclass(frozen=True)
class Ending:
    """The text of a response, and whether its last token ends it."""

    text: str
    stopped: bool


@dataclass(frozen=True)
class Texts:
    """Reads the responses of one request."""

    tokenizer: Any
    stop_texts: tuple[str, ...]
    stop_ids: frozenset[int]

    def read(self, token_ids: Sequence[int]) -> Ending:
        """Nothing before the last token must end the response."""
        if self.stop_texts:
            # What bytes at the end are is not known before the next token.
            text = plain_text(self.tokenizer, token_ids).removesuffix("\ufffd")
            found = [text.find(stop) for stop in self.stop_texts if stop in text]
            if found:
                return Ending(text[: min(found)], True)
        if token_ids and token_ids[-1] in self.stop_ids:
            return Ending(plain_text(self.tokenizer, token_ids[:-1]), True)
        return Ending(plain_text(self.tokenizer, token_ids), False)

    def stops(self, token_ids: Sequence[int]) -> bool:
        """Whether the last token ends the response."""
        if token_ids[-1] in self.stop_ids:
            return True
        return bool(self.stop_texts) and self.read(token_ids).stopped
