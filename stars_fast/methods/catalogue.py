"""The decoding methods, one record each; docs/methods.md says where each is from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from stars_fast.methods.kinds import Drawn, MethodKind, Schedule, flat_target

if TYPE_CHECKING:
    from stars_fast.params import StarsParams

Method = Literal[
    "stars",
    "vanilla",
    "best_of_n",
    "rejection",
    "cards",
    "args",
    "speculative_rejection",
    "smc",
    "mara",
    "persona_judge",
    "rsd",
    "gsi",
    "sss",
]

_DRAWS = ("guided",)  # of methods whose tokens are draws
_SHARES = ("attempts_schedule", "attempts_rate")  # of methods whose segments have attempts
_ATTEMPTS = ("max_attempts", "candidates", "acceptance", "trace", *_SHARES)
_SEGMENT = ("segment_length", "segment_end", "step_text", "min_segment_length")
_SCHEDULE = ("target_reward", "budget", "beta", "alpha", *_ATTEMPTS)


def _args_schedule(params: StarsParams) -> Schedule:
    """A draw from the softmax of the merits over `temperature`; greedy at 0."""
    return Schedule(beta=params.temperature or 1.0, hard=params.temperature == 0)


def _args_merit(params: StarsParams, reward: float, candidate: Drawn) -> float:
    """Log p(token) + w r (arXiv 2402.01694, eq. 3); p is raw but for penalties and biases."""
    return candidate.adjusted_logprobs[0] + params.reward_weight * reward


def _mara_schedule(params: StarsParams) -> Schedule:
    hard = params.acceptance == "hard"
    return Schedule(target=math.log(0.5) if hard else 0.0, hard=hard)


def _log_sigmoid(logit: float, candidate: Drawn) -> float:
    return min(logit, 0.0) - math.log1p(math.exp(-abs(logit)))


def _persona_schedule(params: StarsParams) -> Schedule:
    return Schedule(hard=params.acceptance == "hard")


def _log_ratio(judged: float, candidate: Drawn) -> float:
    """Log p_judge - log p_draft of the segment."""
    return judged - math.fsum(candidate.logprobs)


def _rsd_schedule(params: StarsParams) -> Schedule:
    return Schedule(target=flat_target(params), hard=True)


def _gsi_schedule(params: StarsParams) -> Schedule:
    return Schedule(target=flat_target(params), beta=params.beta)


def _tilted(params: StarsParams, reward: float, candidate: Drawn) -> float:
    """R + beta (log p - log p_draft) of a segment of the draft (arXiv 2506.04118); r of others."""
    return reward + params.beta * math.fsum(candidate.log_ratios)


METHODS: dict[Method, MethodKind] = {
    "stars": MethodKind((*_SEGMENT, *_SCHEDULE, *_DRAWS, "calibrate_prefixes"), "test"),
    "vanilla": MethodKind(("segment_length", *_DRAWS), "always", needs_reward=False),
    "best_of_n": MethodKind(
        ("segment_length", "candidates", "sample_cost", *_DRAWS),
        "always",
        competes="responses",
        default_candidates=8,
    ),
    "rejection": MethodKind(
        (
            "target_reward", "beta", "max_attempts", "candidates", "acceptance", "trace", *_DRAWS,
        ),
        "test",
        whole=True,
    ),
    "cards": MethodKind(
        (
            "segment_length", "min_segment_length", "entropy_threshold", "rules", *_SCHEDULE,
            *_DRAWS,
            "calibrate_prefixes",
        ),
        "test",
        by_entropy=True,
    ),
    "args": MethodKind(
        ("candidates", "reward_weight", "trace", *_SHARES),
        "choice",
        one_token=True,
        ranked=True,
        default_candidates=10,
        schedule=_args_schedule,
        merit=_args_merit,
    ),
    "speculative_rejection": MethodKind(
        (*_SEGMENT, "candidates", "rejection_rate", *_DRAWS, "calibrate_prefixes"),
        "paths",
        competes="paths",
        default_candidates=8,
    ),
    "smc": MethodKind(
        (*_SEGMENT, "candidates", "beta", "ess_threshold", *_DRAWS, "calibrate_prefixes"),
        "paths",
        competes="paths",
        resamples=True,
        default_candidates=8,
    ),
    "mara": MethodKind(
        _ATTEMPTS,
        "test",
        one_token=True,
        ranked=True,
        schedule=_mara_schedule,
        effective_reward=_log_sigmoid,
    ),
    "persona_judge": MethodKind(
        (*_ATTEMPTS, *_DRAWS),
        "test",
        one_token=True,
        judges=True,
        schedule=_persona_schedule,
        effective_reward=_log_ratio,
    ),
    "rsd": MethodKind(
        (*_SEGMENT, "target_reward", "trace", *_DRAWS, "calibrate_prefixes"),
        "choice",
        draft="segments",
        schedule=_rsd_schedule,
    ),
    "gsi": MethodKind(
        (
            *_SEGMENT, "target_reward", "beta", "candidates", "trace", *_DRAWS,
            "calibrate_prefixes",
        ),
        "choice",
        draft="segments",
        tilts=True,
        default_candidates=8,
        schedule=_gsi_schedule,
        merit=_tilted,
    ),
    "sss": MethodKind(
        ("segment_length", *_DRAWS), "always", draft="tokens", needs_reward=False
    ),
}  # fmt: skip

#: ``acceptance="gibbs"`` of ``"stars"``.
GIBBS = MethodKind(
    (
        *_SEGMENT, "beta", "candidates", "acceptance", "trace", *_SHARES, *_DRAWS,
        "calibrate_prefixes",
    ),
    "choice",
    default_candidates=8,
)  # fmt: skip


def kind_of(method: Method, acceptance: str) -> MethodKind:
    """Return a method's record; `acceptance` tells the two forms of ``"stars"`` apart."""
    return GIBBS if acceptance == "gibbs" and has_gibbs(method) else METHODS[method]


def has_gibbs(method: Method) -> bool:
    """Whether a method can choose among its candidates by exp(r / beta)."""
    return method == "stars"
