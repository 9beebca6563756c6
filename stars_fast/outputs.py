"""What a request returns."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Attempt:
    """A candidate that lost its accept test (kept with ``StarsParams(trace=True)``)."""

    number: int
    token_ids: tuple[int, ...]
    reward: float
    rewards: dict[str, float] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Segment:
    """A committed segment: response tokens ``[start, end)``.

    Attributes
    ----------
    start, end
        Positions in the response, in tokens.
    reward
        r(x, y[:end]), as it is compared with the threshold: calibrated with
        ``calibrate_prefixes``; with ``"mara"`` the log-probability of "accept", with
        ``"persona_judge"`` log(p_judge / p_draft). None where the method scores no segments.
    threshold
        tau(end) of the accept test; None where there is no test.
    attempts
        Attempts made, the kept one included.
    accepted
        ``"test"``: the segment passed, or there was no test. ``"fallback"``: no attempt passed and
        this was the best. ``"choice"``: chosen among all attempts.
    rejected
        The other attempts, in order, if asked for.
    rewards
        The rewards that `reward` is made of, by name, unweighted; empty with one reward model
        without a name.
    """

    start: int
    end: int
    reward: float | None
    threshold: float | None
    attempts: int
    accepted: Literal["test", "fallback", "choice"]
    rejected: tuple[Attempt, ...] = ()
    rewards: dict[str, float] = field(default_factory=dict, hash=False)


@dataclass
class CompletionOutput:
    """One response.

    Attributes
    ----------
    index
        0 .. n - 1.
    text
        The response, without special tokens and without the stop text that ended it: what its
        tokens add to the prompt's text. While the request runs it is what further tokens do not
        change, all but the bytes of a character that lacks others.
    token_ids
        Every committed token, an end-of-sequence or stop token included.
    logprobs
        Natural log-probability of each token under the model's raw distribution (before penalties,
        biases, temperature and filters).
    reward
        Reward of the response so far; None if nothing scored it.
    rewards
        The rewards that it is made of, by name, unweighted; empty with one reward model without a
        name.
    finish_reason
        None while the request runs.
    segments
        The committed segments, in order.
    top_logprobs
        With ``StarsParams(top_logprobs=...)``: at each position the most likely tokens with their
        log-probabilities under the same distribution, the most likely first; else empty.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reward: float | None = None
    finish_reason: FinishReason | None = None
    segments: list[Segment] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    rewards: dict[str, float] = field(default_factory=dict)


