"""The scheduler's rule for a request's parameters, and the number that it decides by."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from stars_fast.methods.kinds import Drawn
    from stars_fast.outputs import PrefixCalibration
    from stars_fast.params import StarsParams


class SchedulerOptions(TypedDict):
    """Arguments of `Scheduler.add` that follow from a request's parameters."""

    scored: bool
    segment_length: int
    max_tokens: int
    max_attempts: int
    candidates: int
    target_reward: float
    alpha: float
    beta: float
    hard: bool
    choose: bool
    overrun: bool
    last_untested: bool
    draft_attempts: int
    attempts_at: tuple[int, ...]
    attempts_span: int
    plain_from: int


def scheduler_options(params: StarsParams) -> SchedulerOptions:
    """Return the rule by which a method's segments are decided.

    Raises
    ------
    ValueError
        If the method needs a target reward and there is none yet.
    """
    kind = params.kind
    schedule = kind.schedule(params)
    candidates = 0 if params.candidates == "auto" else params.candidates
    if kind.decides == "choice":
        candidates = params.num_candidates
    return SchedulerOptions(
        scored=params.scored,
        segment_length=params.draft_length,
        max_tokens=params.max_tokens,
        max_attempts=params.attempts_per_segment,
        candidates=candidates if params.scored else 0,
        target_reward=schedule.target,
        alpha=schedule.alpha,
        beta=schedule.beta,
        hard=schedule.hard,
        choose=kind.decides == "choice",
        overrun=params.rules == "public",
        # The one more that the public rules make; a greedy request makes none.
        last_untested=kind.decides == "test" and params.attempts_per_segment > params.max_attempts,
        draft_attempts=params.draft_attempts if kind.decides == "choice" else 0,
        attempts_at=params.attempts_at,
        attempts_span=params.attempts_span,
        plain_from=params.plain_from,
    )


def effective_reward(
    params: StarsParams,
    reward: float,
    candidate: Drawn,
    tokens: int,
    prefixes: PrefixCalibration | None,
) -> float:
    """Return the reward of a response so far as it is compared with thresholds and rewards.

    Parameters
    ----------
    params
        Parameters of the request.
    reward
        From the reward model.
    candidate
        The segment that the response ends with.
    tokens
        Length of the response, the segment included.
    prefixes
        Calibration of the rewards of unfinished responses; None: they are not replaced.
    """
    own = params.kind.effective_reward
    if own is not None:
        return own(reward, candidate)
    if prefixes is not None and not candidate.stopped and tokens < params.max_tokens:
        return prefixes.predict(reward, tokens)
    return reward


def merit(params: StarsParams, reward: float, candidate: Drawn) -> float:
    """Return what the scheduler decides by: the effective reward, or the method's merit."""
    own = params.kind.merit
    return reward if own is None else own(params, reward, candidate)
