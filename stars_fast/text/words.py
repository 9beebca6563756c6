"""The tokens of words that a response must not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from stars_fast.text.decoders import Decodes
from stars_fast.text.tokenization import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def word_tokens(tokenizer: Decodes | None, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of each word by itself and, where they are as many, behind a space.

    As vLLM reads its ``bad_words``.
    """
    if not words:
        return ()
    assert tokenizer is not None  # checked when the request came
    stripped = [word.lstrip() for word in words]
    encoder = TextEncoder(cast("PreTrainedTokenizerBase", tokenizer), add_special_tokens=False)
    ids = encoder.encode([*stripped, *(f" {word}" for word in stripped)])
    found: dict[tuple[int, ...], None] = {}
    for alone, behind in zip(ids[: len(words)], ids[len(words) :], strict=True):
        found[tuple(alone)] = None
        if len(behind) == len(alone) and behind[0] != alone[0]:
            found[tuple(behind)] = None
    return tuple(word for word in found if word)
