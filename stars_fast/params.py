"""Parameters of one request."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from inspect import cleandoc
from numbers import Integral, Real
from typing import Any, Literal, get_args

from stars_fast.methods import COMMON, GIBBS, METHODS, Method, MethodKind, has_gibbs, kind_of

__all__ = ["Acceptance", "CardsRules", "Method", "SegmentEnd", "StarsParams"]
__all__ += ["field_texts", "with_fields"]

Acceptance = Literal["soft", "hard", "gibbs"]
CardsRules = Literal["paper", "public"]
SegmentEnd = Literal["length", "clause", "sentence"]

#: Counts and token ids are 32 bits wide where they are used, sums of two of them included.
_MOST = 2**30


@dataclass(frozen=True)
class StarsParams:
    """What one request asks for. Frozen; unknown names are a ``TypeError``.

    Parameters
    ----------
    method
        ``"stars"`` (arXiv 2511.03827): segments, tested in turn.
        ``"vanilla"``: plain sampling.
        ``"best_of_n"``: `candidates` whole responses, the best-scored one is returned.
        ``"rejection"``: whole responses, tested in turn against `target_reward`.
        ``"cards"`` (arXiv 2406.16306): as ``"stars"``, but a segment ends where the model is
        uncertain.
        ``"args"`` (arXiv 2402.01694): one of the `candidates` most likely tokens, by its
        log-probability plus `reward_weight` times reward; the largest at ``temperature=0``, else a
        draw from the softmax of that over `temperature`. `top_k`, `top_p` and `min_p` do not
        matter, nor do they to ``"mara"``.
        ``"speculative_rejection"`` (arXiv 2410.20290): `candidates` responses, of which the worst
        part ends every `segment_length` tokens; the best-scored one is returned.
        ``"smc"``: sequential Monte Carlo, `candidates` whole paths, resampled where their segments
        end, by exp((r_t - r_(t-1)) / beta); as they grow in number the response becomes a draw
        from the model's distribution times exp(r / beta).
        ``"mara"`` (arXiv 2505.19743): single tokens, the most likely first, each accepted or
        rejected by a small model, the reward model of the engine: its output is the logit of
        "accept".
        ``"persona_judge"`` (arXiv 2504.12663): single tokens, each accepted with probability
        min(1, p_judge / p_draft) by the same model under another prompt (`rewards.Persona`).
        A parameter that is not one of the method's own is an error.
    segment_length
        K: tokens of a segment, at least 1; with ``"cards"`` its longest.
    target_reward
        r*: the reward the threshold schedule rises to. A number; ``"auto"``: the 0.9 quantile of
        the rewards of unaligned samples (`Engine.calibrate`); None: what the engine was last
        calibrated to.
    beta
        Softness of the accept test or choice, in units of reward, above 0. Not the sampling
        temperature.
    alpha
        Where the schedule starts, in [0, 1]: 0 at the prompt's own reward, 1 at `target_reward`.
    max_attempts
        R: attempts of a segment before the best-scored of them is kept, at least 1.
    candidates
        N: attempts drawn side by side in one round, at least 1, or ``"auto"``: as many as pay off.
        Changes the speed, never the tokens. With ``"best_of_n"``, ``"speculative_rejection"``,
        ``"smc"``, ``"args"`` and ``acceptance="gibbs"`` it is part of the method: the number of
        responses, paths, tokens or segments there are to choose from (``"auto"``: 8, of tokens 10).
    acceptance
        ``"soft"``: accept with probability min(1, exp((r - tau) / beta)). ``"hard"``: iff r >= tau.
        ``"gibbs"``, with ``"stars"`` only: choose among the N candidates of a segment with
        probability proportional to exp(r / beta). It needs no target. Each choice is
        self-normalised importance sampling of p(segment) exp(r / beta): biased towards the model
        for small N (N = 1 is the model), exact for a segment as N grows; over several segments it
        follows the rewards of prefixes, as every method that decides segment by segment.
        With ``"mara"``, r is the log-probability of "accept": ``"soft"`` accepts with that
        probability, ``"hard"`` from one half on.
    temperature, top_k, top_p, min_p
        Sampling, applied in this order with the tie rules of transformers' warpers.
        ``temperature=0`` is greedy; every attempt would then be the same, so only one is made.
        ``top_k=0`` and ``top_p=1.0`` and ``min_p=0.0`` switch the filter off.
    max_tokens
        M: the budget of response tokens, at least 1.
    seed
        64-bit key of every draw of the request, in [0, 2**64). None: derived from the engine's seed
        and the number of requests before this one.
    stop
        Text, or texts, that end the response; the text found is not part of the output text.
    stop_token_ids
        Tokens that end the response, beside the model's end-of-sequence tokens.
    ignore_eos
        Do not end at the model's end-of-sequence tokens.
    n
        Responses to return, at least 1. Each has its own draws.
    trace
        Keep the rejected attempts of each segment in `Segment.rejected`.
    rules
        With ``"cards"``: ``"paper"``, or ``"public"`` to follow the published code where that
        differs: end-of-sequence tokens end nothing, a segment may end past `max_tokens`, and after
        `max_attempts` rejections one attempt more is made, without a test, before the best is kept.
    entropy_threshold
        With ``"cards"``: a segment ends before the token whose distribution, the model's raw
        one, has at least this entropy, in nats, at least 0.
    min_segment_length
        With ``"cards"`` and `segment_end`: tokens before the entropy, or a border, ends a segment,
        at least 1.
    segment_end
        ``"length"``: segments have `segment_length` tokens. ``"sentence"``: they end after a token
        that ends a sentence (.!? or a line break), ``"clause"``: or a clause (,;:), and have
        `segment_length` tokens at most. Reward models judge a finished thought better than half a
        one.
    reward_weight
        With ``"args"``: weight of the reward beside the log-probability, at least 0.
    rejection_rate
        With ``"speculative_rejection"``: part of the responses that ends at each boundary, in
        [0, 1).
    ess_threshold
        With ``"smc"``: paths are resampled when their effective number, (sum w)^2 / sum w^2, falls
        below this part of them, in [0, 1].
    calibrate_prefixes
        Replace the reward of an unfinished response by what `Engine.calibrate` found it to predict
        of the finished one, see `PrefixCalibration`.

    Raises
    ------
    ValueError, TypeError
        At construction, naming the parameter, its value and the allowed range. Counts and token
        ids are at most 2**30.
    """

    method: Method = "stars"
    segment_length: int = 32
    target_reward: float | Literal["auto"] | None = None
    beta: float = 0.7
    alpha: float = 0.5
    max_attempts: int = 20
    candidates: int | Literal["auto"] = "auto"
    acceptance: Acceptance = "soft"
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 128
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    n: int = 1
    trace: bool = False
    entropy_threshold: float = 3.0
    min_segment_length: int = 4
    rules: CardsRules = "paper"
    reward_weight: float = 1.5
    rejection_rate: float = 0.5
    ess_threshold: float = 0.5
    calibrate_prefixes: bool = False
    segment_end: SegmentEnd = "length"

    def __post_init__(self) -> None:
        _choice("method", self.method, get_args(Method))
        _choice("acceptance", self.acceptance, get_args(Acceptance))
        _choice("rules", self.rules, get_args(CardsRules))
        _choice("segment_end", self.segment_end, get_args(SegmentEnd))
        self._check_own_parameters()
        for name in ("segment_length", "max_attempts", "max_tokens", "n", "min_segment_length"):
            _integer(name, getattr(self, name), 1)
        if self.candidates != "auto":
            _integer("candidates", self.candidates, 1, also=' or "auto"')
        if self.target_reward is not None and self.target_reward != "auto":
            _number("target_reward", self.target_reward, also=', "auto" or None')
        if _number("beta", self.beta) <= 0 and self.acceptance != "hard":
            raise ValueError(
                f"beta must be above 0 with {self.acceptance} acceptance, got {self.beta!r}"
            )
        _number("alpha", self.alpha, 0.0, 1.0)
        _number("entropy_threshold", self.entropy_threshold, 0.0)
        _number("reward_weight", self.reward_weight, 0.0)
        if not 0.0 <= _number("rejection_rate", self.rejection_rate) < 1.0:
            raise ValueError(f"rejection_rate must be in [0, 1), got {self.rejection_rate!r}")
        _number("ess_threshold", self.ess_threshold, 0.0, 1.0)
        _number("temperature", self.temperature, 0.0)
        _integer("top_k", self.top_k, 0)
        if not 0.0 < _number("top_p", self.top_p) <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None and _integer("seed", self.seed, 0, high=None) >= 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {self.seed!r}")
        for flag in ("ignore_eos", "trace", "calibrate_prefixes"):
            if not isinstance(getattr(self, flag), bool):
                raise TypeError(f"{flag} must be a bool, got {getattr(self, flag)!r}")
        # Sequences become tuples, so that a frozen object cannot change under its owner.
        object.__setattr__(self, "stop", _stop_texts(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_ids(self.stop_token_ids))

    def _check_own_parameters(self) -> None:
        if self.acceptance == "gibbs" and not has_gibbs(self.method):
            raise ValueError(
                f"acceptance must be 'soft' or 'hard' with method={self.method!r}, got 'gibbs'"
            )
        own = self.own_parameters()
        for field in fields(self):
            if field.name not in own and getattr(self, field.name) != field.default:
                shown = "acceptance='gibbs'" if self.kind is GIBBS else f"method={self.method!r}"
                raise ValueError(
                    f"{field.name} is no parameter of {shown}, got {getattr(self, field.name)!r}; "
                    f"the parameters are {', '.join(own)}"
                )

    @property
    def kind(self) -> MethodKind:
        """What the method is made of."""
        return kind_of(self.method, self.acceptance)

    def own_parameters(self) -> tuple[str, ...]:
        """Return the names of the parameters that the method has."""
        return (*COMMON, *self.kind.parameters)

    def with_method(self, method: Method, **changes: Any) -> StarsParams:
        """Return these parameters for another method, those that it does not have at their default.

        `changes` are fields to set besides.
        """
        _choice("method", method, get_args(Method))
        gibbs = self.acceptance == "gibbs" and not has_gibbs(method)
        kept = "soft" if gibbs else self.acceptance
        kind = kind_of(method, changes.get("acceptance", kept))
        own = (*COMMON, *kind.parameters)
        reset = {f.name: f.default for f in fields(self) if f.name not in own}
        return replace(self, **{"acceptance": kept, **reset, "method": method, **changes})

    @property
    def scored(self) -> bool:
        """Whether segments are scored as they are drawn."""
        return self.kind.decides != "always"

    @property
    def needs_target(self) -> bool:
        """Whether segments are tested against a schedule that rises to `target_reward`."""
        return "target_reward" in self.kind.parameters

    @property
    def needs_calibration(self) -> bool:
        """Whether the target is what the engine was, or is to be, calibrated to."""
        return self.needs_target and self.target_reward in (None, "auto")

    @property
    def draft_length(self) -> int:
        """K as it is run."""
        if self.kind.one_token:
            return 1
        return self.max_tokens if self.kind.whole else self.segment_length

    @property
    def longest_response(self) -> int:
        """Tokens of a response at most."""
        return self.max_tokens + (self.draft_length - 1 if self.rules == "public" else 0)

    @property
    def num_candidates(self) -> int:
        """N where it is part of the method; 1 where it is not."""
        if self.kind.default_candidates is None:
            return 1
        return self.kind.default_candidates if self.candidates == "auto" else self.candidates

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """`stop` as a tuple, empty if there is none."""
        return tuple(self.stop or ())

    @property
    def attempts_per_segment(self) -> int:
        """R as it is run: one when greedy, where every draw is the same."""
        if self.temperature == 0 and not self.kind.ranked:
            return 1
        if self.kind.decides == "choice":
            return self.num_candidates
        return self.max_attempts + (1 if self.rules == "public" else 0)


def with_fields(params: StarsParams, values: Mapping[str, object]) -> StarsParams:
    """`params` with some fields replaced; with another method, its own parameters are kept.

    Raises
    ------
    ValueError, TypeError
        A name that is no field, or what `StarsParams` refuses.
    """
    known = [field.name for field in fields(StarsParams)]
    for name in values:
        if name not in known:
            raise ValueError(f"unknown parameter {name!r}; the parameters are {', '.join(known)}")
    changes: dict[str, Any] = dict(values)
    if changes.get("method") in METHODS:
        return params.with_method(**changes)
    return replace(params, **changes)


def field_texts(docstring: str) -> dict[str, str]:
    """Field descriptions of the ``Parameters`` section of a numpy-style docstring.

    Of fields that share one description the first carries it and the others point to it.
    """
    section = re.search(
        r"^Parameters\n-+\n(.*?)(?=^\S[^\n]*\n-+\n|\Z)",
        cleandoc(docstring),
        re.MULTILINE | re.DOTALL,
    )
    texts: dict[str, str] = {}
    for entry in re.split(r"^(?=\S)", section[1] if section else "", flags=re.MULTILINE):
        heading, _, body = entry.partition("\n")
        first, *others = re.split(r"\s*,\s*", heading.partition(" : ")[0].strip())
        if first:
            texts[first] = " ".join(body.replace("`", "").split())
            texts |= {name: f"See --{first.replace('_', '-')}." for name in others}
    return texts


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _integer(name: str, value: object, low: int, also: str = "", high: int | None = _MOST) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer of at least {low}{also}, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}{also}, got {value!r}")
    number = int(value)
    if high is not None and number > high:
        raise ValueError(f"{name} must be at most {high}{also}, got {value!r}")
    return number


def _number(
    name: str, value: object, low: float = -math.inf, high: float = math.inf, also: str = ""
) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number{also}, got {value!r}")
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 1,024 bits
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite{also}, got {value!r}")
    if not low <= number <= high:
        allowed = f"at least {low}" if math.isinf(high) else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {allowed}{also}, got {value!r}")
    return number


def _stop_texts(value: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, (str, Sequence)):
        raise TypeError(f"stop must be text or a sequence of texts, got {value!r}")
    texts = (value,) if isinstance(value, str) else tuple(value)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop must be text, or texts, that are not empty, got {value!r}")
    return texts or None


def _stop_ids(value: Sequence[int] | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"stop_token_ids must be a sequence of token ids, got {value!r}")
    return tuple(_integer("stop_token_ids", token, 0) for token in value) or None
