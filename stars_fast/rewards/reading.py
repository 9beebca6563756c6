"""Where a causal model's reward is read: which ids run, and what their hidden states say."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from struct import Struct
from typing import Protocol

import numpy as np
import torch

from stars_fast.rewards.split_ids import NO_IDS, Ids, SplitIds, common_length, no_ids
from stars_fast.rewards.tokens import Encoded, TokenPrompt

__all__ = ["LOGIT_BYTES", "Cut", "Digests", "Head", "LastToken", "NextTokens", "Reading"]

#: Most bytes of one block of float32 logits.
LOGIT_BYTES = 64 << 20


_LENGTHS = Struct("3q")


class Head(Protocol):
    """A map from hidden states [N, hidden]: to rewards [N], or to logits [N, vocab]."""

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the map."""
        ...


@dataclass(slots=True)
class Cut(SplitIds):
    """What is run of a job: its ids up to the last one whose hidden state is read.

    Parameters
    ----------
    rest : int64 [M]
        Those behind `shared`.
    keep : int
        Number of them that stay cached if the job's branch is accepted.
    first : int
        Index of the first one whose hidden state is read.
    following : int64 [N - first]
        The id after each of those, if the reading needs them.
    marks : tuple of int
        Ids whose hidden states are read too, though they may have run long ago, in order.
    shared : int64 [N]
        See `Encoded`.
    """

    rest: Ids
    keep: int
    first: int
    following: Ids
    marks: tuple[int, ...] = ()
    shared: Ids = field(default_factory=no_ids)


class Digests:
    """Digests of everything that rewards depend on, of texts that mostly begin as one text does.

    What they share with it is digested once.

    Parameters
    ----------
    ids : int64 [N]
        That text.
    """

    def __init__(self, ids: Ids) -> None:
        self._ids = ids
        self._state = hashlib.blake2b(ids.data, digest_size=16)

    def of(self, cut: Cut) -> bytes:
        """Return 16 bytes that are the same for equal cuts alone, whatever they begin with."""
        state = self._after(cut)
        if len(cut.following):
            state.update(cut.following.data)
        if cut.marks:
            state.update(array("q", cut.marks))
        # Last, where nothing is behind it: lengths tell what of the above is what.
        state.update(_LENGTHS.pack(cut.first, len(cut.marks), cut.length))
        return state.digest()

    def grown(self, ids: Ids) -> Digests:
        """Return those of texts that mostly begin with `ids`."""
        made = copy(self)
        made._ids, made._state = ids, self._after(Cut(ids, 0, 0, NO_IDS))
        return made

    def _after(self, cut: Cut) -> hashlib.blake2b:
        known = len(self._ids)
        if cut.shared is not self._ids and not np.array_equal(cut.ids[:known], self._ids):
            return hashlib.blake2b(cut.ids.data, digest_size=16)
        state = self._state.copy()
        state.update(cut.behind(known).data)
        return state


