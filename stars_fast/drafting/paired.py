"""Drafting by a language model and its draft model: one draws a row, the other reads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import repeat

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stars_fast import ops
from stars_fast.drafting.adjust import KnownTokens
from stars_fast.drafting.base import Draft, RowSampling
from stars_fast.drafting.plan_rows import PlanRows, RowDrafter, RowPlan, joined, some_rows
from stars_fast.drafting.read import RowsRead
from stars_fast.drafting.verified import verified
from stars_fast.drafting.walk import Walk, told
from stars_fast.models.drafted import DraftedModel
from stars_fast.models.logits import LogitHead
from stars_fast.models.paged import PagedModel

_NO_CHANCE = -1e30  # the least log-ratio: sums of infinite ones are no numbers


class PairedDrafter:
    """Draws each row by the model that its attempt belongs to; the other one then reads it.

    So both have the keys and values of every candidate, whichever is accepted. Rows of requests
    that have no use for the draft model are drawn as without one, and read by nobody.

    Parameters
    ----------
    model
        Both.
    own
        Drafter of the language model alone.
    draft
        Of the draft model alone, whose rounds last until all rows have ended.
    known
        See `Progress`.

    Raises
    ------
    UnsupportedModelError
        If the logits of a model cannot be computed from its hidden states.
    """

    def __init__(
        self,
        model: DraftedModel,
        own: RowDrafter,
        draft: RowDrafter,
        known: KnownTokens | None = None,
    ) -> None:
        self._model = model
        self._own = own
        self._draft = draft
        self._known = known
        models = (model.lm, *model.beside)
        self._heads = {id(one): LogitHead(one.model) for one in models}
        self._vocab_size = min(one.vocab_size for one in models)

    @property
    def capture_waits(self) -> int:
        """Rounds of either model that waited for a step to be captured."""
        return sum(getattr(one, "capture_waits", 0) for one in (self._own, self._draft))

    def draft(self, plan: RowPlan, sampling: Sequence[RowSampling]) -> Draft:
        """Draw the segments of a round; see `Drafter.draft`."""
        if not any(row.draft_attempts for row in sampling):
            return self._own.draft(plan, sampling)
        theirs = [
            attempt < row.draft_attempts
            for attempt, row in zip(plan.attempt.tolist(), sampling, strict=True)
        ]
        parts = []
        verifies = [row.verifies for row in sampling]
        ways = ((self._by_own, False, False), (self._by_draft, True, False))
        for run, *way in (*ways, (self._by_both, True, True)):
            rows = [at for at, of in enumerate(zip(theirs, verifies, strict=True)) if [*of] == way]
            if rows:
                part = run(PlanRows.of(plan, rows), [sampling[row] for row in rows])
                parts.append((rows, part))
        return joined(parts)

    def _by_own(self, plan: RowPlan, sampling: Sequence[RowSampling]) -> Draft:
        """Rows of the language model; the draft model reads those that it may go on from."""
        drawn = self._own.draft(plan, sampling)
        rows = np.array([row for row, s in enumerate(sampling) if s.draft_attempts], np.int64)
        if len(rows):
            self._read(self._model.draft, plan, drawn, rows)
        return drawn

    def _by_draft(self, plan: RowPlan, sampling: Sequence[RowSampling]) -> Draft:
        """Rows of the draft model, with what the language model says of them."""
        drawn = self._draft.draft(plan, sampling)
        rows = np.arange(plan.draft.num_rows)
        own = self._logits(self._model.lm, self._read(self._model.lm, plan, drawn, rows))
        drafts: Iterator[Tensor | None] = repeat(None)
        if any(s.compares for s in sampling):
            draft = self._model.draft
            drafts = self._logits(draft, self._read(draft, plan, drawn, rows))
        return self._compared(plan, sampling, drawn, own, drafts)

    def _by_both(self, plan: RowPlan, sampling: Sequence[RowSampling]) -> Draft:
        """Rows of the draft model, as far as the language model accepts them."""
        drawn = self._draft.draft(plan, sampling)
        rows = np.arange(plan.draft.num_rows)
        own, theirs, *before = (
            self._logits(one, self._read(one, plan, drawn, rows))
            for one in (self._model.lm, *self._model.beside)
        )
        logits = zip(own, theirs, before[0] if before else repeat(None), strict=False)
        return verified(plan, sampling, drawn, self._walk(plan, sampling), logits)

    def _walk(self, plan: RowPlan, sampling: Sequence[RowSampling]) -> Walk:
        return Walk(plan, sampling, self._vocab_size, self._known, self._model.device)

    def _read(
        self, model: PagedModel, plan: RowPlan, drawn: Draft, rows: npt.NDArray[np.int64]
    ) -> RowsRead:
        """Have a model read what rows have drawn."""
        batch = some_rows(plan.draft, rows, drawn.lengths[rows])
        return RowsRead(model, batch, plan.first_token[rows], drawn.tokens[rows])

    def _logits(self, model: PagedModel, read: RowsRead) -> Iterator[Tensor]:
        return read.logits(self._heads[id(model)])

    def _compared(
        self,
        plan: RowPlan,
        sampling: Sequence[RowSampling],
        drawn: Draft,
        own: Iterator[Tensor],
        drafts: Iterator[Tensor | None],
    ) -> Draft:
        """Return a draft with the language model's log-probabilities and, if asked for, ratios."""
        walk = self._walk(plan, sampling)
        top = 0 if drawn.top_tokens is None else drawn.top_tokens.shape[2]
        named_all, logprobs, ratios = [], [], []
        for step, (ours, draft) in enumerate(zip(own, drafts, strict=False)):
            token = torch.from_numpy(drawn.tokens[:, step].copy()).to(ours.device)
            named = token.unsqueeze(1)
            if top:
                named = torch.cat((named, ops.top_tokens(ours, top)), dim=1)
            named_all.append(named)
            logprobs.append(ops.token_logprobs(ours, named, with_entropy=False)[0])
            if draft is not None:
                pair = (walk.log_probs(logits, step) for logits in (ours, draft))
                ratios.append(_ratio(*(p.gather(1, named[:, :1]).squeeze(1) for p in pair)))
                walk.go_on(token, step)
        if ratios:
            there = np.arange(len(ratios)) < drawn.lengths[:, None]
            compares = np.array([s.compares for s in sampling])
            log_ratios = torch.stack(ratios, dim=1).cpu().numpy()
            log_ratios[~(there & compares[:, None])] = 0.0
            drawn = replace(drawn, log_ratios=log_ratios)
        return told(drawn, named_all, logprobs)


def _ratio(own: Tensor, draft: Tensor) -> Tensor:
    """Log-ratios; a token that the draft model has drawn has a chance there."""
    return torch.where(torch.isinf(draft), 0.0, own.clamp(min=_NO_CHANCE) - draft)
