"""The contract between a round and a drafter: rows in, segments out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stars_fast import _core


@dataclass(frozen=True)
class RowSampling:
    """How a row is sampled; one object a request, shared by its rows."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    stop_token_ids: tuple[int, ...]
    entropy_limit: float = math.inf  # ends a segment, see StarsParams.entropy_threshold
    segment_end: int = 0  # level of `segment_ends` that ends a segment, 0: none does
    min_length: int = 1  # tokens before either
    ranks: int = 0  # attempt i is the i-th most likely token, of so many; 0: attempts are draws

    @property
    def ragged(self) -> bool:
        """Whether a segment may end early without ending the response."""
        return not math.isinf(self.entropy_limit)


@dataclass(frozen=True)
class Draft:
    """Segments drawn in a round, on the host.

    Attributes
    ----------
    tokens
        int64 ``[R, L]``; entries from a row's length on are meaningless.
    lengths
        int32 ``[R]``, the stop token that ended a row included.
    stopped
        bool ``[R]``: the row's last token is one of its stop tokens.
    logprobs
        float32 ``[R, L]`` under the raw distribution.
    nan_step
        int64 ``[R]``: the first step whose logits were NaN, +inf or all -inf; -1 if none.
    steps
        Forward passes of the model.
    errors
        Why a row has no segment; its other entries are meaningless, but its length is at least 1.
    """

    tokens: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int32]
    stopped: npt.NDArray[np.bool_]
    logprobs: npt.NDArray[np.float32]
    nan_step: npt.NDArray[np.int64]
    steps: int = 0
    errors: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of_no_rows(cls) -> Draft:
        """Return the draft of a round whose requests are all still in their prefill."""
        none = np.zeros(0, np.int64)
        return cls(
            tokens=np.zeros((0, 0), np.int64),
            lengths=none.astype(np.int32),
            stopped=none.astype(np.bool_),
            logprobs=np.zeros((0, 0), np.float32),
            nan_step=none,
        )


class Drafter(Protocol):
    """Draws the segments of a round."""

    def draft(self, plan: _core.Plan, sampling: Sequence[RowSampling]) -> Draft:
        """Draw the segment of every row of the plan, whose prefill must have run.

        There is at least one row. The KV of the drawn tokens is written to the model's pages.
        `sampling` has one entry per row of ``plan.draft``.
        """
        ...
