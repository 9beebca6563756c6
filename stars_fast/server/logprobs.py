"""Log-probabilities of tokens, with the tokens' texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from stars_fast.engine.detokenize import token_offsets, token_text
from stars_fast.prompts import Prompt

#: Stands for minus infinity, which JSON does not have.
LEAST_LOGPROB = -9999.0


@dataclass(frozen=True)
class TokenScore:
    """A token as ``logprobs`` shows it.

    Attributes
    ----------
    text
        Special tokens included.
    logprob
        None for a text's first token, before which there is nothing.
    offset
        Where in the choice's text it begins.
    """

    text: str
    logprob: float | None
    offset: int


def response_scores(
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    begin: int = 0,
) -> list[TokenScore]:
    """Return the last tokens of a response, as many as there are log-probabilities.

    `begin`: where the first of them begins in the response's text.
    """
    first = len(token_ids) - len(logprobs)
    offsets = token_offsets(tokenizer, prompt, token_ids, first, begin)
    return [
        TokenScore(token_text(tokenizer, [token]), max(value, LEAST_LOGPROB), offset)
        for token, value, offset in zip(token_ids[first:], logprobs, offsets, strict=True)
    ]
