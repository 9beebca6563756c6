"""What a request returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Attempt:
    """A candidate that lost its accept test (kept with ``StarsParams(trace=True)``)."""

    number: int
    token_ids: tuple[int, ...]
    reward: float


@dataclass(frozen=True)
class Segment:
    """A committed segment: response tokens ``[start, end)``.

    Attributes
    ----------
    start, end
        Positions in the response, in tokens.
    reward
        r(x, y[:end]); None where the method scores no segments.
    threshold
        tau(end) of the accept test; None where there is no test.
    attempts
        Attempts made, the kept one included.
    accepted
        ``"test"``: the segment passed. ``"fallback"``: no attempt passed and this was the best.
    rejected
        The other attempts, in order, if asked for.
    """

    start: int
    end: int
    reward: float | None
    threshold: float | None
    attempts: int
    accepted: Literal["test", "fallback"]
    rejected: tuple[Attempt, ...] = ()


@dataclass
class CompletionOutput:
    """One response.

    Attributes
    ----------
    index
        0 .. n - 1.
    text
        The response, without special tokens and without the stop text that ended it.
    token_ids
        Every committed token, an end-of-sequence or stop token included.
    logprobs
        Natural log-probability of each token under the model's raw distribution (before
        temperature and filters).
    reward
        Reward of the response so far; None if nothing scored it.
    finish_reason
        None while the request runs.
    segments
        The committed segments, in order.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reward: float | None = None
    finish_reason: FinishReason | None = None
    segments: list[Segment] = field(default_factory=list)


@dataclass
class RequestOutput:
    """A request's responses so far.

    Attributes
    ----------
    error
        Why the request failed, None if it did not. The responses then hold what was committed
        before.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    error: str | None = None


@dataclass(frozen=True)
class Calibration:
    """Rewards of unaligned samples, and the target that follows from them.

    Attributes
    ----------
    target_reward
        The asked quantile.
    quantiles
        Reward at each of the quantiles 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95 and the asked one.
    rewards
        Every sample's reward, in prompt order.
    """

    target_reward: float
    quantiles: dict[float, float]
    rewards: tuple[float, ...]
