"""Requests whose draws are a function of what names them, and so what they do."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np

from stars_fast import _core

PURPOSE_CHOOSE, PURPOSE_RESAMPLE = 2, 3


def purpose_uniform(seed: int, position: int, attempt: int, stream: int, purpose: int) -> float:
    """A uniform of the core in (0, 1), from the words that it is made of."""
    counter = np.array([[0, position, attempt, stream << 3 | purpose]], np.uint32)
    key = np.array([[seed % 2**32, seed >> 32]], np.uint32)
    words: list[int] = _core.philox4x32(counter, key)[0].tolist()
    return ((words[0] << 32 | words[1]) >> 12) * 2.0**-52 + 2.0**-53


@dataclass(frozen=True)
class Draw:
    """A drafted row and its reward."""

    tokens: list[int]
    stopped: bool
    reward: float
    breaks: bool  # a constraint


@dataclass(frozen=True)
class Spec:
    """A request whose draws are a function of what names them, and so its outcome.

    `ends_early`: how often an attempt is shorter than it might be and the response goes on.
    """

    prompt: list[int]
    segment_length: int
    max_tokens: int
    max_attempts: int
    candidates: int
    scored: bool
    seed: int
    bias: float = 0.0  # of rewards: far below, about or far above what passes
    stop_rate: float = 0.0
    ends_early: float = 0.0
    bad_rate: float = 0.0
    alpha: float = 0.5
    choose: bool = False
    hard: bool = False
    overrun: bool = False
    last_untested: bool = False
    draft_attempts: int = 0  # of a choice
    breaks_rate: float = 0.0
    attempts_at: tuple[int, ...] = ()
    attempts_span: int = 1
    plain_from: int = 2**31 - 1

    @property
    def prompt_reward(self) -> float:
        return self.seed % 3 - 1.0

    def draw(self, position: int, attempt: int, stream: int) -> Draw:
        rng = random.Random(f"{self.seed} {position} {attempt} {stream}")
        length = self.segment_length
        if not self.overrun:
            length = min(length, self.max_tokens - position)
        stopped = rng.random() < self.stop_rate
        if stopped or rng.random() < self.ends_early:
            length = rng.randint(1, length)
        tokens = [rng.randrange(50) for _ in range(length)]
        bad = rng.random() < self.bad_rate
        reward = math.nan if bad else self.bias + rng.uniform(-2.0, 1.0)
        return Draw(tokens, stopped, reward, rng.random() < self.breaks_rate)

    def add_to(self, scheduler: _core.Scheduler, request: int) -> None:
        scheduler.add(
            request,
            np.array(self.prompt, np.int64),
            scored=self.scored,
            segment_length=self.segment_length,
            max_tokens=self.max_tokens,
            max_attempts=self.max_attempts,
            candidates=self.candidates,
            seed=self.seed,
            target_reward=0.0,
            alpha=self.alpha,
            hard=self.hard,
            choose=self.choose,
            overrun=self.overrun,
            last_untested=self.last_untested,
            draft_attempts=self.draft_attempts if self.scored and self.choose else 0,
            attempts_at=self.attempts_at,
            attempts_span=self.attempts_span,
            plain_from=self.plain_from,
        )

    def outcome(self) -> list[Event]:
        """What the request does, one segment after the other."""
        events = [self.outcome_at(0, 0)]
        while events[-1].goes_on:
            stream = len(events) if self.scored and self.max_attempts > 1 else 0
            events.append(self.outcome_at(events[-1].end, stream))
        return events

    def outcome_at(self, position: int, stream: int) -> Event:
        """The segment at a position, one attempt after the other."""
        schedule = _core.Schedule(
            target_reward=0.0,
            alpha=self.alpha,
            beta=1.0,
            max_tokens=self.max_tokens,
            hard=self.hard,
        )
        best: Draw | None = None
        most = (False, -math.inf)
        attempt = 0
        scored = self.scored and position < self.plain_from
        chooses = scored and self.choose
        drafts = self.draft_attempts if chooses else 0
        kind = _core.EVENT_CHOSEN if chooses and not drafts else _core.EVENT_FALLBACK
        parts = self.attempts_at
        part = min(position // self.attempts_span, len(parts) - 1)
        attempts = parts[part] if parts else self.max_attempts
        for attempt in range(attempts):
            made = self.draw(position, attempt, stream)
            if math.isnan(made.reward):
                return Event(position, [], _core.EVENT_FAILED, attempt + 1, 0)
            merit, passed = made.reward, not scored
            if chooses:
                if not self.hard:
                    uniform = purpose_uniform(self.seed, position, attempt, stream, PURPOSE_CHOOSE)
                    merit -= math.log(-math.log(uniform))
            elif scored and not (self.last_untested and attempt + 1 == attempts):
                tau = schedule.threshold(self.prompt_reward, position + len(made.tokens))
                uniform = _core.accept_uniform(self.seed, position, attempt, stream)
                passed = not made.breaks and schedule.accepts(made.reward, tau, uniform)
            if passed or (not made.breaks, merit) > most:
                best, most = made, (not made.breaks, merit)
            if passed:
                kind = _core.EVENT_ACCEPTED
                break
            if attempt + 1 == drafts:
                assert best is not None
                if not best.breaks and best.reward >= 0.0:
                    kind = _core.EVENT_ACCEPTED
                    break
                best, most = None, (False, -math.inf)
        assert best is not None
        over = position + len(best.tokens) >= self.max_tokens
        finish = _core.FINISH_LENGTH if over else _core.FINISH_NONE
        finish = _core.FINISH_STOP if best.stopped else finish
        return Event(position, best.tokens, kind, attempt + 1, finish)


@dataclass(frozen=True)
class Event:
    start: int
    tokens: list[int]
    kind: int
    attempts: int
    finish: int

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def goes_on(self) -> bool:
        return self.kind != _core.EVENT_FAILED and self.finish == _core.FINISH_NONE
