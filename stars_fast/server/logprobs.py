"""Log-probabilities of tokens, with the tokens' texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stars_fast import outputs
from stars_fast.engine.detokenize import token_offsets, token_text
from stars_fast.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    top
        The most likely tokens at its place, the most likely first.
    """

    text: str
    logprob: float | None
    offset: int
    top: Sequence[tuple[str, float]]

    def top_by_text(self) -> dict[str, float] | None:
        """Return the most likely tokens and this one by their texts; None for a text's first.

        Of tokens with one text the likeliest is there.
        """
        if self.logprob is None:
            return None
        found: dict[str, float] = {}
        for text, value in [*self.top, (self.text, self.logprob)]:
            found[text] = max(value, found.get(text, value))
        return found


class Scores:
    """Writes the scores of tokens.

    Parameters
    ----------
    tokenizer
        The language model's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer

    def of_response(
        self,
        prompt: Prompt,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        top: Sequence[Mapping[int, float]],
        begin: int = 0,
    ) -> list[TokenScore]:
        """Return the last tokens of a response, as many as there are log-probabilities.

        `begin`: where the first of them begins in the response's text.
        """
        first = len(token_ids) - len(logprobs)
        offsets = token_offsets(self._tokenizer, prompt, token_ids, first, begin)
        return list(self._written(token_ids[first:], logprobs, offsets, top))

    def of_prompt(
        self, token_ids: Sequence[int], scores: Sequence[outputs.TokenScore]
    ) -> list[TokenScore]:
        """Return the tokens of a prompt."""
        offsets = token_offsets(self._tokenizer, Prompt("", []), token_ids)
        logprobs = [score.logprob for score in scores]
        return list(self._written(token_ids, logprobs, offsets, [score.top for score in scores]))

    def _written(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float | None],
        offsets: Sequence[int],
        top: Sequence[Mapping[int, float]],
    ) -> Iterator[TokenScore]:
        for number, (token, value) in enumerate(zip(token_ids, logprobs, strict=True)):
            likely = dict(top[number]) if top else {}
            if token in likely and value is not None:
                likely[token] = value  # taken from elsewhere, it may differ by rounding
            best = [(self._text(one), max(x, LEAST_LOGPROB)) for one, x in likely.items()]
            least = None if value is None else max(value, LEAST_LOGPROB)
            yield TokenScore(self._text(token), least, offsets[number], best)

    def _text(self, token: int) -> str:
        return token_text(self._tokenizer, [token])
