"""Parameters of one request."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from inspect import cleandoc
from numbers import Integral, Real
from textwrap import indent
from typing import Any, Literal, get_args

from stars_fast.methods import COMMON, GIBBS, METHODS, Method, MethodKind, has_gibbs, kind_of
from stars_fast.methods.attempts import MOST_ATTEMPTS, MOST_PARTS, shared_out
from stars_fast.text.surrogates import check_unicode

__all__ = ["Acceptance", "AttemptsSchedule", "CardsRules", "Method", "SegmentEnd", "StarsParams"]
__all__ += ["RANGES", "TEXTS", "Range", "plain_text", "with_fields"]

Acceptance = Literal["soft", "hard", "gibbs"]
CardsRules = Literal["paper", "public"]
SegmentEnd = Literal["length", "clause", "sentence", "step"]
AttemptsSchedule = Literal["uniform", "decay", "growth"]

#: Counts, and positions that are sums of two of them, have to fit 32 bits in the core.
_MOST = 2**28 - 1
_MOST_STOPS = 1024  # each is looked for in every segment


@dataclass(frozen=True)
class Range:
    """What a parameter may be, for the check here, the server's schema and error messages.

    Attributes
    ----------
    low, high
        Bounds, included.
    above, below
        Bounds, excluded; None: there is none.
    whole
        An integer is asked for.
    """

    low: float = -math.inf
    high: float = math.inf
    above: float | None = None
    below: float | None = None
    whole: bool = False

    def check(self, name: str, value: object, also: str = "") -> None:
        """Raise ValueError or TypeError for a value outside; `also`: what else is allowed."""
        if self.whole:
            self._check_integer(name, value, also)
            return
        number = _finite(name, value, also)
        if self.above is not None or self.below is not None:
            left = f"({self.above}" if self.above is not None else f"[{self.low}"
            right = f"{self.below})" if self.below is not None else f"{self.high}]"
            over = self.above is None or number > self.above
            under = self.below is None or number < self.below
            if math.isinf(self.low) and math.isinf(self.high) and self.below is None and not over:
                raise ValueError(f"{name} must be above {self.above}{also}, got {value!r}")
            if not (over and under and self.low <= number <= self.high):
                raise ValueError(f"{name} must be in {left}, {right}, got {value!r}")
        if not self.low <= number <= self.high:
            both = not math.isinf(self.high)
            allowed = f"in [{self.low}, {self.high}]" if both else f"at least {self.low}"
            raise ValueError(f"{name} must be {allowed}{also}, got {value!r}")

    def _check_integer(self, name: str, value: object, also: str) -> None:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(
                f"{name} must be an integer of at least {self.low}{also}, got {value!r}"
            )
        if int(value) < self.low:
            raise ValueError(f"{name} must be at least {self.low}{also}, got {value!r}")
        if int(value) > self.high:
            raise ValueError(f"{name} must be at most {self.high}{also}, got {value!r}")


def _finite(name: str, value: object, also: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number{also}, got {value!r}")
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 1,024 bits
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite{also}, got {value!r}")
    return number


def _about(text: str, allowed: Range | None = None) -> dict[str, Any]:
    """Metadata of a field: what it is and, where its values have one, their range."""
    return {"text": cleandoc(text), "range": allowed}


_COUNT = Range(1, _MOST, whole=True)
_PART = Range(0, 1)
_TOKEN_ID = Range(0, 2**31 - 1, whole=True)
_SEED = Range(0, 2**64 - 1, whole=True)
_BIAS = Range(-100, 100)


@dataclass(frozen=True)
class StarsParams:
    """What one request asks for. Frozen; unknown names are a ``TypeError``.

    Raises
    ------
    ValueError, TypeError
        At construction, naming the parameter, its value and the allowed range. Counts and token
        ids are below 2**28.
    """

    method: Method = field(
        default="stars",
        metadata=_about("""
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
        ``"rsd"`` (arXiv 2501.19324): a segment is the draft model's if its reward reaches
        `target_reward`, else the model's (``Engine(draft_model=...)``).
        ``"gsi"`` (arXiv 2506.04118): of `candidates` segments of the draft model one is chosen by
        exp(t / beta), t = r + beta (log p - log p_draft), and taken if t reaches `target_reward`;
        else one of `candidates` of the model, by exp(r / beta).
        ``"sss"`` (arXiv 2508.15044): the draft model's tokens, `segment_length` at a time, each
        kept with probability min(1, p / p_reference), the reference being the draft model before it
        was aligned; the first that is not is drawn anew. It needs no reward model.
        A parameter that is not one of the method's own is an error.
        """),
    )
    segment_length: int = field(
        default=32,
        metadata=_about(
            'K: tokens of a segment, at least 1; with ``"cards"`` its longest.', _COUNT
        ),
    )
    target_reward: float | Literal["auto"] | None = field(
        default=None,
        metadata=_about(
            """
            r*: the reward the threshold schedule rises to. A number; ``"auto"``: the 0.9 quantile
            of the rewards of unaligned samples (`Engine.calibrate`); None: what the engine was last
            calibrated to.
            """,
            Range(),
        ),
    )
    budget: float | None = field(
        default=None,
        metadata=_about(
            """
            Cost to keep to on average, in times of plain sampling, reward model included, at least
            1. It chooses `target_reward`, `max_attempts` where that is the default, and
            ``candidates=1`` for ``"auto"``, by what `Engine.calibrate` found with such parameters.
            In operations, as ``stars-fast eval`` counts them. None: no budget.
            """,
            Range(1),
        ),
    )
    beta: float = field(
        default=0.7,
        metadata=_about(
            """
            Softness of the accept test or choice, in units of reward, above 0. Not the sampling
            temperature.
            """,
            Range(),
        ),
    )
    alpha: float = field(
        default=0.5,
        metadata=_about(
            """
            Where the schedule starts, in [0, 1]: 0 at the prompt's own reward, 1 at
            `target_reward`.
            """,
            _PART,
        ),
    )
    max_attempts: int = field(
        default=20,
        metadata=_about(
            "R: attempts of a segment before the best-scored of them is kept, at least 1.", _COUNT
        ),
    )
    attempts_schedule: AttemptsSchedule = field(
        default="uniform",
        metadata=_about("""
        Which segments the attempts go to (arXiv 2510.23334). ``"uniform"``: each has
        `max_attempts`, or as many as there are `candidates` to choose from. ``"decay"``: the first
        have more and the last fewer, at least 1, for the same total over a response of
        `max_tokens`; ``"growth"``: the other way round. Segments behind the last that has more
        than one are plain samples: they are not scored, and the response has no reward then.
        """),
    )
    attempts_rate: float = field(
        default=0.5,
        metadata=_about(
            """
            With `attempts_schedule`: attempts fall by this factor from a segment to the next, or,
            where segments differ in length, every `segment_length` tokens, in (0, 1).
            """,
            Range(above=0, below=1),
        ),
    )
    candidates: int | Literal["auto"] = field(
        default="auto",
        metadata=_about(
            """
            N: attempts drawn side by side in one round, at least 1, or ``"auto"``: as many as pay
            off. Changes the speed, never the tokens. With ``"best_of_n"``,
            ``"speculative_rejection"``, ``"smc"``, ``"args"``, ``"gsi"`` and
            ``acceptance="gibbs"`` it is part of the method: the number of responses, paths, tokens
            or segments (``"gsi"``: of each model) there are to choose from (``"auto"``: 8, of
            tokens 10).
            """,
            _COUNT,
        ),
    )
    sample_cost: float = field(
        default=0.0,
        metadata=_about(
            """
            With ``"best_of_n"``: draw no more samples once the best reward would gain less than
            this by another, on average; `candidates` are the most there are, the first 4 are always
            drawn. In units of reward, at least 0; 0: all are drawn.
            """,
            Range(0),
        ),
    )
    acceptance: Acceptance = field(
        default="soft",
        metadata=_about("""
        ``"soft"``: accept with probability min(1, exp((r - tau) / beta)). ``"hard"``: iff r >= tau.
        ``"gibbs"``, with ``"stars"`` only: choose among the N candidates of a segment with
        probability proportional to exp(r / beta). It needs no target. Each choice is
        self-normalised importance sampling of p(segment) exp(r / beta): biased towards the model
        for small N (N = 1 is the model), exact for a segment as N grows; over several segments it
        follows the rewards of prefixes, as every method that decides segment by segment.
        With ``"mara"``, r is the log-probability of "accept": ``"soft"`` accepts with that
        probability, ``"hard"`` from one half on.
        """),
    )
    temperature: float = field(
        default=0.8,
        metadata=_about(
            """
            Sampling temperature, at least 0, applied before `top_k`, `top_p` and `min_p`. 0 is
            greedy; every attempt would then be the same, so only one is made.
            """,
            Range(0),
        ),
    )
    top_k: int = field(
        default=40,
        metadata=_about(
            """
            Draw from this many most likely tokens and those that tie with the last; 0 is off, as is
            the size of the vocabulary or more. The filters apply in the order `top_k`, `top_p`,
            `min_p`, with the tie rules of transformers' warpers.
            """,
            Range(0, _MOST, whole=True),
        ),
    )
    top_p: float = field(
        default=1.0,
        metadata=_about(
            """
            Draw from the most likely tokens whose probabilities sum up to this, in (0, 1]; 1 is
            off.
            """,
            Range(above=0, high=1),
        ),
    )
    min_p: float = field(
        default=0.0,
        metadata=_about(
            """
            Draw from the tokens with at least this part of the largest probability, in [0, 1]; 0 is
            off.
            """,
            _PART,
        ),
    )
    repetition_penalty: float = field(
        default=1.0,
        metadata=_about(
            """
            Divides the positive logits, and multiplies the negative ones, of every token that the
            prompt or the response has, in [0.01, 100]; 1 is off (arXiv 1909.05858).
            """,
            Range(0.01, 100),
        ),
    )
    presence_penalty: float = field(
        default=0.0,
        metadata=_about(
            "Taken from the logit of every token that the response has, in [-2, 2]; 0 is off.",
            Range(-2, 2),
        ),
    )
    frequency_penalty: float = field(
        default=0.0,
        metadata=_about(
            """
            Taken from the logit of every token of the response, as many times as it is there, in
            [-2, 2]; 0 is off.
            """,
            Range(-2, 2),
        ),
    )
    logit_bias: Mapping[int, float] | None = field(
        default=None,
        hash=False,
        metadata=_about(
            "Added to the logits of tokens, by token id, in [-100, 100]; before any penalty."
        ),
    )
    bad_words: Sequence[str] | None = field(
        default=None,
        metadata=_about(
            """
            Up to 1,024 texts whose tokens the response does not have in a row: the last of them is
            not drawn behind the others. Each stands for the tokens of the text at the beginning of
            a word and, where they are as many, inside of one, as in vLLM. Not with `guided`.
            """
        ),
    )
    min_tokens: int = field(
        default=0,
        metadata=_about(
            """
            Tokens of the response that cannot end it: until then end-of-sequence tokens and
            `stop_token_ids` are not drawn, and a text of `stop` is text as any other. At most
            `max_tokens`.
            """,
            Range(0, _MOST, whole=True),
        ),
    )
    top_logprobs: int = field(
        default=0,
        metadata=_about(
            """
            Keep so many most likely tokens of each position with their log-probabilities in
            `CompletionOutput.top_logprobs`, in [0, 20]; of the model's raw distribution, before
            penalties, biases, temperature and filters.
            """,
            Range(0, 20, whole=True),
        ),
    )
    guide_weight: float = field(
        default=0.0,
        metadata=_about(
            """
            w: tokens are drawn from the model's distribution times (p_guide / p_reference)^w, by
            the models of ``Engine(guide=..., guide_reference=...)``; before penalties, biases,
            temperature and filters, and what log-probabilities and entropies are of. 0 is off;
            below 0 leads away from the guide.
            """,
            Range(),
        ),
    )
    guided: Mapping[str, Any] | None = field(
        default=None,
        hash=False,
        metadata=_about("""
        Keep the response to a grammar: ``{"json_schema": {...}}`` or ``{"regex": "..."}``, by
        llguidance, which has to be installed. A response that ends with ``"stop"`` by itself is
        whole; one that ends with ``"length"`` is the beginning of one. Not with `min_tokens`;
        ``"args"`` and ``"mara"``, which draw no tokens, do not have it.
        """),
    )
    max_tokens: int = field(
        default=128, metadata=_about("M: the budget of response tokens, at least 1.", _COUNT)
    )
    seed: int | None = field(
        default=None,
        metadata=_about(
            """
            64-bit key of every draw of the request, in [0, 2**64). None: derived from the engine's
            seed and the number of requests before this one.
            """,
            _SEED,
        ),
    )
    stop: str | Sequence[str] | None = field(
        default=None,
        metadata=_about(
            """
            Text, or up to 1,024 texts, that end the response; the text found is not part of the
            output text.
            """
        ),
    )
    stop_token_ids: Sequence[int] | None = field(
        default=None,
        metadata=_about(
            "Up to 1,024 tokens that end the response, beside the model's end-of-sequence tokens."
        ),
    )
    ignore_eos: bool = field(
        default=False, metadata=_about("Do not end at the model's end-of-sequence tokens.")
    )
    n: int = field(
        default=1,
        metadata=_about("Responses to return, at least 1. Each has its own draws.", _COUNT),
    )
    trace: bool = field(
        default=False,
        metadata=_about("Keep the rejected attempts of each segment in `Segment.rejected`."),
    )
    entropy_threshold: float = field(
        default=3.0,
        metadata=_about(
            """
            With ``"cards"``: a segment ends before the token whose distribution, the model's raw
            one, has at least this entropy, in nats, at least 0.
            """,
            Range(0),
        ),
    )
    min_segment_length: int = field(
        default=4,
        metadata=_about(
            """
            With ``"cards"`` and `segment_end`: tokens before the entropy, or a border, ends a
            segment, at least 1.
            """,
            _COUNT,
        ),
    )
    rules: CardsRules = field(
        default="paper",
        metadata=_about("""
        With ``"cards"``: ``"paper"``, or ``"public"`` to follow the published code where that
        differs: end-of-sequence tokens end nothing, a segment may end past `max_tokens`, and after
        `max_attempts` rejections one attempt more is made, without a test, before the best is kept.
        """),
    )
    reward_weight: float = field(
        default=1.5,
        metadata=_about(
            'With ``"args"``: weight of the reward beside the log-probability, at least 0.',
            Range(0),
        ),
    )
    rejection_rate: float = field(
        default=0.5,
        metadata=_about(
            """
            With ``"speculative_rejection"``: part of the responses that ends at each boundary, in
            [0, 1).
            """,
            Range(0, below=1),
        ),
    )
    ess_threshold: float = field(
        default=0.5,
        metadata=_about(
            """
            With ``"smc"``: paths are resampled when their effective number, (sum w)^2 / sum w^2,
            falls below this part of them, in [0, 1].
            """,
            _PART,
        ),
    )
    calibrate_prefixes: bool = field(
        default=False,
        metadata=_about("""
        Replace the reward of an unfinished response by what `Engine.calibrate` found it to predict
        of the finished one, see `PrefixCalibration`.
        """),
    )
    segment_end: SegmentEnd = field(
        default="length",
        metadata=_about("""
        ``"length"``: segments have `segment_length` tokens. ``"sentence"``: they end after a token
        that ends a sentence (.!? or a line break), ``"clause"``: or a clause (,;:), ``"step"``:
        after the token that completes a `step_text`; and have `segment_length` tokens at most.
        Reward models judge a finished thought better than half a one.
        """),
    )
    step_text: str = field(
        default="\n\n",
        metadata=_about("""
        With ``segment_end="step"``: the text that ends a step, however it is cut into tokens.
        """),
    )

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            _choice(name, getattr(self, name), choices)
        self._check_own_parameters()
        for name, allowed in RANGES.items():
            value, default = getattr(self, name), _DEFAULTS[name]
            if type(value) is type(default) and value == default:
                continue  # as most are: a server makes these objects at every request
            also = _ALSO.get(name, {})
            if not any(value is one or (isinstance(value, str) and value == one) for one in also):
                allowed.check(name, value, "".join(also.values()))
        if self.beta <= 0 and self.acceptance != "hard":
            raise ValueError(
                f"beta must be above 0 with {self.acceptance} acceptance, got {self.beta!r}"
            )
        for flag in ("ignore_eos", "trace", "calibrate_prefixes"):
            if not isinstance(getattr(self, flag), bool):
                raise TypeError(f"{flag} must be a bool, got {getattr(self, flag)!r}")
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens, {self.max_tokens}, got {self.min_tokens}"
            )
        # Sequences become tuples, so that a frozen object cannot change under its owner.
        object.__setattr__(self, "stop", _stop_texts(self.stop))
        _check_step_text(self.step_text)
        object.__setattr__(self, "bad_words", _bad_words(self.bad_words))
        object.__setattr__(self, "stop_token_ids", _stop_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        object.__setattr__(self, "guided", _grammar(self.guided))
        if self.guided is not None:
            if self.min_tokens:
                raise ValueError(f"min_tokens must be 0 with guided, got {self.min_tokens}")
            if self.rules == "public":
                raise ValueError("rules must be 'paper' with guided, got 'public'")
            if self.bad_words:
                raise ValueError(f"bad_words must be None with guided, got {self.bad_words!r}")

    def _check_own_parameters(self) -> None:
        if self.acceptance == "gibbs" and not has_gibbs(self.method):
            raise ValueError(
                f"acceptance must be 'soft' or 'hard' with method={self.method!r}, got 'gibbs'"
            )
        own = self.own_parameters()
        for name, default in _DEFAULTS.items():
            value = getattr(self, name)
            if name not in own and value != default:
                shown = "acceptance='gibbs'" if self.kind is GIBBS else f"method={self.method!r}"
                raise ValueError(
                    f"{name} is no parameter of {shown}, got {value!r}; "
                    f"the parameters are {', '.join(own)}"
                )

        if self.attempts_schedule != "uniform":
            self._check_parts()
        if self.budget is not None:
            self._check_budget()

    def _check_budget(self) -> None:
        chosen = {
            "target_reward": (self.target_reward, (None, "auto"), 'None or "auto"'),
            "attempts_schedule": (self.attempts_schedule, ("uniform",), '"uniform"'),
            "calibrate_prefixes": (self.calibrate_prefixes, (False,), "False"),
            "rules": (self.rules, ("paper",), '"paper"'),
        }
        for name, (value, allowed, shown) in chosen.items():
            if value not in allowed:
                raise ValueError(f"{name} must be {shown} with budget={self.budget}, got {value!r}")

    def _check_parts(self) -> None:
        parts = -(-self.max_tokens // self.attempts_span)
        if parts > MOST_PARTS or parts * self.attempts_per_segment > MOST_ATTEMPTS:
            raise ValueError(
                f"attempts_schedule={self.attempts_schedule!r} is for at most {MOST_PARTS} "
                f"segments with {MOST_ATTEMPTS} attempts in all, got max_tokens={self.max_tokens}, "
                f"that is {parts} of {self.attempts_span} tokens, with {self.attempts_per_segment} "
                "attempts"
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
    def samples_per_response(self) -> int:
        """Whole responses or paths that there are to choose from; 1 for most methods."""
        return 1 if self.kind.competes is None else self.num_candidates

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """`stop` as a tuple, empty if there is none."""
        return tuple(self.stop or ())

    @property
    def attempts_per_segment(self) -> int:
        """R as it is run: one when greedy, where every draw is the same."""
        greedy = self.temperature == 0 and not self.kind.ranked
        if self.kind.draft == "segments":
            return 2 * (1 if greedy else self.num_candidates)
        if greedy:
            return 1
        if self.kind.decides == "choice":
            return self.num_candidates
        return self.max_attempts + (1 if self.rules == "public" else 0)

    @property
    def draft_attempts(self) -> int:
        """Attempts of a segment that are the draft model's; the others are the model's."""
        if self.kind.draft == "segments":
            return self.attempts_per_segment // 2
        return 0 if self.kind.draft is None else 1

    @property
    def attempts_span(self) -> int:
        """Response tokens of a part of `attempts_at`: those of the shortest segment."""
        ragged = self.kind.by_entropy or self.segment_end != "length"
        return min(self.min_segment_length, self.draft_length) if ragged else self.draft_length

    @property
    def attempts_at(self) -> tuple[int, ...]:
        """R of the segments that begin in each part; empty: `attempts_per_segment` in all."""
        if self.attempts_schedule == "uniform" or self.attempts_per_segment == 1:
            return ()
        untested = 1 if self.rules == "public" else 0
        shares = shared_out(
            -(-self.max_tokens // self.attempts_span),
            self.attempts_per_segment - untested,
            self.attempts_rate ** (self.attempts_span / self.draft_length),
            growth=self.attempts_schedule == "growth",
        )
        return tuple(share + untested for share in shares)

    @property
    def plain_from(self) -> int:
        """Response tokens behind which every segment has one attempt, so that none is scored."""
        table = self.attempts_at
        last = max((part for part, attempts in enumerate(table) if attempts > 1), default=-1) + 1
        return last * self.attempts_span if last < len(table) else _MOST

    @property
    def most_attempts(self) -> int:
        """The most attempts that any segment has."""
        return max(self.attempts_at, default=self.attempts_per_segment)


#: Of the fields that have one, by name.
RANGES: dict[str, Range] = {
    one.name: one.metadata["range"] for one in fields(StarsParams) if one.metadata["range"]
}

#: Of every field, by name.
_DEFAULTS: dict[str, object] = {one.name: one.default for one in fields(StarsParams)}

_CHOICES: dict[str, tuple[str, ...]] = {
    "method": get_args(Method),
    "acceptance": get_args(Acceptance),
    "rules": get_args(CardsRules),
    "segment_end": get_args(SegmentEnd),
    "attempts_schedule": get_args(AttemptsSchedule),
}

#: What each field is, in numpy style.
TEXTS: dict[str, str] = {one.name: one.metadata["text"] for one in fields(StarsParams)}

# What `help` shows.
_SUMMARY, _, _RAISES = cleandoc(StarsParams.__doc__ or "").partition("\n\n")
_PARAMETERS = "".join(f"{name}\n{indent(text, '    ')}\n" for name, text in TEXTS.items())
StarsParams.__doc__ = f"{_SUMMARY}\n\nParameters\n----------\n{_PARAMETERS}\n{_RAISES}"

#: Values beside the range, and how an error names them.
_ALSO: dict[str, dict[object, str]] = {
    "candidates": {"auto": ' or "auto"'},
    "target_reward": {"auto": ', "auto"', None: " or None"},
    "seed": {None: ""},
    "budget": {None: " or None"},
}


def with_fields(params: StarsParams, values: Mapping[str, object]) -> StarsParams:
    """`params` with some fields replaced; with another method, its own parameters are kept.

    Raises
    ------
    ValueError, TypeError
        A name that is no field, or what `StarsParams` refuses.
    """
    for name in values:
        if name not in _DEFAULTS:
            known = ", ".join(_DEFAULTS)
            raise ValueError(f"unknown parameter {name!r}; the parameters are {known}")
    changes: dict[str, Any] = dict(values)
    if isinstance(changes.get("method"), str) and changes["method"] in METHODS:
        return params.with_method(**changes)
    return replace(params, **changes)


def plain_text(name: str) -> str:
    """Return what a field is as one line without markup, for help texts and descriptions."""
    return " ".join(TEXTS[name].replace("`", "").split())


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r:.200}"
        )


def _stop_texts(value: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, (str, Sequence)):
        raise TypeError(f"stop must be text or a sequence of texts, got {value!r}")
    texts = (value,) if isinstance(value, str) else tuple(value)
    _check_number_of_stops("stop", texts)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop must be text, or texts, that are not empty, got {value!r}")
    check_unicode(value, "stop")
    return texts or None


def _check_step_text(value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"step_text must be text that is not empty, got {value!r}")
    check_unicode(value, "step_text")


def _bad_words(value: Sequence[str] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"bad_words must be a sequence of texts, got {value!r}")
    _check_number_of_stops("bad_words", value)
    for word in value:
        if not isinstance(word, str) or not word.strip():
            raise ValueError(f"bad_words must be texts that are not empty, got {word!r}")
    check_unicode(tuple(value), "bad_words")
    return tuple(value) or None


def _check_number_of_stops(name: str, stops: Sequence[object]) -> None:
    if len(stops) > _MOST_STOPS:
        raise ValueError(f"{name} must be at most {_MOST_STOPS}, got {len(stops)}")


def _stop_ids(value: Sequence[int] | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"stop_token_ids must be a sequence of token ids, got {value!r}")
    _check_number_of_stops("stop_token_ids", value)
    for token in value:
        _TOKEN_ID.check("stop_token_ids", token)
    return tuple(int(token) for token in value) or None


def _biases(value: Mapping[Any, float] | None) -> dict[int, float] | None:
    """Return a copy by token id; JSON has ids as texts."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(f"logit_bias must be a mapping of token ids to numbers, got {value!r}")
    found: dict[int, float] = {}
    for key, bias in value.items():
        token = int(key) if isinstance(key, str) and key.isdecimal() else key
        _TOKEN_ID.check("logit_bias: a token id", token)
        if int(token) in found:
            raise ValueError(f"logit_bias has token id {token} twice")
        _BIAS.check(f"logit_bias[{token}]", bias)
        found[int(token)] = float(bias)
    return found or None


def _grammar(value: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return a copy of a JSON schema, or of a regular expression."""
    if value is None:
        return None
    named = isinstance(value, Mapping) and len(value) == 1
    if not named or next(iter(value)) not in ("json_schema", "regex"):
        raise ValueError(
            f'guided must be {{"json_schema": {{...}}}} or {{"regex": "..."}}, got {value!r}'
        )
    ((kind, grammar),) = value.items()
    if kind == "regex" and not (isinstance(grammar, str) and grammar):
        raise ValueError(f"regex of guided must be text that is not empty, got {grammar!r}")
    if kind == "json_schema" and not isinstance(grammar, Mapping):
        raise ValueError(f"json_schema of guided must be an object, got {grammar!r}")
    try:
        return {kind: json.loads(json.dumps(grammar))}
    except (TypeError, ValueError) as error:
        raise ValueError(f"json_schema of guided must be JSON: {error}") from None
