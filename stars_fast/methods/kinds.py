"""The decoding methods: what each is, and which parameters it has.

All run on the same rounds. They differ in how long a segment is, in what its candidates are (draws,
or the most likely tokens in order), and in what becomes of them: a test for each in turn, a choice
among all, or a decision over whole paths where their segments end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
]

#: Parameters of every method.
COMMON = (
    "method", "max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop",
    "stop_token_ids", "ignore_eos", "n",
)  # fmt: skip

_ATTEMPTS = ("max_attempts", "candidates", "acceptance", "trace")
_SEGMENT = ("segment_length", "segment_end", "min_segment_length")
_SCHEDULE = ("target_reward", "beta", "alpha", *_ATTEMPTS)


@dataclass(frozen=True)
class MethodKind:
    """What a method is made of.

    Attributes
    ----------
    parameters
        Its own fields of `StarsParams`, beside `COMMON`.
    decides
        What becomes of a segment. ``"always"``: it is accepted. ``"test"``: each candidate in turn
        is tested against the threshold schedule. ``"choice"``: one of all candidates is taken.
        ``"paths"``: it is accepted, and whole paths are compared at its end.
    one_token
        Segments are single tokens.
    ranked
        Candidate i is the i-th most likely token, not a draw.
    default_candidates
        What ``candidates="auto"`` stands for where the number matters for the result; None where
        it does not.
    """

    parameters: tuple[str, ...]
    decides: Literal["always", "test", "choice", "paths"]
    one_token: bool = False
    ranked: bool = False
    default_candidates: int | None = None


METHODS: dict[Method, MethodKind] = {
    "stars": MethodKind((*_SEGMENT, *_SCHEDULE, "calibrate_prefixes"), "test"),
    "vanilla": MethodKind(("segment_length",), "always"),
    "best_of_n": MethodKind(("segment_length", "candidates"), "always", default_candidates=8),
    "rejection": MethodKind(("target_reward", "beta", *_ATTEMPTS), "test"),
    "cards": MethodKind(
        (
            "segment_length", "min_segment_length", "entropy_threshold", "rules", *_SCHEDULE,
            "calibrate_prefixes",
        ),
        "test",
    ),
    "args": MethodKind(
        ("candidates", "reward_weight", "trace"),
        "choice",
        one_token=True,
        ranked=True,
        default_candidates=10,
    ),
    "speculative_rejection": MethodKind(
        (*_SEGMENT, "candidates", "rejection_rate", "calibrate_prefixes"),
        "paths",
        default_candidates=8,
    ),
    "smc": MethodKind(
        (*_SEGMENT, "candidates", "beta", "ess_threshold", "calibrate_prefixes"),
        "paths",
        default_candidates=8,
    ),
    "mara": MethodKind(_ATTEMPTS, "test", one_token=True, ranked=True),
    "persona_judge": MethodKind(_ATTEMPTS, "test", one_token=True),
}  # fmt: skip

#: ``acceptance="gibbs"`` of ``"stars"``.
GIBBS = MethodKind(
    (*_SEGMENT, "beta", "candidates", "acceptance", "trace", "calibrate_prefixes"),
    "choice",
    default_candidates=8,
)


def kind_of(method: Method, acceptance: str) -> MethodKind:
    """Return what a method is made of; `acceptance` tells the two forms of ``"stars"`` apart."""
    return GIBBS if method == "stars" and acceptance == "gibbs" else METHODS[method]
