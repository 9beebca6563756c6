"""Parameters of one request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args

Method = Literal["stars", "vanilla", "best_of_n", "cards"]
Acceptance = Literal["soft", "hard"]

#: Whole responses that ``best_of_n`` draws when ``candidates="auto"``.
BEST_OF_N_DEFAULT = 8


@dataclass(frozen=True)
class StarsParams:
    """What one request asks for. Frozen; unknown names are a ``TypeError``.

    Parameters
    ----------
    method
        ``"stars"`` (arXiv 2511.03827); ``"vanilla"`` (plain sampling); ``"best_of_n"``
        (`candidates` whole responses, the best-scored one is returned); ``"cards"``
        (arXiv 2406.16306: as ``"stars"``, but a segment ends where the model is uncertain).
    segment_length
        K: tokens of a segment, at least 1; with ``"cards"`` its longest.
    target_reward
        r*: the reward the threshold schedule rises to. A number; ``"auto"``: the 0.9 quantile of
        the rewards of unaligned samples (`Engine.calibrate`); None: what the engine was last
        calibrated to. Used by ``"stars"`` and ``"cards"`` only.
    beta
        Softness of the accept test, in units of reward, above 0. Not the sampling temperature.
    alpha
        Where the schedule starts, in [0, 1]: 0 at the prompt's own reward, 1 at `target_reward`.
    max_attempts
        R: attempts of a segment before the best-scored of them is kept, at least 1.
    candidates
        N: attempts drawn side by side in one round, at least 1, or ``"auto"``: as many as pay off.
        Changes the speed, never the tokens. With ``"best_of_n"``: the number of whole responses
        (``"auto"``: 8).
    acceptance
        ``"soft"``: accept with probability min(1, exp((r - tau) / beta)). ``"hard"``: iff r >= tau.
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
    entropy_threshold
        With ``"cards"`` only: a segment ends before the token whose distribution, the model's raw
        one, has at least this entropy, in nats, at least 0.
    min_segment_length
        With ``"cards"`` only: tokens before the entropy is looked at, at least 1.

    Raises
    ------
    ValueError, TypeError
        At construction, naming the parameter, its value and the allowed range.
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

    def __post_init__(self) -> None:
        _choice("method", self.method, get_args(Method))
        _choice("acceptance", self.acceptance, get_args(Acceptance))
        for name in ("segment_length", "max_attempts", "max_tokens", "n", "min_segment_length"):
            _integer(name, getattr(self, name), 1)
        if self.candidates != "auto":
            _integer("candidates", self.candidates, 1, also=' or "auto"')
        if self.target_reward is not None and self.target_reward != "auto":
            _number("target_reward", self.target_reward, also=', "auto" or None')
        if _number("beta", self.beta) <= 0 and self.acceptance == "soft":
            raise ValueError(f"beta must be above 0 with soft acceptance, got {self.beta!r}")
        _number("alpha", self.alpha, 0.0, 1.0)
        _number("entropy_threshold", self.entropy_threshold, 0.0)
        _number("temperature", self.temperature, 0.0)
        _integer("top_k", self.top_k, 0)
        if not 0.0 < _number("top_p", self.top_p) <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None and _integer("seed", self.seed, 0) >= 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {self.seed!r}")
        for flag in ("ignore_eos", "trace"):
            if not isinstance(getattr(self, flag), bool):
                raise TypeError(f"{flag} must be a bool, got {getattr(self, flag)!r}")
        # Sequences become tuples, so that a frozen object cannot change under its owner.
        object.__setattr__(self, "stop", _stop_texts(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_ids(self.stop_token_ids))

    @property
    def scored(self) -> bool:
        """Whether segments are scored and tested, against a schedule that needs a target."""
        return self.method in ("stars", "cards")

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """`stop` as a tuple, empty if there is none."""
        return tuple(self.stop or ())

    @property
    def attempts_per_segment(self) -> int:
        """R as it is run: one when greedy, where every attempt is the same."""
        return 1 if self.temperature == 0 else self.max_attempts


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _integer(name: str, value: object, low: int, also: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer of at least {low}{also}, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}{also}, got {value!r}")
    return int(value)


def _number(
    name: str, value: object, low: float = -math.inf, high: float = math.inf, also: str = ""
) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number{also}, got {value!r}")
    number = float(value)
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
