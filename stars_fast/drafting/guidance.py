"""Drafting by a language model and its guides: their steps side by side, their logits as one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stars_fast import _core, ops
from stars_fast.drafting.adjust import KnownTokens
from stars_fast.drafting.base import Draft, Drafter, RowSampling
from stars_fast.drafting.eager import EagerDrafter
from stars_fast.models.guidance import GuidedModel
from stars_fast.models.paged import DecodeState
from stars_fast.models.threads import StepThreads
from stars_fast.ops.batch import BatchLike


class GuidedDrafter:
    """Draws rounds in which a row is guided; leaves every other round to the plain drafter.

    Parameters
    ----------
    model
        The language model and its guides.
    plain
        Of the language model alone.
    segment_ends, known
        See `EagerDrafter`.
    """

    def __init__(
        self,
        model: GuidedModel,
        plain: Drafter,
        segment_ends: Callable[[], Tensor],
        known: KnownTokens | None = None,
    ) -> None:
        self._model = model
        self._plain = plain
        self._segment_ends = segment_ends
        self._known = known

    def draft(self, plan: _core.Plan, sampling: Sequence[RowSampling]) -> Draft:
        """Draw the segments of a round; see `Drafter.draft`."""
        weights = [row.guide_weight for row in sampling]
        if not any(weights):
            return self._plain.draft(plan, sampling)
        weight = torch.tensor(weights, dtype=torch.float32, device=self._model.device)
        steps = _GuidedSteps(self._model, weight)
        return EagerDrafter(steps, self._segment_ends, self._known).draft(plan, sampling)


class _GuidedSteps:
    """The steps of one round, whose rows have these weights ``[R]``; a `StepModel`."""

    def __init__(self, model: GuidedModel, weight: Tensor) -> None:
        self._model = model
        self._weight = weight
        self.device = model.device
        self.vocab_size = model.lm.vocab_size

    @property
    def step_threads(self) -> StepThreads | None:
        """Chooses the threads of a step; None where any model's results depend on them."""
        alike = all(one.step_threads is not None for one in self._model.beside)
        return self._model.lm.step_threads if alike else None

    def on_backend(self) -> contextlib.AbstractContextManager[None]:
        """Run operators as the language model's do."""
        return self._model.lm.on_backend()

    def begin_decode(
        self, batch: BatchLike, shift: npt.NDArray[np.int64] | None = None
    ) -> list[DecodeState]:
        """Start the round in every model."""
        return [one.begin_decode(batch, shift) for one in (self._model.lm, *self._model.beside)]

    def decode_step(self, state: Any, j: int, input_ids: Tensor) -> Tensor:  # noqa: ANN401
        """Run each row's j-th new token in every model; return the guided logits."""
        logits = self._model.lm.decode_step(state[0], j, input_ids)
        guide, *rest = (
            one.decode_step(own, j, self._model.read_by(one, input_ids))
            for one, own in zip(self._model.beside, state[1:], strict=True)
        )
        reference: Tensor | None = rest[0] if rest else None
        if self._model.reference == "lm":
            reference = logits
        guided: Tensor = ops.guide_logits(logits, guide, reference, self._weight)
        return guided