class Reading(ABC):
    """How a reward is read from the hidden states of a job's ids."""

    #: Words of error messages: the model, what its prompt is in, what to shorten.
    whose: str
    form: str
    shorten: str

    @abstractmethod
    def prefix(self, prompt: TokenPrompt) -> int:
        """Return how many of the ids of r(x) are cached before there is any response."""

    def marks(self, ids: Ids) -> tuple[int, ...]:
        """Return which of a prompt's ids are `Cut.marks`; ValueError if there have to be some."""
        return ()

    def kept(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what is kept of hidden states at marks, when they run: [N, hidden] to [N, D]."""
        return hidden

    @abstractmethod
    def cut(self, text: Encoded, prompt: TokenPrompt, committed: Ids) -> Cut | float | Exception:
        """Return what to run of a job; its reward where that is known; or its error.

        Parameters
        ----------
        text : Encoded
            The job.
        prompt : TokenPrompt
            The prompt of its request.
        committed : int64 [C]
            Ids that the cached sequence should hold: the prefix of the prompt, later the kept ids
            of the last accepted branch.
        """

    @abstractmethod
    def values(
        self, hidden: torch.Tensor, marked: torch.Tensor, cuts: Sequence[Cut]
    ) -> list[float]:
        """Return each job's reward.

        Parameters
        ----------
        hidden : Tensor [sum of len(ids) - first, hidden]
            The hidden states that are read, one job's after another's.
        marked : Tensor [sum of len(marks), D]
            What was kept at the marks, in the same order; empty where there are none.
        cuts : sequence of Cut
            The jobs, in that order.
        """


class LastToken(Reading):
    """A reward read at the last token, where transformers' classifiers read it.

    Parameters
    ----------
    head : Head
        From hidden states to rewards [N].
    pad_token_id : int or None
        A padding token, which the last token is not; None: the last token is any.
    """

    whose = "the reward model"
    form = "in the reward model's template"
    shorten = "the prompt"

    def __init__(self, head: Head, pad_token_id: int | None) -> None:
        self.head = head
        self._pad = pad_token_id

    def prefix(self, prompt: TokenPrompt) -> int:
        """Return the ids before the response."""
        return prompt.stem

    def cut(self, text: Encoded, prompt: TokenPrompt, committed: Ids) -> Cut | Exception:
        """Return the ids up to the last that is not padding."""
        length = end = text.length
        if self._pad is None or int(text.rest[-1]) != self._pad:
            return Cut(text.rest, length - prompt.tail, length - 1, NO_IDS, shared=text.shared)
        ids = text.ids
        while end > 1 and int(ids[end - 1]) == self._pad:
            end -= 1
        return Cut(ids[:end], min(length - prompt.tail, end), end - 1, NO_IDS)

    def values(
        self, hidden: torch.Tensor, marked: torch.Tensor, cuts: Sequence[Cut]
    ) -> list[float]:
        """Apply the head."""
        rewards: list[float] = self.head(hidden).tolist()
        return rewards


class NextTokens(Reading):
    """The log-probability, in nats, that a language model gives the tokens behind committed text.

    The hidden state at a token predicts the next token. A job's last token is therefore not run,
    but the token before its segment is, as its hidden state was not kept: as many tokens as the
    segment has. The cached sequence ends one token before the committed text, and segments of one
    page still start on a fresh page.

    Parameters
    ----------
    head : Head
        From hidden states to logits, the model's own.
    vocab_size : int
        Number of logits per token.
    """

    whose = "the judge"
    form = "with the persona"
    shorten = "the persona or the prompt"

    def __init__(self, head: Head, vocab_size: int) -> None:
        self._head = head
        self._block = max(1, LOGIT_BYTES // (4 * vocab_size))

    def prefix(self, prompt: TokenPrompt) -> int:
        """Return all ids but the last."""
        return len(prompt.empty_ids) - 1

    def cut(self, text: Encoded, prompt: TokenPrompt, committed: Ids) -> Cut | float | Exception:
        """Return the ids but the last; 0.0 for r(x) and for a job with nothing new."""
        first, end = len(committed), text.length - 1
        if text.length == len(prompt.empty_ids):
            return 0.0
        if text.shared is not committed:
            ids = text.ids
            if end < first or common_length(ids, committed) < first:
                return ValueError("response_ids must continue the committed text of their request")
            text = Encoded(ids[first:], shared=committed)
        if end == first:
            return 0.0
        return Cut(text.rest[:-1], end, first, text.rest[1:], shared=committed)

    def values(
        self, hidden: torch.Tensor, marked: torch.Tensor, cuts: Sequence[Cut]
    ) -> list[float]:
        """Return the sum of each job's log-probabilities, by float32 log_softmax of the logits."""
        following = torch.from_numpy(np.concatenate([cut.following for cut in cuts]))
        following = following.to(hidden.device)
        parts = []
        for at in range(0, len(hidden), self._block):
            part, ids = hidden[at : at + self._block], following[at : at + self._block]
            log_p = self._head(part).float().log_softmax(dim=-1)
            parts.append(log_p.gather(1, ids.unsqueeze(1)).squeeze(1))
        log_p_all = torch.cat(parts).double().cpu().numpy()
        starts = np.cumsum([0, *(len(cut.following) for cut in cuts[:-1])])
        sums: list[float] = np.add.reduceat(log_p_all, starts).tolist()
        return sums
