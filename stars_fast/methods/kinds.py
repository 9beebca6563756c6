"""What a decoding method is made of. All run on the same rounds.

They differ in how long a segment is, in what its candidates are (draws, or the most likely tokens
in order), and in how they are decided: a test for each in turn, a choice among all, or a comparison
of whole responses or paths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from stars_fast.params import StarsParams

#: Parameters of every method.
COMMON = (
    "method", "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "logit_bias", "bad_words", "min_tokens",
    "top_logprobs", "guide_weight", "seed", "stop", "stop_token_ids", "ignore_eos", "n",
)  # fmt: skip


class Drawn(Protocol):
    """The part of a candidate that methods use."""

    @property
    def attempt(self) -> int:
        """Number of the attempt within the segment, from 0."""
        ...

    @property
    def logprobs(self) -> Sequence[float]:
        """Log-probability of each token under the raw distribution."""
        ...

    @property
    def adjusted_logprobs(self) -> Sequence[float]:
        """The same with the request's penalties and biases, where tokens are ranked."""
        ...

    @property
    def log_ratios(self) -> Sequence[float]:
        """Log p - log p_draft of each token of a draft model; empty where nobody asks for it."""
        ...

    @property
    def stopped(self) -> bool:
        """Whether its last token ends the response."""
        ...


@dataclass(frozen=True)
class Schedule:
    """The accept test or choice, as the C++ scheduler takes it (csrc/acceptance.h)."""

    target: float = 0.0
    alpha: float = 1.0
    beta: float = 1.0
    hard: bool = False


def flat_target(params: StarsParams) -> float:
    """Return the target reward as a number.

    Raises
    ------
    ValueError
        If there is none yet.
    """
    if not isinstance(params.target_reward, int | float):
        raise ValueError(f"target_reward must be a number by now, got {params.target_reward!r}")
    return float(params.target_reward)


def threshold_schedule(params: StarsParams) -> Schedule:
    """Return the schedule that the request's own parameters describe.

    Raises
    ------
    ValueError
        If the method needs a target reward and there is none yet.
    """
    own = params.kind.parameters
    target = flat_target(params) if "target_reward" in own else 0.0
    alpha = params.alpha if "alpha" in own else 1.0
    return Schedule(target, alpha, params.beta, params.acceptance == "hard")


@dataclass(frozen=True)
class MethodKind:
    """A method's record.

    Attributes
    ----------
    parameters
        Its own fields of `StarsParams`, in addition to `COMMON`.
    decides
        How a segment is decided. ``"always"``: it is accepted. ``"test"``: each candidate in turn
        is tested against the threshold schedule. ``"choice"``: one of all candidates is taken.
        ``"paths"``: it is accepted, and whole paths are compared at its end.
    one_token
        Segments are single tokens.
    whole
        A segment is the whole response.
    by_entropy
        A segment ends where the model is uncertain.
    ranked
        Candidate i is the i-th most likely token, not a draw.
    competes
        Whole responses, or paths, of which one is returned; None: there is one.
    resamples
        Paths are resampled by weight; otherwise the worst of them end.
    needs_reward
        A reward model is required.
    judges
        The reward model is the language model under another prompt, and no other.
    draft
        What the draft model is for. ``"segments"``: the first half of a segment's candidates are
        its draws, one of which is taken if it passes; the others are the language model's.
        ``"tokens"``: the segment is its draw, as far as the language model accepts its tokens.
    tilts
        The decision needs the log-ratio of language model and draft model.
    default_candidates
        Value of ``candidates="auto"`` if the number changes the result; None if it does not.
    schedule
        The accept test or choice of a request.
    effective_reward
        The reward that is compared, a function of the model's reward and the candidate; None: the
        model's reward.
    merit
        What the scheduler decides by, a function of the reward and the candidate; None: the reward.
        Reported rewards and thresholds do not include it.
    """

    parameters: tuple[str, ...]
    decides: Literal["always", "test", "choice", "paths"]
    one_token: bool = False
    whole: bool = False
    by_entropy: bool = False
    ranked: bool = False
    competes: Literal["responses", "paths"] | None = None
    resamples: bool = False
    needs_reward: bool = True
    judges: bool = False
    draft: Literal["segments", "tokens"] | None = None
    tilts: bool = False
    default_candidates: int | None = None
    schedule: Callable[[StarsParams], Schedule] = threshold_schedule
    effective_reward: Callable[[float, Drawn], float] | None = None
    merit: Callable[[StarsParams, float, Drawn], float] | None = None

    @property
    def plain(self) -> bool:
        """Whether it draws from the language model and does nothing more."""
        return not self.needs_reward and self.draft is None

    @property
    def reads_logprobs(self) -> bool:
        """Whether more of a candidate than its reward may enter its effective reward or merit."""
        return self.effective_reward is not None or self.merit is not None

    @property
    def by_text(self) -> bool:
        """Whether a segment's text and length are all that it needs of the language model."""
        return not (self.by_entropy or self.ranked or self.judges or self.draft)
