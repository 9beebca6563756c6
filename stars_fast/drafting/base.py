"""The contract between a round and a drafter: rows in, segments out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from stars_fast import _core
from stars_fast.drafting.grammar import GrammarState


@dataclass(frozen=True)
class RowSampling:
    """How a row is sampled; one object a response, shared by its rows.

    `counts`: the tokens of prompt and response so far, with their number in the response; its
    owner keeps it up. None: no penalty asks for it.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    stop_token_ids: tuple[int, ...]
    entropy_limit: float = math.inf  # ends a segment, see StarsParams.entropy_threshold
    segment_end: int = 0  # level of `segment_ends` that ends a segment, 0: none does
    min_length: int = 1  # tokens before either
    ranks: int = 0  # attempt i is the i-th most likely token, of so many; 0: attempts are draws
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()  # not drawn in a row, each at least one token
    min_tokens: int = 0
    top_logprobs: int = 0
    guide_weight: float = 0.0  # of the engine's guide; 0: it is not guided
    draft_attempts: int = 0  # attempts below this are drawn by the draft model
    compares: bool = False  # of these, `Draft.log_ratios` are wanted
    verifies: bool = False  # their tokens are accepted one by one
    position_shift: int = 0  # what positions behind the prompt are ahead of their tokens' numbers
    counts: dict[int, int] | None = None
    drawn: Sequence[int] = ()  # the tokens of the response so far, kept up by their owner
    grammar: GrammarState | None = None  # where the response stands in its grammar

    @property
    def ragged(self) -> bool:
        """Whether a segment may end early without ending the response."""
        return not math.isinf(self.entropy_limit)

    def adjusts(self, position: int) -> bool:
        """Whether logits are changed behind so many tokens of the response."""
        changes = self.logit_bias or self.counts is not None or self.grammar is not None
        return bool(changes or self.bad_words) or position < self.min_tokens


def position_shifts(sampling: Sequence[RowSampling]) -> npt.NDArray[np.int64] | None:
    """Return the shift of each row, int64 ``[R]``; None where no row has one."""
    if not any(row.position_shift for row in sampling):
        return None
    return np.array([row.position_shift for row in sampling], np.int64)


@dataclass(frozen=True)
class Draft:
    """Segments drawn in a round, on the host.

    Attributes
    ----------
    tokens
        int64 ``[R, L]``; entries from a row's length on are meaningless.
    lengths
        int32 ``[R]``, the stop token that ended a row included.
    unfinished
        bool ``[R]``: the row's segment goes on in the next round; None: all have ended.
    stopped
        bool ``[R]``: the row's last token is one of its stop tokens.
    logprobs
        float32 ``[R, L]`` under the raw distribution.
    adjusted_logprobs
        float32 ``[R, L]`` under the distribution that ranks are taken from, with the penalties and
        biases of its row; None where nothing is ranked, or nothing changes it.
    top_tokens, top_logprobs
        int64 and float32 ``[R, L, T]``: the most likely tokens under the raw distribution; None
        where no row asks for them.
    log_ratios
        float64 ``[R, L]``, log p - log p_draft of tokens that the draft model has drawn, of the
        distributions that it and the language model draw from; None where no row asks for them.
    nan_step
        int64 ``[R]``: the first step whose logits were NaN, +inf or all -inf; -1 if none.
    steps
        Forward passes of the model.
    lm_calls
        Forward passes of the language model, where those are not `steps`.
    discarded
        int32 ``[R]``, tokens drawn behind what is left of each row; None: none.
    row_steps
        Rows that each of them ran, summed: those whose segment had ended included. 0 where the
        model is not here.
    seconds
        What the device took, where the host did something else meanwhile.
    errors
        Why a row has no segment; its other entries are meaningless, but its length is at least 1.
    """

    tokens: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int32]
    stopped: npt.NDArray[np.bool_]
    logprobs: npt.NDArray[np.float32]
    nan_step: npt.NDArray[np.int64]
    steps: int = 0
    row_steps: int = 0
    seconds: float | None = None
    errors: dict[int, str] = field(default_factory=dict)
    adjusted_logprobs: npt.NDArray[np.float32] | None = None
    top_tokens: npt.NDArray[np.int64] | None = None
    top_logprobs: npt.NDArray[np.float32] | None = None
    log_ratios: npt.NDArray[np.float64] | None = None
    lm_calls: int | None = None
    discarded: npt.NDArray[np.int32] | None = None
    unfinished: npt.NDArray[np.bool_] | None = None

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

        There is at least one row. Some segments may not have ended: their rows come again. The KV
        of the drawn tokens is written to the model's pages.
        `sampling` has one entry per row of ``plan.draft``.
        """
        ...


@runtime_checkable
class LaunchingDrafter(Drafter, Protocol):
    """One that need not wait for the device."""

    def launch(self, plan: _core.Plan, sampling: Sequence[RowSampling]) -> Callable[[], Draft]:
        """Launch the steps of a draft; what waits for them and returns it, to be called once.

        Before that no other may be launched. Rows with a grammar are waited for here.
        """
        ...
