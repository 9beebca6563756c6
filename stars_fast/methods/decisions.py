"""What the scheduler is told of a method: its rule, and the number that it decides by."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from stars_fast.engine.requests import Candidate
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


def scheduler_options(params: StarsParams) -> SchedulerOptions:
    """Return the rule by which a method's segments are decided.

    Raises
    ------
    ValueError
        If the method needs a target reward and there is none yet.
    """
    tested = params.kind.decides == "test"
    target, alpha, beta, hard = 0.0, 1.0, params.beta, params.acceptance == "hard"
    if params.needs_target:
        if not isinstance(params.target_reward, int | float):
            raise ValueError(f"target_reward must be a number by now, got {params.target_reward!r}")
        target = float(params.target_reward)
    if params.method in ("stars", "cards"):
        alpha = params.alpha
    elif params.method in ("mara", "persona_judge"):
        beta = 1.0  # the reward is the logarithm of a probability, or of a ratio of two
        target = math.log(0.5) if params.method == "mara" and hard else 0.0
    elif params.method == "args":
        hard = params.temperature == 0
        beta = params.temperature or 1.0
    candidates = 0 if params.candidates == "auto" else params.candidates
    if params.kind.decides == "choice":
        candidates = params.num_candidates
    return SchedulerOptions(
        scored=params.scored,
        segment_length=params.draft_length,
        max_tokens=params.max_tokens,
        max_attempts=params.attempts_per_segment,
        candidates=candidates if params.scored else 0,
        target_reward=target,
        alpha=alpha,
        beta=beta,
        hard=hard,
        choose=params.scored and not tested,
        overrun=params.rules == "public",
        # The one more that the public rules make; a greedy request makes none.
        last_untested=tested and params.attempts_per_segment > params.max_attempts,
    )


def effective_reward(
    params: StarsParams,
    reward: float,
    candidate: Candidate,
    tokens: int,
    prefixes: PrefixCalibration | None,
) -> float:
    """Return the reward of a response so far as it is compared with thresholds and rewards.

    Parameters
    ----------
    params
        Of the request.
    reward
        From the reward model.
    candidate
        The segment that the response ends with.
    tokens
        Of the response, the segment included.
    prefixes
        What the rewards of unfinished responses are replaced by; None: nothing.
    """
    if params.method == "mara":  # log sigmoid, whatever the sign
        return min(reward, 0.0) - math.log1p(math.exp(-abs(reward)))
    if params.method == "persona_judge":
        return reward - math.fsum(candidate.logprobs)
    if prefixes is not None and not candidate.stopped and tokens < params.max_tokens:
        return prefixes.predict(reward, tokens)
    return reward


def merit(params: StarsParams, reward: float, candidate: Candidate) -> float:
    """Return what the scheduler decides by: the shown reward, but for ``"args"``.

    There it is log p(token) + w r (arXiv 2402.01694, eq. 3), p being the raw distribution.
    """
    if params.method == "args":
        return candidate.logprobs[0] + params.reward_weight * reward
    return reward
