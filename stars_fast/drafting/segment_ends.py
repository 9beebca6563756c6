"""Tokens at which a clause or a sentence ends."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

#: Levels of `segment_end_levels`: what ends with the token.
NONE, CLAUSE, SENTENCE = 0, 1, 2

# The second halves are the full-width signs of Chinese and Japanese.
_CLAUSE_ENDS = (",", ";", ":", "\uff0c", "\uff1b", "\uff1a", "\u3001")
_SENTENCE_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f", "\u2026")
_CLOSING = "\"')]}\u201d\u2019\u00bb"


def segment_end_level(text: str) -> int:
    """Return what ends with a token of this text: nothing, a clause, or a sentence.

    A line break ends a sentence, closing quotes and brackets go with what they close.
    """
    if "\n" in text:
        return SENTENCE
    bare = text.rstrip().rstrip(_CLOSING)
    if bare.endswith(_SENTENCE_ENDS):
        return SENTENCE
    return CLAUSE if bare.endswith(_CLAUSE_ENDS) else NONE


def segment_end_levels(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
    """Return int64 ``[vocab_size]``: the level of every token by its own text."""
    count = min(vocab_size, len(tokenizer))
    texts = tokenizer.batch_decode([[token] for token in range(count)])
    levels = torch.zeros(vocab_size, dtype=torch.int64)
    levels[:count] = torch.tensor([segment_end_level(text) for text in texts])
    return levels
