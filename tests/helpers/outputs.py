"""Comparing outputs of runs whose batches had other shapes."""

from __future__ import annotations

import dataclasses

import numpy as np

from stars_fast import CompletionOutput, RequestOutput


def same(first: CompletionOutput, second: CompletionOutput) -> bool:
    """Whether two responses are equal, log-probabilities up to rounding."""
    plain = [dataclasses.replace(output, logprobs=[]) for output in (first, second)]
    return plain[0] == plain[1] and np.allclose(first.logprobs, second.logprobs, atol=1e-5)


def all_same(first: list[RequestOutput], second: list[RequestOutput]) -> bool:
    """`same` for every response of two lists of requests."""
    pairs = zip(first, second, strict=True)
    return all(same(a, b) for x, y in pairs for a, b in zip(x.outputs, y.outputs, strict=True))
