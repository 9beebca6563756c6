"""What the ids of a response say: its text, what ends it, and what ends a clause or a sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fuzz.prompts import ReadPrompt

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_CLOSING = "[\\s\"')\\]}”’»]*"  # noqa: RUF001
_SENTENCE = re.compile(f"[.!?。！？…]{_CLOSING}$")  # noqa: RUF001
_CLAUSE = re.compile(f"[,;:，；：、]{_CLOSING}$")  # noqa: RUF001


def plain_text(tokenizer: Any, token_ids: Sequence[int], *, with_special: bool = False) -> str:
    """The text of ids, special tokens left out or not, spaces not cleaned up.

    A run of byte tokens is UTF-8 in which what is invalid becomes U+FFFD, as in Python. (Decoders
    of byte tokens give up a whole run instead for one byte that is.)
    """
    decoder = tokenizer.backend_tokenizer.decoder
    if decoder is None or "ByteFallback" not in str(decoder):
        return str(
            tokenizer.decode(
                list(token_ids),
                skip_special_tokens=not with_special,
                clean_up_tokenization_spaces=False,
            )
        )
    pieces: list[str] = []
    run = b""
    special = special_ids(tokenizer)
    for token in token_ids:
        piece = tokenizer.convert_ids_to_tokens(token)
        if (
            token in special and not with_special
        ) or piece is None:  # beyond the tokenizer's vocabulary
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


def response_text(
    tokenizer: Any, prompt: str, prompt_ids: Sequence[int], token_ids: Sequence[int]
) -> str:
    """What a response adds to its prompt: the decoded whole without the decoded prompt.

    Of a character that the prompt ends within the prompt has nothing.
    """
    silent = special_ids(tokenizer)
    if all(i in silent or tokenizer.convert_ids_to_tokens(i) is None for i in token_ids):
        return ""
    before = plain_text(tokenizer, prompt_ids)
    whole = plain_text(tokenizer, [*prompt_ids, *token_ids])
    torn = _halves(before) > _halves(prompt)
    text = whole[len(before) - torn :]
    return str(tokenizer.clean_up_tokenization(text)) if cleans_up(tokenizer) else text


def cleans_up(tokenizer: Any) -> bool:
    """Whether a tokenizer takes spaces out of what it has decoded; those of BPE never do."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    bpe = backend is not None and type(backend.model).__name__ == "BPE"
    return bool(tokenizer.clean_up_tokenization_spaces) and not bpe


def _halves(text: str) -> int:
    return len(text) - len(text.rstrip("\ufffd"))


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
    prompt: ReadPrompt
    stop_texts: tuple[str, ...]
    stop_ids: frozenset[int]
    min_tokens: int = 0  # which complete no stop text

    def read(self, token_ids: Sequence[int]) -> Ending:
        """Nothing before the last token must end the response."""
        if self.stop_texts and len(token_ids) > self.min_tokens:
            # What bytes at the end are is not known before the next token.
            text = self.whole(token_ids).removesuffix("\ufffd")
            early = len(self.whole(token_ids[: self.min_tokens]).removesuffix("\ufffd"))
            starts = [(stop, max(0, early - len(stop) + 1)) for stop in self.stop_texts]
            found = [at for stop, start in starts if (at := text.find(stop, start)) >= 0]
            if found:
                return Ending(text[: min(found)], True)
        if token_ids and token_ids[-1] in self.stop_ids:
            return Ending(self.whole(token_ids[:-1]), True)
        return Ending(self.whole(token_ids), False)

    def is_so_far(self, text: str, token_ids: Sequence[int]) -> bool:
        """Whether a text is what is shown of a response that goes on.

        The end may wait for its spaces to be cleaned up.
        """
        known = self.whole(token_ids).removesuffix("\ufffd")
        waits = 8 if cleans_up(self.tokenizer) else 0
        return known.startswith(text) and len(known) - len(text) <= waits

    def whole(self, token_ids: Sequence[int]) -> str:
        """The text, a stop text that ends it included."""
        return response_text(self.tokenizer, self.prompt.text, self.prompt.token_ids, token_ids)

    def stops(self, token_ids: Sequence[int]) -> bool:
        """Whether the last token ends the response."""
        if token_ids[-1] in self.stop_ids:
            return True
        return bool(self.stop_texts) and self.read(token_ids).stopped
