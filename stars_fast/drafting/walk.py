"""Along the tokens of a round's rows: what each was drawn from, and what is told of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from stars_fast.drafting.adjust import KnownTokens, Widths, num_tokens
from stars_fast.drafting.base import Draft, RowSampling
from stars_fast.drafting.plan_rows import RowPlan
from stars_fast.drafting.rows import Progress, RowParameters, StepNeeds, most_stop_ids
from stars_fast.ops.truncate import truncated_logprobs


class Walk:
    """The distributions that rows draw from, along tokens that they have drawn."""

    def __init__(
        self,
        plan: RowPlan,
        sampling: Sequence[RowSampling],
        vocab_size: int,
        known: KnownTokens | None,
        device: torch.device,
    ) -> None:
        rows = plan.draft.num_rows
        self._parameters = RowParameters.empty(rows, most_stop_ids(sampling), device)
        self._parameters.write(plan, sampling)
        self._vocab_size = vocab_size
        self._progress = Progress(
            self._parameters,
            plan.draft.max_new,
            StepNeeds.of(plan, sampling, num_tokens(vocab_size, known)),
            vocab_size,
            widths=Widths.of(sampling),
            known=known,
        )
        if self._progress.adjustments is not None:
            self._progress.adjustments.write(sampling)
        self._grammars = self._progress.grammar_rows(sampling)
        if self._grammars is not None:
            self._grammars.allow()
        self._step = torch.zeros(rows, dtype=torch.int64, device=device)

    @property
    def greedy(self) -> Tensor:
        """Which rows take the most likely token, bool ``[R]``."""
        return self._parameters.temperature == 0

    def adjusted(self, logits: Tensor, step: int) -> Tensor:
        """Return logits with what each row changes in them, ``[R, V]``."""
        return self._progress.to_draw_from(logits[:, : self._vocab_size], self._step + step)

    def log_probs(self, logits: Tensor, step: int, *, whole: bool = False) -> Tensor:
        """Return them float64 ``[R, V]``, from raw logits behind the tokens so far.

        `whole`: without `top_k`, `top_p` and `min_p`; not of greedy rows.
        """
        p = self._parameters
        adjusted = self.adjusted(logits, step)
        if whole:
            temperature = torch.where(self.greedy, 1.0, p.temperature)
            return (adjusted / temperature.unsqueeze(1)).double().log_softmax(dim=-1)
        return truncated_logprobs(adjusted, p.temperature, p.top_k, p.top_p, p.min_p)

    def go_on(self, token: Tensor, step: int) -> None:
        """Append the token ``[R]`` of every row."""
        if self._progress.adjustments is not None:
            self._progress.adjustments.record(token, self._step + step)
        if self._grammars is not None:
            ends = (token.unsqueeze(1) == self._parameters.stop_ids).any(dim=1)
            self._grammars.advance(token, ~ends & (step + 1 < self._parameters.lengths))
            self._grammars.allow()


def told(drawn: Draft, named: Sequence[Tensor], logprobs: Sequence[Tensor]) -> Draft:
    """Return a draft with the language model's log-probabilities, which has read it in one pass.

    Parameters
    ----------
    drawn
        By the draft model.
    named, logprobs
        Of each step int64 and float32 ``[R, 1 + T]``: the token and the most likely ones.
    """
    ids = torch.stack(list(named), dim=1).cpu().numpy()
    values = torch.stack(list(logprobs), dim=1).cpu().numpy()
    there = np.arange(values.shape[1]) < drawn.lengths[:, None]
    bad = (np.isnan(values[:, :, 0]) & there).any(axis=1)
    why = "the model's logits of what the draft model has drawn are NaN or infinite"
    return replace(
        drawn,
        logprobs=values[:, :, 0],
        top_tokens=None if drawn.top_tokens is None else ids[:, :, 1:],
        top_logprobs=None if drawn.top_logprobs is None else values[:, :, 1:],
        lm_calls=1,
        errors=drawn.errors | dict.fromkeys(np.nonzero(bad)[0].tolist(), why),
    )
