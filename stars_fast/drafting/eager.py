"""Decode steps run one by one; the token ids stay on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stars_fast import _core
from stars_fast.drafting.base import Draft, RowSampling
from stars_fast.drafting.rows import Progress, RowParameters, most_ranks, most_stop_ids
from stars_fast.models.paged import PagedModel


class EagerDrafter:
    """Runs the steps one by one.

    Parameters
    ----------
    model
        The language model.
    segment_ends
        Gives the level of every token, int64 ``[vocab]``; asked for once a row ends early.
    share
        See `Progress`.
    """

    def __init__(
        self,
        model: PagedModel,
        segment_ends: Callable[[], Tensor],
        share: Callable[[Tensor], None] | None = None,
    ) -> None:
        self._model = model
        self._segment_ends = segment_ends
        self._share = share

    def draft(self, plan: _core.Plan, sampling: Sequence[RowSampling]) -> Draft:
        """Draw the segments of a round; see `Drafter.draft`."""
        with self._model.on_backend():
            return self._draft(plan, sampling)

    def _draft(self, plan: _core.Plan, sampling: Sequence[RowSampling]) -> Draft:
        batch = plan.draft
        rows, steps = batch.num_rows, batch.max_new
        device = self._model.device
        parameters = RowParameters.empty(rows, most_stop_ids(sampling), device)
        parameters.write(plan, sampling)
        progress = Progress(
            parameters,
            steps,
            ragged=any(s.ragged for s in sampling),
            ranks=most_ranks(sampling, self._model.vocab_size),
            segment_ends=self._segment_ends() if any(s.segment_end for s in sampling) else None,
            share=self._share,
        )
        ids = torch.from_numpy(plan.first_token).to(device)
        step = torch.zeros(rows, dtype=torch.int64, device=device)
        state = self._model.begin_decode(batch)
        for number in range(steps):
            ids = progress.draw(self._model.decode_step(state, number, ids), step)
            step += 1
            # On the CPU a look at the rows is free, on a GPU it would be a host sync.
            if device.type == "cpu" and not bool(progress.live.any()):
                break
        return progress.read(rows, steps, ran=number + 1)
