"""Decode steps run one by one; the token ids stay on the device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stars_fast.drafting.adjust import KnownTokens, Widths, num_tokens
from stars_fast.drafting.base import Draft, RowSampling, position_shifts
from stars_fast.drafting.pace import Pace
from stars_fast.drafting.plan_rows import RowPlan
from stars_fast.drafting.rows import Progress, RowParameters, StepNeeds, most_stop_ids
from stars_fast.models.threads import StepThreads
from stars_fast.ops.batch import BatchLike


class StepModel(Protocol):
    """What runs steps: a `PagedModel`, or one with its guides."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        ...

    @property
    def vocab_size(self) -> int:
        """Logits of a step."""
        ...

    @property
    def step_threads(self) -> StepThreads | None:
        """Chooses the threads of a step."""
        ...

    def on_backend(self) -> contextlib.AbstractContextManager[None]:
        """Run operators in the form that the model's do."""
        ...

    def begin_decode(self, batch: BatchLike, shift: npt.NDArray[np.int64] | None = None) -> Any:  # noqa: ANN401 - its own
        """Start a round; see `PagedModel.begin_decode`."""
        ...

    def decode_step(self, state: Any, j: int, input_ids: Tensor) -> Tensor:  # noqa: ANN401
        """Return the logits of a step; see `PagedModel.decode_step`."""
        ...


class EagerDrafter:
    """Runs the steps one by one.

    Parameters
    ----------
    model
        The language model.
    segment_ends
        Gives the level of every token, int64 ``[vocab]``; asked for once a row ends early.
    known, share
        See `Progress`.
    pace
        Ends rounds of which some rows go on; None: rounds last until all rows have ended.
    """

    def __init__(
        self,
        model: StepModel,
        segment_ends: Callable[[], Tensor],
        known: KnownTokens | None = None,
        share: Callable[[Tensor], None] | None = None,
        pace: Pace | None = None,
    ) -> None:
        self._pace = pace
        self._model = model
        self._segment_ends = segment_ends
        self._known = known
        self._share = share

    def draft(self, plan: RowPlan, sampling: Sequence[RowSampling]) -> Draft:
        """Draw the segments of a round; see `Drafter.draft`."""
        with self._model.on_backend():
            return self._draft(plan, sampling)

    def _draft(self, plan: RowPlan, sampling: Sequence[RowSampling]) -> Draft:
        batch = plan.draft
        rows, steps = batch.num_rows, batch.max_new
        device = self._model.device
        parameters = RowParameters.empty(rows, most_stop_ids(sampling), device)
        parameters.write(plan, sampling)
        needs = StepNeeds.of(plan, sampling, num_tokens(self._model.vocab_size, self._known))
        progress = Progress(
            parameters,
            steps,
            needs,
            self._model.vocab_size,
            segment_ends=self._segment_ends() if needs.ends_early else None,
            widths=Widths.of(sampling),
            known=self._known,
            share=self._share,
        )
        if progress.adjustments is not None:
            progress.adjustments.write(sampling)
        ids = torch.from_numpy(plan.first_token).to(device)
        step = torch.zeros(rows, dtype=torch.int64, device=device)
        state = self._model.begin_decode(batch, position_shifts(sampling))
        grammars = progress.grammar_rows(sampling)
        threads = self._model.step_threads if rows > 1 else None  # one row's sums are divided
        if threads is not None:
            threads.begin_round()
        waste = 0.0  # steps
        for number in range(steps):
            if grammars is not None:
                grammars.allow()
            draw = functools.partial(self._step, progress, state, number, ids, step)
            ids = draw() if threads is None else threads.run(draw)
            step += 1
            if grammars is not None:
                grammars.advance(ids, progress.live)
            # On the CPU a look at the rows is free, on a GPU it would be a host sync.
            if device.type == "cpu":
                live = int(progress.live.sum())
                waste += 1 - live / rows
                if not live or (self._pace is not None and self._pace.enough(waste)):
                    break
        return progress.read(rows, steps, ran=number + 1)

    def _step(
        self,
        progress: Progress,
        state: Any,  # noqa: ANN401 - the model's own
        number: int,
        ids: Tensor,
        step: Tensor,
    ) -> Tensor:
        return progress.draw(self._model.decode_step(state, number, ids), step)
