"""A device that only takes its time: what an engine's host leaves it to wait for, without a GPU.

Its tokens and hidden states are random numbers, and its processor is nobody's: while it works, the
host's own goes on or waits, and keeps what it has in its caches, as beside a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from stars_fast import Engine
from stars_fast.drafting.base import Draft, RowSampling


@dataclass(frozen=True)
class Speed:
    """Seconds of a decode step, and of scoring a round."""

    step: float
    score: float


class StandInDevice:
    """Takes the place of an engine's models, prefill and page copies for nothing.

    Attributes
    ----------
    idle
        Seconds in which it had no work, since it was given the first.
    """

    def __init__(self, engine: Engine, speed: Speed) -> None:
        self.idle = 0.0
        self._speed = speed
        self._free_at = time.perf_counter()
        self._random = np.random.default_rng(0)
        loop: Any = engine.loop
        rewards = loop.scorer.model
        self._vocab_size = loop.model.vocab_size
        width = rewards.model.config.hidden_size
        most = engine.max_rows * 128
        self._hidden = torch.randn((most, width), generator=torch.Generator().manual_seed(0))
        loop.drafter = self
        for model in (loop.model, rewards):
            model.copy_pages = _nothing
        loop.model.prefill = _nothing
        rewards.extend_all = self._extend
        self._scored_at = 0.0
        loop.scorer._reading.values = self._read_values

    def draft(self, plan: Any, sampling: Sequence[RowSampling]) -> Draft:  # noqa: ANN401 - a plan
        """Draw, and wait for it."""
        return self.launch(plan, sampling)()

    def launch(
        self,
        plan: Any,  # noqa: ANN401 - a plan
        sampling: Sequence[RowSampling],
    ) -> Callable[[], Draft]:
        """See `LaunchingDrafter`."""
        batch = plan.draft
        rows, steps = batch.num_rows, batch.max_new
        seconds = steps * self._speed.step
        done_at = self._begin(seconds)
        drafted = Draft(
            tokens=self._random.integers(1, self._vocab_size, (rows, steps)),
            lengths=np.array(batch.new_lengths, np.int32),
            stopped=np.zeros(rows, np.bool_),
            logprobs=-self._random.random((rows, steps), np.float32),
            nan_step=np.full(rows, -1, np.int64),
            steps=steps,
            row_steps=rows * steps,
        )

        def read() -> Draft:
            _wait(done_at)
            return replace(drafted, seconds=seconds)

        return read

    def _extend(self, batch: Any, ids: torch.Tensor, images: Any) -> torch.Tensor:  # noqa: ANN401
        self._scored_at = self._begin(self._speed.score)
        at = int(self._random.integers(len(self._hidden) - len(ids)))
        return self._hidden[at : at + len(ids)]

    def _read_values(self, hidden: torch.Tensor, *_: object) -> list[float]:
        _wait(self._scored_at)
        rewards: list[float] = self._random.standard_normal(len(hidden)).tolist()
        return rewards

    def _begin(self, seconds: float) -> float:
        """Give it work; when that is done."""
        now = time.perf_counter()
        self.idle += max(0.0, now - self._free_at)
        self._free_at = max(now, self._free_at) + seconds
        return self._free_at


def _nothing(*_: object) -> None: ...


def _wait(until: float) -> None:
    """Wait as CUDA does unless it is told otherwise: without giving the processor away."""
    while time.perf_counter() < until:
        pass
