"""Log-probabilities that a causal language model gives to responses, from a cache of its own.

A `Persona` and a `LogRatio` are made of it: `CausalScorer` runs the new tokens of each candidate,
and `NextTokens` reads the log-probability of what follows the committed text.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from stars_fast.models.images import ImageEncoder
from stars_fast.models.logits import LogitHead
from stars_fast.models.paged import PagedModel
from stars_fast.rewards.base import Prompt, ScoreJob
from stars_fast.rewards.causal import CausalScorer
from stars_fast.rewards.reading import Cut, NextTokens
from stars_fast.rewards.split_ids import Ids, common_length
from stars_fast.rewards.tokens import Encoded, TokenPrompt, TokenSource, behind_committed

__all__ = ["DrawnTokens", "PromptTokens", "WholeResponse", "log_prob_scorer"]


class DrawnTokens(TokenSource):
    """A prompt's ids, and behind them response ids as the language model drew them.

    Parameters
    ----------
    vocab_size : int
        Token ids that the model knows; others are an error of their request or job.
    whose : str
        What the model is called in errors.
    """

    needs_text = False

    def __init__(self, vocab_size: int, whose: str) -> None:
        self._vocab_size = vocab_size
        self._whose = whose

    @abstractmethod
    def bind(self, prompt: Prompt) -> TokenPrompt:
        """Return the prompt's ids, checked."""

    def encode(
        self, prompts: Sequence[TokenPrompt], jobs: Sequence[ScoreJob], committed: Sequence[Ids]
    ) -> list[Encoded | Exception]:
        """Return the prompt's ids and the response's of each job."""
        encoded: list[Encoded | Exception] = []
        for prompt, job, ids in zip(prompts, jobs, committed, strict=True):
            try:
                self._check(np.asarray(job.new_ids, np.int64), "response_ids")
            except ValueError as error:
                encoded.append(error)
            else:
                shared, rest = behind_committed(prompt.empty_ids, job, ids)
                encoded.append(Encoded(rest, shared=shared))
        return encoded

    def _check(self, ids: Ids, name: str) -> None:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self._vocab_size:
            raise ValueError(
                f"{name} must lie in [0, {self._vocab_size}), the vocabulary of {self._whose}, got "
                f"{int(ids.min())} to {int(ids.max())}"
            )


class PromptTokens(DrawnTokens):
    """The ids that the language model reads and draws, as they are.

    Parameters
    ----------
    vocab_size, whose
        See `DrawnTokens`.
    images : ImageEncoder or None
        The model's, which then sees the images of prompts.
    """

    def __init__(self, vocab_size: int, whose: str, images: ImageEncoder | None = None) -> None:
        super().__init__(vocab_size, whose)
        self._images = images

    def bind(self, prompt: Prompt) -> TokenPrompt:
        """Return the language model's own prompt."""
        if prompt.images is not None and self._images is not None:
            seen = self._images.see(prompt)
            return TokenPrompt(seen.scheduler_ids, len(seen.scheduler_ids), seen=seen)
        ids = np.asarray(prompt.token_ids, np.int64)
        if not len(ids):
            raise ValueError(f"the prompt is empty: {self._whose} has no token to read")
        self._check(ids, "prompt_token_ids")
        return TokenPrompt(ids, len(ids))


class WholeResponse(NextTokens):
    """The log-probability of the whole response, of which nothing is cached.

    For texts that are tokenised again: a new segment may change the last tokens of the text before
    it. What a template has behind the response is not read. A token that a response shares with the
    end of its prompt counts as the response's.
    """

    def prefix(self, prompt: TokenPrompt) -> int:
        """Return the ids before the response, but for the last."""
        return max(prompt.stem - 1, 0)

    def cut(self, text: Encoded, prompt: TokenPrompt, committed: Ids) -> Cut | float | Exception:
        """Return the ids but the last of the response; 0.0 where there is none."""
        ids = text.ids
        end = len(ids) - prompt.tail
        first = max(min(prompt.stem, common_length(ids, prompt.empty_ids)) - 1, 0)
        if end <= first + 1:
            return 0.0
        return Cut(ids[: end - 1], first, first, ids[first + 1 : end])


def log_prob_scorer(
    model: PagedModel,
    source: TokenSource,
    *,
    max_rows: int,
    max_batch_tokens: int = 8192,
    anew: bool = False,
    words: tuple[str, str, str],
) -> CausalScorer:
    """Return the scorer whose value is a log-probability in nats, of the segment or the response.

    The value of a job is log p(segment | prompt, committed text) under the model's raw
    distribution, at temperature 1 and without filters; the segment is the response's tokens
    behind the committed text. r(x) is 0.0 by definition, the log-probability of nothing.

    Parameters
    ----------
    model : PagedModel
        A causal language model on pages of the scorer's own; its module may be that of another
        `PagedModel`, as the language model's is.
    source : TokenSource
        How prompts and jobs become ids.
    max_rows, max_batch_tokens
        See `CausalScorer`.
    anew : bool
        The whole response is run for each job, which lets `source` tokenise it again; the value is
        log p(response | prompt).
    words : tuple of str
        `whose`, `form` and `shorten` of a `Reading`, for errors.

    Raises
    ------
    UnsupportedModelError
        If the model's logits cannot be computed from its hidden states.
    """
    head = LogitHead(model.model)
    reading = (WholeResponse if anew else NextTokens)(head, head.vocab_size)
    reading.whose, reading.form, reading.shorten = words
    return CausalScorer(
        model,
        reading,
        source,
        num_pages=model.num_pages,
        page_size=model.page_size,
        max_rows=max_rows,
        max_batch_tokens=max_batch_tokens,
    )
