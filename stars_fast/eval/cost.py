"""What a run costs: tokens, forward calls, row-steps, operations, seconds.

Operations are 2 x parameters x tokens, for the language model and for the reward model. That leaves
out attention over the context (about 4 x layers x width x context more for each token), rows that
are run on behind the end of their segment, padding, and the work of rewards that are functions.

A row-step is one row of one decode step. It is used if its token became part of an attempt, whether
that was accepted or not. It is not where the segment had ended and other rows went on, where the
token drawn belongs to the next segment (`entropy_threshold`) or lies behind a stop text. Prompts
have no row-steps, and spare rows of a captured step are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

_COUNTERS = (
    "drafted_tokens",
    "accepted_tokens",
    "prefill_tokens",
    "attempts",
    "segments",
    "fallbacks",
    "rounds",
    "lm_calls",
    "row_steps",
    "rm_tokens",
    "rm_calls",
    "rm_jobs",
)


@dataclass(frozen=True)
class Cost:
    """What one run took.

    Attributes
    ----------
    lm_tokens
        Tokens through the language model: drafted ones, whether kept or not, and prompts. Each
        prompt counts at least once, also where an earlier run had left it in the cache: the order
        of runs must not matter.
    rm_tokens, rm_calls, rm_jobs
        Tokens, forward passes and texts of the reward model while the run decoded; 0 tokens if it
        is a function. Scoring the finished responses for the comparison is not included.
    lm_calls
        Forward passes of the language model.
    lm_parameters, rm_parameters
        Weights that a token is multiplied with.
    drafted_tokens, accepted_tokens, attempts, segments, fallbacks, rounds
        Counters of the scheduler.
    seconds
        From the first round to the last.
    row_steps
        Rows x steps of drafting; 0 in records from before they were counted.
    """

    lm_tokens: int
    rm_tokens: int
    lm_calls: int
    rm_calls: int
    rm_jobs: int
    lm_parameters: int
    rm_parameters: int
    drafted_tokens: int
    accepted_tokens: int
    attempts: int
    segments: int
    fallbacks: int
    rounds: int
    seconds: float
    row_steps: int = 0

    @property
    def flops(self) -> float:
        """Operations, see the notes of this module."""
        return 2.0 * (self.lm_parameters * self.lm_tokens + self.rm_parameters * self.rm_tokens)

    @property
    def discarded_per_rejection(self) -> float | None:
        """Tokens drafted in vain for each attempt that lost its test; None if none did."""
        rejected = self.attempts - self.segments
        return (self.drafted_tokens - self.accepted_tokens) / rejected if rejected > 0 else None

    @property
    def unused_share(self) -> float | None:
        """Share of row-steps whose token is part of no attempt; None if none was counted."""
        return 1.0 - self.drafted_tokens / self.row_steps if self.row_steps else None

    def scaled(self, share: float) -> Cost:
        """Return a share of everything that was spent; sizes of models stay."""
        sizes = ("lm_parameters", "rm_parameters")
        spent = {name: value for name, value in asdict(self).items() if name not in sizes}
        counts = {
            name: value * share if name == "seconds" else round(value * share)
            for name, value in spent.items()
        }
        return replace(self, **counts)

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return asdict(self)


def total(costs: Sequence[Cost]) -> Cost:
    """Return the cost of parts of one run together; there is at least one."""
    spent = {field.name: sum(getattr(cost, field.name) for cost in costs) for field in fields(Cost)}
    first = costs[0]
    sizes = {"lm_parameters": first.lm_parameters, "rm_parameters": first.rm_parameters}
    return Cost(**{**spent, **sizes})


def cost_of(
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    prompt_tokens: int,
    parameters: Mapping[str, int],
    seconds: float,
) -> Cost:
    """Return what happened between two calls of `Engine.stats`.

    Parameters
    ----------
    before, after
        The counters.
    prompt_tokens
        Tokens of all prompts of the run.
    parameters
        From `Engine.num_parameters`.
    seconds
        Duration of the run.
    """
    spent = {name: int(after.get(name, 0) - before.get(name, 0)) for name in _COUNTERS}
    prefill = spent.pop("prefill_tokens")
    return Cost(
        lm_tokens=spent["drafted_tokens"] + max(prefill, prompt_tokens),
        lm_parameters=parameters["lm"],
        rm_parameters=parameters["rm"],
        seconds=seconds,
        **spent,
    )
