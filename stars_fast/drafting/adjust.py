"""Logits as the rows of a round draw from them: penalties, biases, tokens that are not drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stars_fast import ops
from stars_fast.drafting.base import RowSampling


@dataclass(frozen=True)
class KnownTokens:
    """The tokens that the tokenizer has, where the model has more.

    Attributes
    ----------
    count
        One more than the largest id.
    mask
        bool ``[count]``; None where every id below `count` is one.
    """

    count: int
    mask: Tensor | None = None

    @classmethod
    def of(
        cls, token_ids: Iterable[int], vocab_size: int, device: torch.device
    ) -> KnownTokens | None:
        """Return those of a model with `vocab_size` logits; None where all are known."""
        mask = torch.zeros(vocab_size, dtype=torch.bool)
        mask[[token for token in token_ids if 0 <= token < vocab_size]] = True
        if bool(mask.all()) or not bool(mask.any()):
            return None
        mask = mask[: int(mask.nonzero()[-1]) + 1]
        return cls(len(mask), None if bool(mask.all()) else mask.to(device))

    @property
    def number(self) -> int:
        """How many there are."""
        return self.count if self.mask is None else int(self.mask.sum())


def num_tokens(vocab_size: int, known: KnownTokens | None) -> int:
    """Return the number of tokens that can be drawn."""
    return vocab_size if known is None else known.number


@dataclass(frozen=True)
class Widths:
    """Columns that adjustments of rows take.

    Attributes
    ----------
    biases
        Of a row.
    seen
        Different tokens of a row's prompt and response.
    words
        Rows of tokens that are not drawn, of a row.
    word_tokens
        Tokens of the longest of these.
    """

    biases: int
    seen: int
    words: int = 0
    word_tokens: int = 0

    @classmethod
    def of(cls, sampling: Sequence[RowSampling]) -> Widths:
        """What these rows need."""
        return cls(
            biases=max(len(s.logit_bias) for s in sampling),
            seen=max(len(s.counts or ()) for s in sampling),
            words=max(len(s.bad_words) for s in sampling),
            word_tokens=max((len(word) for s in sampling for word in s.bad_words), default=0),
        )

    def hold(self, needed: Widths) -> bool:
        """Whether rows that need so much fit."""
        return all(vars(self)[name] >= width for name, width in vars(needed).items())


class Adjustments:
    """What the rows of a round change in their logits, on the device.

    Parameters
    ----------
    rows
        R.
    widths
        Columns, of all rounds.
    max_new
        Tokens of a row in a round at most: each has a column, too.
    mask_words
        Words of `allowed`, 32 tokens each; 0: no row has a grammar.
    device
        Where it is.
    """

    def __init__(
        self, rows: int, widths: Widths, max_new: int, mask_words: int, device: torch.device
    ) -> None:
        self.widths = widths
        seen = widths.seen + max_new

        def table(columns: int, dtype: torch.dtype, value: float) -> Tensor:
            return torch.full((rows, columns), value, dtype=dtype, device=device)

        #: int32 ``[R, mask_words]``, tokens that each row may draw; None: all.
        self.allowed = table(mask_words, torch.int32, -1) if mask_words else None
        self._bias_ids = table(widths.biases, torch.int64, -1)
        self._bias = table(widths.biases, torch.float32, 0)
        self._seen = table(seen, torch.int64, -1)
        self._counts = table(seen, torch.int32, 0)
        self._repetition = torch.ones(rows, dtype=torch.float32, device=device)
        self._presence = torch.zeros(rows, dtype=torch.float32, device=device)
        self._frequency = torch.zeros(rows, dtype=torch.float32, device=device)
        self._min_tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._words = _Words(rows, widths, max_new, device) if widths.words else None

    def write(self, sampling: Sequence[RowSampling]) -> None:
        """Store the rows of a round, in one transfer; rows past them change nothing."""
        rows, biases = self._bias_ids.shape
        seen = self.widths.seen
        ids = np.full((rows, biases + seen), -1, np.int64)
        values = np.zeros((rows, biases + seen + 4), np.float64)
        values[:, biases + seen] = 1
        written: dict[int, int] = {}
        for row, s in enumerate(sampling):
            values[row, biases + seen :] = (
                s.repetition_penalty,
                s.presence_penalty,
                s.frequency_penalty,
                s.min_tokens,
            )
            first = written.setdefault(id(s), row)
            if first < row:  # another candidate of the same response
                ids[row], values[row] = ids[first], values[first]
                continue
            for at, (token, bias) in enumerate(s.logit_bias):
                ids[row, at], values[row, at] = token, bias
            if s.counts:
                end = biases + len(s.counts)
                ids[row, biases:end] = list(s.counts.keys())
                values[row, biases:end] = list(s.counts.values())
        packed = np.concatenate((ids, values.view(np.int64)), axis=1)
        moved = torch.from_numpy(packed).to(self._seen.device)
        found, numbers = moved[:, : biases + seen], moved[:, biases + seen :].view(torch.float64)
        self._bias_ids.copy_(found[:, :biases])
        self._bias.copy_(numbers[:, :biases])
        self._seen[:, :seen].copy_(found[:, biases:])
        self._seen[:, seen:].fill_(-1)
        self._counts[:, :seen].copy_(numbers[:, biases : biases + seen])
        self._counts[:, seen:].zero_()
        own = (self._repetition, self._presence, self._frequency, self._min_tokens)
        for at, column in enumerate(own, biases + seen):
            column.copy_(numbers[:, at])
        if self._words is not None:
            self._words.write(sampling)

    def apply(
        self,
        logits: Tensor,
        position: Tensor,
        step: Tensor,
        stop_ids: Tensor,
        known: Tensor | None,
    ) -> Tensor:
        """Return the logits to draw from.

        Parameters
        ----------
        logits
            ``[R, V]``; not changed.
        position
            int64 ``[R]``, tokens of each row's response before those of the round.
        step
            int64 ``[R]``, the number of tokens drawn in the round, the same for every row.
        stop_ids
            int64 ``[R, S]``, tokens that end the response; negative ones are none.
        known
            bool ``[V]``, tokens that can be drawn at all; None: every one.

        Returns
        -------
        Tensor
            float32 ``[R, V]``.
        """
        held_ids, held = stop_ids, position + step < self._min_tokens
        if self._words is not None:
            early = torch.where(held.unsqueeze(1), stop_ids, -1)
            held_ids = torch.cat((early, self._words.last_tokens(step)), dim=1)
            held = torch.ones_like(held)
        return ops.adjust_logits(  # type: ignore[no-any-return]
            logits,
            self._bias_ids,
            self._bias,
            held_ids,
            held,
            self._seen,
            self._counts,
            self._repetition,
            self._presence,
            self._frequency,
            known,
            self.allowed,
        )

    def record(self, token: Tensor, step: Tensor) -> None:
        """Count the token ``[R]`` that each row has drawn in the step, int64 ``[R]``."""
        before = self._seen == token.unsqueeze(1)
        self._counts += before
        new = ~before.any(dim=1)
        column = (self.widths.seen + step).unsqueeze(1)
        self._seen.scatter_(1, column, torch.where(new, token, -1).unsqueeze(1))
        self._counts.scatter_(1, column, new.to(torch.int32).unsqueeze(1))
        if self._words is not None:
            self._words.record(token, step)


class _Words:
    """Tokens that rows do not draw in a row, and what they have drawn; as for `Adjustments`."""

    def __init__(self, rows: int, widths: Widths, max_new: int, device: torch.device) -> None:
        self._before = widths.word_tokens - 1
        # [R, words, tokens], each at the right end behind tokens that match any, -1.
        shape = (rows, widths.words, widths.word_tokens)
        self._words = torch.full(shape, -1, dtype=torch.int64, device=device)
        # The last tokens of the response, then those of the round; -2 matches none.
        columns = self._before + max_new
        self._drawn = torch.full((rows, columns), -2, dtype=torch.int64, device=device)
        self._window = torch.arange(self._before, device=device)

    def write(self, sampling: Sequence[RowSampling]) -> None:
        """Store the rows of a round."""
        words = np.full(self._words.shape, -1, np.int64)
        drawn = np.full(self._drawn.shape, -2, np.int64)
        for row, s in enumerate(sampling):
            for at, word in enumerate(s.bad_words):
                words[row, at, -len(word) :] = word
            last = s.drawn[max(0, len(s.drawn) - self._before) :] if s.bad_words else ()
            drawn[row, self._before - len(last) : self._before] = last
        self._words.copy_(torch.from_numpy(words))
        self._drawn.copy_(torch.from_numpy(drawn))

    def last_tokens(self, step: Tensor) -> Tensor:
        """Return the last token of each word ``[R, words]`` that the others stand before, or -1."""
        before = self._drawn.gather(1, step.unsqueeze(1) + self._window).unsqueeze(1)
        first, last = self._words[:, :, :-1], self._words[:, :, -1]
        stands = ((first == before) | (first == -1)).all(dim=2)
        return torch.where(stands, last, -1)

    def record(self, token: Tensor, step: Tensor) -> None:
        """Note the token ``[R]`` that each row has drawn in the step."""
        self._drawn.scatter_(1, (self._before + step).unsqueeze(1), token.unsqueeze(1))