@dataclass
class RequestOutput:
    """A request's responses so far.

    Attributes
    ----------
    error
        Why the request failed, None if it did not. The responses then hold what was committed
        before.
    drafted_tokens
        Tokens drawn from the language model for it so far, those of candidates that were rejected,
        dropped or not needed included.
    rm_tokens
        Tokens run through the reward model for it so far, padding not counted; a shared part counts
        for the request it was run for. 0 if the reward model is a function.
    target_reward
        r* that it was run with, also where it was ``"auto"``: with this number and its seed it is
        drawn again. None where there is none.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    error: str | None = None
    drafted_tokens: int = field(default=0, compare=False)
    rm_tokens: int = field(default=0, compare=False)
    target_reward: float | None = None


@dataclass(frozen=True)
class TokenScore:
    """A token of a prompt.

    Attributes
    ----------
    logprob
        Natural log-probability under the model's raw distribution, after those before it; None for
        the first one, before which there is nothing.
    top
        The most likely tokens at its place with theirs, the most likely first.
    """

    logprob: float | None = None
    top: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PrefixCalibration:
    """Predictions of a finished response's reward from the reward of its prefix.

    Reward models are trained on whole responses and misjudge prefixes. Here the final reward is
    regressed on the reward at each token position by least squares over unaligned samples:
    E[r_final | r_t] = intercept_t + slope_t r_t.

    Attributes
    ----------
    positions
        Response tokens t, rising.
    slope, intercept
        Coefficients of the line at each position.
    correlation
        Pearson's, of r_t and the final reward; 0 where either does not vary.
    samples
        Responses that were unfinished at each position.
    """

    positions: tuple[int, ...]
    slope: tuple[float, ...]
    intercept: tuple[float, ...]
    correlation: tuple[float, ...]
    samples: tuple[int, ...]

    def predict(self, reward: float, tokens: int) -> float:
        """Return the expected final reward of an unfinished response.

        Parameters
        ----------
        reward
            r(x, y[:tokens]).
        tokens
            Length of the prefix. Lines are interpolated between two positions; outside, the nearest
            is used.
        """
        at = bisect_left(self.positions, tokens)
        if at == len(self.positions) or self.positions[at] == tokens or at == 0:
            at = min(at, len(self.positions) - 1)
            return self.intercept[at] + self.slope[at] * reward
        left, right = self.positions[at - 1], self.positions[at]
        share = (tokens - left) / (right - left)
        slope = (1 - share) * self.slope[at - 1] + share * self.slope[at]
        intercept = (1 - share) * self.intercept[at - 1] + share * self.intercept[at]
        return intercept + slope * reward


#: What ``target_reward="auto"`` is of single prompts; ``"best"``: what predicts samples best.
TargetKind = Literal["pooled", "prompt", "relative", "best"]


@dataclass(frozen=True)
class PromptTargets:
    """Targets that depend on the prompt; `stars_fast.engine.prompt_targets` has the formulas.

    Attributes
    ----------
    kind
        Of prompts that were sampled: ``"pooled"``, the quantile of all samples; ``"prompt"``, by
        the prompt's own samples; ``"relative"``, by the reward of the prompt alone.
    unseen
        Of all others: ``"pooled"`` or ``"relative"``.
    losses
        Pinball loss on held-out samples, by kind; those that could not be fitted are missing.
    pooled
        The quantile of all samples.
    own
        Target by the prompt's own samples, by its token ids.
    intercept, slope
        The target relative to the prompt is ``intercept + slope * r(x)``.
    """

    kind: str
    unseen: str
    losses: dict[str, float]
    pooled: float
    own: Mapping[tuple[int, ...], float] = field(repr=False)
    intercept: float
    slope: float

    def kind_of(self, token_ids: Sequence[int]) -> str:
        """Return the kind of a prompt's target."""
        return self.kind if tuple(token_ids) in self.own else self.unseen

    def of(self, token_ids: Sequence[int], prompt_reward: float | None) -> float:
        """Return the target of a prompt; `prompt_reward`: r(x), if its kind is ``"relative"``."""
        kind = self.kind_of(token_ids)
        if kind == "prompt":
            return self.own[tuple(token_ids)]
        if kind == "relative" and prompt_reward is not None:
            return self.intercept + self.slope * prompt_reward
        return self.pooled


@dataclass(frozen=True, eq=False)
class SampleWalks:
    """How rewards went along unaligned samples, and what these cost, for `StarsParams.budget`.

    Attributes
    ----------
    settings
        Parameters of the samples that segments depend on, by name.
    prompts
        Number of each sample's prompt, from 0.
    ends, rewards
        Response tokens, and reward, at the end of each segment of each sample.
    stopped
        Whether each ended by itself.
    prompt_rewards
        r(x) of each prompt; None: thresholds are flat.
    prompt_tokens
        Of a prompt, on average.
    scoring
        Operations of scoring a token over those of drawing it.
    excess
        What a pilot drafted beyond plain sampling, over what the walks foresee.
    """

    settings: Mapping[str, Any]
    prompts: tuple[int, ...] = field(repr=False)
    ends: tuple[tuple[int, ...], ...] = field(repr=False)
    rewards: tuple[tuple[float, ...], ...] = field(repr=False)
    stopped: tuple[bool, ...] = field(repr=False)
    prompt_rewards: tuple[float, ...] | None = field(repr=False)
    prompt_tokens: float
    scoring: float
    excess: float = 1.0


@dataclass(frozen=True)
class Calibration:
    """Rewards of unaligned samples, and the target that follows from them.

    Attributes
    ----------
    target_reward
        The requested quantile.
    quantiles
        Reward at each of the quantiles 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95 and the requested one.
    rewards
        Every sample's reward, in prompt order.
    prefixes
        For ``calibrate_prefixes``; None if every sample ended with its first segment.
    targets
        Targets of single prompts; None: all have `target_reward`.
    walks
        What a `budget` is turned into a target by; None: the samples were drawn without one.
    """

    target_reward: float
    quantiles: dict[float, float]
    rewards: tuple[float, ...]
    prefixes: PrefixCalibration | None = None
    targets: PromptTargets | None = None
    walks: SampleWalks | None = None
