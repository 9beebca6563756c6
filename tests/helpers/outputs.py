"""Comparing outputs of runs whose batches had other shapes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from stars_fast import CompletionOutput, RequestOutput
from stars_fast.drafting.pace import Pace


def rounds_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no round end by the clock: rounds of other sizes give other last digits."""
    monkeypatch.setattr(Pace, "enough", lambda *_: False)


def same(first: CompletionOutput, second: CompletionOutput) -> bool:
    """Whether two responses are equal, log-probabilities and rewards up to rounding."""
    if _exact(first) != _exact(second):
        return False
    return np.allclose(_numbers(first), _numbers(second), atol=1e-5, equal_nan=True)


def _exact(output: CompletionOutput) -> CompletionOutput:
    """The response without what rounding may change."""
    segments = [
        dataclasses.replace(one, reward=_there(one.reward), threshold=_there(one.threshold))
        for one in output.segments
    ]
    reward = _there(output.reward)
    return dataclasses.replace(output, logprobs=[], reward=reward, segments=segments)


def _there(value: float | None) -> float | None:
    return None if value is None else 0.0


def _numbers(output: CompletionOutput) -> list[float]:
    rewards = [x for one in output.segments for x in (one.reward, one.threshold)]
    return [*output.logprobs, *(x for x in (output.reward, *rewards) if x is not None)]


def all_same(first: list[RequestOutput], second: list[RequestOutput]) -> bool:
    """`same` for every response of two lists of requests."""
    pairs = zip(first, second, strict=True)
    return all(same(a, b) for x, y in pairs for a, b in zip(x.outputs, y.outputs, strict=True))
