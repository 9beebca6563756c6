"""What a request has to return: each method written out plainly, one draw after the other."""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from fuzz.draws import (
    ROUNDING,
    GuidedLogits,
    PlainLogits,
    adjusted,
    drawn_token,
    likely_token,
    truncated,
)
from fuzz.prompts import read_prompt
from fuzz.rewards import JudgeReward, Reward, judge_ids
from fuzz.texts import Texts, border_level
from fuzz.worlds import CALIBRATION, World
from helpers.scheduler_draws import PURPOSE_CHOOSE, PURPOSE_RESAMPLE, purpose_uniform
from torch import Tensor

from stars_fast import CompletionOutput, Segment, StarsParams, _core
from stars_fast.outputs import Attempt
from stars_fast.seeds import derive_seed

_NEEDED_LEVEL = {"length": 3, "clause": 1, "sentence": 2, "step": 3}


@dataclass(frozen=True)
class Tried:
    """An attempt with what it is judged by."""

    token_ids: list[int]
    reward: float
    threshold: float | None
    passed: bool
    key: float  # the best of those that did not pass has the largest


@dataclass
class Path:
    """A response on its way, and for those that are compared what is known of it."""

    seed: int
    token_ids: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    stream: int = 0
    reward: float | None = None
    before: float = 0.0  # the reward when weights were last made equal
    over: bool = False

    @property
    def merit(self) -> float:
        """The reward, where there must be one."""
        assert self.reward is not None
        return self.reward


class WrittenOut:
    """A request to one world."""

    def __init__(self, world: World, prompt: Any, params: StarsParams) -> None:
        if params.needs_target and params.target_reward in ("auto", None):
            params = replace(params, target_reward=CALIBRATION.target_reward)
        self.params = params
        self.world = world
        self.prompt = read_prompt(world.tokenizer, prompt)
        ends = not params.ignore_eos and params.rules != "public"
        stop_ids = {*(params.stop_token_ids or ()), *(world.eos_ids if ends else ())}
        self.stop_ids = stop_ids
        stops = tuple(params.stop or ())
        self.texts = Texts(
            world.tokenizer, self.prompt, stops, frozenset(stop_ids), self.params.min_tokens
        )
        self.beside = {
            name: PlainLogits(model, self.prompt.token_ids)
            for name, model in world.beside.items()
            if model != "uniform"
        }
        self.logits = self._logits()
        self.judge: PlainLogits | None = None
        if world.rewards.name == "persona":
            ids = judge_ids(world.rewards.model, world.tokenizer, self.prompt)
            self.judge = PlainLogits(world.model, ids)
        self.known_rewards: dict[tuple[int, ...], float] = {}
        self.wobble = 0

    def wobbling(self, wobble: int) -> WrittenOut:
        """The same where logits and rewards are off by rounding."""
        other = WrittenOut.__new__(WrittenOut)
        other.__dict__ |= self.__dict__
        other.logits = self.logits.wobbling(wobble)
        other.beside = {
            name: logits.wobbling(wobble + 7 + at)
            for at, (name, logits) in enumerate(self.beside.items())
        }
        other.judge = self.judge and self.judge.wobbling(-wobble)
        other.wobble = wobble
        return other

    def learn(self, responses: Iterable[Sequence[int]]) -> None:
        """Read in few passes what may well be asked for; it changes no result."""
        known = [list(ids) for ids in responses]
        for logits in (self.logits, *self.beside.values()):
            logits.learn(known)
        if self.judge is not None:
            self.judge.learn(known)

    def _logits(self) -> PlainLogits:
        lm = PlainLogits(self.world.model, self.prompt.token_ids)
        if not self.params.guide_weight:
            return lm
        named = self.world.beside.get("guide_reference")
        away = None if named == "uniform" else self.beside.get("guide_reference", lm)
        return GuidedLogits(lm, self.beside["guide"], away, self.params.guide_weight)

    def responses(self) -> list[CompletionOutput]:
        """Every response, whole."""
        return [self.response(index) for index in range(self.params.n)]

    def response(self, index: int) -> CompletionOutput:
        """One of the `n` responses."""
        params = self.params
        assert params.seed is not None
        if params.method == "best_of_n":
            return self._output(index, self._best_of_n(index))
        seed = derive_seed(params.seed, index)
        if params.method in ("smc", "speculative_rejection"):
            return self._output(index, self._compared(seed))
        path = Path(seed)
        while not path.over:
            if params.method == "vanilla":
                self._extend([path])
            elif params.kind.draft == "segments":
                self._commit(path, self._by_two(path))
            elif params.kind.draft == "tokens":
                self._commit(path, self._speculated(path))
            else:
                self._commit(path, self._segment(path))
        return self._output(index, path)

    # Rewards

    def reward(self, token_ids: Sequence[int]) -> float:
        """Reward of a response so far, by a pass over all of it."""
        key = tuple(token_ids)
        if self.judge is not None:
            return JudgeReward(self.judge, self.logits)(token_ids, "")
        if key not in self.known_rewards:
            of: Reward = self.world.rewards.of(self.prompt)
            self.known_rewards[key] = of(token_ids, self.texts.read(token_ids).text)
        reward = self.known_rewards[key]
        if self.wobble and not self.world.rewards.is_exact:
            noise = random.Random(hash((self.wobble, *key))).uniform(-1, 1)
            reward += ROUNDING * max(1.0, abs(reward)) * noise
        return reward

    def shown(self, token_ids: Sequence[int]) -> float:
        """The reward as it is compared."""
        reward = self.reward(token_ids)
        if self.params.method == "mara":  # log sigmoid
            return -float(np.logaddexp(0.0, -reward))
        ended = self.texts.stops(token_ids) or len(token_ids) >= self.params.max_tokens
        if self.params.calibrate_prefixes and not ended:
            lines = CALIBRATION.prefixes
            assert lines is not None
            slope, intercept = (
                float(np.interp(len(token_ids), lines.positions, values))
                for values in (lines.slope, lines.intercept)
            )
            return intercept + slope * reward
        return reward

    def threshold(self, tokens: int) -> float:
        """The least reward, of a response of so many tokens, that passes with certainty."""
        params = self.params
        if params.method == "mara":
            return math.log(0.5) if params.acceptance == "hard" else 0.0
        if params.method == "persona_judge":
            return 0.0
        target = params.target_reward
        assert isinstance(target, float | int)
        if params.method == "rejection" or params.alpha == 1:
            return target
        start = (1 - params.alpha) * self.reward([]) + params.alpha * target
        return min(target, start + (target - start) * tokens / params.max_tokens)

    # Segments

    def to_draw_from(self, response: list[int], logits: PlainLogits | None = None) -> Tensor:
        """The logits behind a response, with what the request changes in them."""
        return adjusted(
            (logits or self.logits).after(response),
            self.params,
            self.prompt.token_ids,
            response,
            ends=self.stop_ids,
            known=len(self.world.tokenizer),
        )

    def draft(
        self,
        before: list[int],
        seed: int,
        attempt: int,
        stream: int,
        logits: PlainLogits | None = None,
    ) -> list[int]:
        """A segment that is drawn; `logits`: of another model."""
        (drafted,) = self._drafts([(before, seed, stream)], attempt, logits)
        return drafted

    def _drafts(
        self,
        starts: list[tuple[list[int], int, int]],
        attempt: int,
        model: PlainLogits | None = None,
    ) -> list[list[int]]:
        """The segments that begin after each response, under its seed and stream."""
        drafts: list[list[int]] = [[] for _ in starts]
        growing = list(range(len(starts)))
        while growing:
            (model or self.logits).learn([starts[i][0] + drafts[i] for i in growing])
            for i in list(growing):
                before, seed, stream = starts[i]
                if self._ends_before_next(before, drafts[i]):
                    growing.remove(i)
                    continue
                logits = self.to_draw_from(before + drafts[i], model)
                position = len(before) + len(drafts[i])
                drafts[i].append(drawn_token(logits, self.params, seed, position, attempt, stream))
                if self._ends_behind(before, drafts[i]):
                    growing.remove(i)
        return drafts

    def _ends_before_next(self, before: list[int], segment: list[int]) -> bool:
        """Whether the model is too uncertain of the token that would follow."""
        if self.params.method != "cards" or len(segment) < self.params.min_segment_length:
            return False
        return self.logits.entropy(before + segment) >= self.params.entropy_threshold

    def _ends_behind(self, before: list[int], segment: list[int]) -> bool:
        params = self.params
        longest = params.max_tokens if params.method == "rejection" else params.segment_length
        if params.kind.one_token:
            longest = 1
        if params.rules != "public":  # whose segments may end past the budget
            longest = min(longest, params.max_tokens - len(before))
        if len(segment) == longest or self.texts.stops(before + segment):
            return True
        if len(segment) < params.min_segment_length:
            return False
        if params.segment_end == "step":
            return self._steps(before + segment) > self._steps([*before, *segment[:-1]])
        level = border_level(self.world.tokenizer, segment[-1])
        return level >= _NEEDED_LEVEL[params.segment_end]

    def _steps(self, token_ids: list[int]) -> int:
        """How many steps have ended; what bytes at the end are is not known yet."""
        whole = self.texts.whole(token_ids) if token_ids else ""
        return whole.removesuffix("\ufffd").count(self.params.step_text)

    def _segment(self, path: Path) -> Segment:
        """The next segment of a method that tests attempts, or chooses among them."""
        if len(path.token_ids) >= self.params.plain_from:
            return self._plain(path)
        tests = self.params.kind.decides == "test"
        tried: list[Tried] = []
        while len(tried) < self._most_attempts(path) and not (tried and tried[-1].passed):
            tried.append((self._tested if tests else self._considered)(path, len(tried)))
        best = max(range(len(tried)), key=lambda i: (tried[i].passed, tried[i].key, -i))
        start = len(path.token_ids)
        others = tuple(
            Attempt(i, tuple(attempt.token_ids), attempt.reward)
            for i, attempt in enumerate(tried)
            if i != best
        )
        taken = tried[best]
        path.token_ids += taken.token_ids
        return Segment(
            start,
            len(path.token_ids),
            taken.reward,
            taken.threshold,
            len(tried),
            ("test" if taken.passed else "fallback") if tests else "choice",
            others,
        )

    def _plain(self, path: Path) -> Segment:
        start = len(path.token_ids)
        path.token_ids += self._attempt(path, 0)
        return Segment(start, len(path.token_ids), None, None, 1, "test", ())

    def _most_attempts(self, path: Path) -> int:
        shares = self.params.attempts_at
        if not shares:
            return self._attempts_on_average()
        return shares[min(len(path.token_ids) // self.params.attempts_span, len(shares) - 1)]

    def _attempts_on_average(self) -> int:
        params = self.params
        if params.temperature == 0 and not params.kind.ranked:
            return 1  # every draw is the same
        if params.kind.decides == "choice":
            default = 10 if params.method == "args" else 8
            return default if params.candidates == "auto" else params.candidates
        return params.max_attempts + (1 if params.rules == "public" else 0)

    def _stream(self, path: Path) -> int:
        """The number of the segment, where one may have attempts that are not taken."""
        return len(path.segments) if self._attempts_on_average() > 1 else 0

    def _attempt(self, path: Path, attempt: int) -> list[int]:
        if self.params.kind.ranked:
            return [likely_token(self.to_draw_from(path.token_ids), attempt)]
        return self.draft(path.token_ids, path.seed, attempt, self._stream(path))

    def _tested(self, path: Path, number: int) -> Tried:
        params = self.params
        drafted = self._attempt(path, number)
        whole = path.token_ids + drafted
        reward = self.shown(whole)
        tau = self.threshold(len(whole))
        one_more = self._attempts_on_average() > params.max_attempts
        if one_more and number + 1 == self._most_attempts(path):  # without a test
            return Tried(drafted, reward, tau, False, reward)
        beta = 1.0 if params.method in ("mara", "persona_judge") else params.beta
        place = len(path.token_ids)
        uniform = _core.accept_uniform(path.seed, place, number, self._stream(path))
        passed = reward >= tau
        if params.acceptance == "soft":
            passed |= uniform < math.exp(min(0.0, (reward - tau) / beta))
        return Tried(drafted, reward, tau, passed, reward)

    def _considered(self, path: Path, number: int) -> Tried:
        params = self.params
        drafted = self._attempt(path, number)
        reward = self.shown(path.token_ids + drafted)
        merit, beta = reward, params.beta
        if params.method == "args":
            logprob = float(self.to_draw_from(path.token_ids).log_softmax(-1)[drafted[0]])
            merit, beta = logprob + params.reward_weight * reward, params.temperature
        if params.method == "args" and params.temperature == 0:
            return Tried(drafted, reward, None, False, merit)
        uniform = purpose_uniform(
            path.seed, len(path.token_ids), number, self._stream(path), PURPOSE_CHOOSE
        )
        return Tried(drafted, reward, None, False, merit / beta - math.log(-math.log(uniform)))

    # Two models

    def _by_two(self, path: Path) -> Segment:
        """A segment of the draft model if it passes, else one of the model."""
        params = self.params
        number = 1 if params.temperature == 0 or params.method == "rsd" else self._num_paths()
        target, start = params.target_reward, len(path.token_ids)
        assert isinstance(target, float | int)
        tried: list[Tried] = []
        for draws in (self.beside["draft_model"], None):
            for _ in range(number):
                tried.append(self._by_one(path, len(tried), draws))
            best = max(range(len(tried) - number, len(tried)), key=lambda i: (tried[i].key, -i))
            taken = tried[best]
            if draws is None or taken.passed:
                break
        path.token_ids += taken.token_ids
        others = tuple(
            Attempt(i, tuple(one.token_ids), one.reward) for i, one in enumerate(tried) if i != best
        )
        passed = len(tried) == number
        return Segment(
            start,
            len(path.token_ids),
            taken.reward,
            float(target) if passed else None,
            len(tried),
            "test" if passed else "fallback",
            others,
        )

    def _by_one(self, path: Path, attempt: int, draws: PlainLogits | None) -> Tried:
        """An attempt of the draft model, or of the model."""
        params, before = self.params, path.token_ids
        stream = len(path.segments)
        drafted = self.draft(before, path.seed, attempt, stream, draws)
        reward = tilted = self.shown(before + drafted)
        if draws is not None and params.method == "gsi":
            tilted += params.beta * sum(
                self._log_ratio(before + drafted[:i], token, draws)
                for i, token in enumerate(drafted)
            )
        key = tilted
        if params.method == "gsi":
            uniform = purpose_uniform(path.seed, len(before), attempt, stream, PURPOSE_CHOOSE)
            key = tilted / params.beta - math.log(-math.log(uniform))
        assert isinstance(params.target_reward, float | int)
        return Tried(drafted, reward, None, tilted >= params.target_reward, key)

    def _log_prob(self, response: list[int], logits: PlainLogits | None = None) -> Tensor:
        """Of every token, of the distribution that is drawn from."""
        found = truncated(self.to_draw_from(response, logits), self.params)
        return found[0].double().log_softmax(-1)

    def _log_ratio(self, response: list[int], token: int, draws: PlainLogits) -> float:
        own = float(self._log_prob(response)[token])
        other = float(self._log_prob(response, draws)[token])
        return 0.0 if math.isinf(other) else max(own, -1e30) - other

    def _speculated(self, path: Path) -> Segment:
        """Tokens of the draft model up to the first that is not kept."""
        params, draws = self.params, self.beside["draft_model"]
        start, goes_on = len(path.token_ids), True
        longest = min(start + params.segment_length, params.max_tokens)
        while goes_on:
            before = path.token_ids
            token = drawn_token(
                self.to_draw_from(before, draws), params, path.seed, len(before), 0, 0
            )
            kept, instead = self._verified(path, token, draws)
            path.token_ids = [*before, token if kept else instead]
            goes_on = kept and len(path.token_ids) < longest
            goes_on = goes_on and not self.texts.stops(path.token_ids)
        return Segment(start, len(path.token_ids), None, None, 1, "test")

    def _verified(self, path: Path, token: int, draws: PlainLogits) -> tuple[bool, int]:
        """Whether a token is kept, and what is drawn instead."""
        params, before = self.params, path.token_ids
        reference = self.beside.get("draft_reference")
        if params.temperature == 0:
            logits = self.to_draw_from(before).double().log_softmax(-1)
            if reference is not None:
                logits = logits + self.to_draw_from(before, draws).double().log_softmax(-1)
                logits = logits - self.to_draw_from(before, reference).double().log_softmax(-1)
            best = int(logits.nan_to_num(-math.inf).argmax())
            return token == best, best
        p, q = self._log_prob(before), self._log_prob(before, draws)
        b = q
        if reference is not None:
            whole = self.to_draw_from(before, reference) / params.temperature
            b = whole.double().log_softmax(-1)
        test, draw = (_core.accept_uniform(path.seed, len(before), i, 0) for i in range(2))
        kept = math.log(test) <= float(p[token] - b[token])
        weights = p.exp() - q.exp() if reference is None else (p + q - b).exp() - q.exp()
        weights = weights.nan_to_num(0.0).clamp(min=0.0)
        weights = p.exp() if float(weights.sum()) <= 0 else weights
        ends = weights.cumsum(0)
        return kept, int(torch.searchsorted(ends, draw * ends[-1]))

    # Whole responses

    def _extend(self, paths: list[Path]) -> None:
        """Append to each the segment that follows, without a test."""
        starts = [(path.token_ids, path.seed, path.stream) for path in paths]
        for path, drafted in zip(paths, self._drafts(starts, 0), strict=True):
            start = len(path.token_ids)
            path.token_ids = path.token_ids + drafted
            compared = self.params.kind.decides == "paths"
            reward = self.shown(path.token_ids) if compared else None
            segment = Segment(start, len(path.token_ids), reward, None, 1, "test")
            self._commit(path, segment)

    def _commit(self, path: Path, segment: Segment) -> None:
        path.segments = [*path.segments, segment]
        path.reward = segment.reward
        path.over = len(path.token_ids) >= self.params.max_tokens
        path.over |= self.texts.stops(path.token_ids)

    def _best_of_n(self, index: int) -> Path:
        assert self.params.seed is not None
        count = self._num_paths()
        paths = [Path(derive_seed(self.params.seed, index * count + i)) for i in range(count)]
        while growing := [path for path in paths if not path.over]:
            self._extend(growing)
        for path in paths:
            path.reward = self.reward(path.token_ids)
        return max(paths, key=lambda path: path.merit)

    def _num_paths(self) -> int:
        return 8 if self.params.candidates == "auto" else self.params.candidates

    def _compared(self, seed: int) -> Path:
        """The path that is chosen, paths being compared at every boundary."""
        paths = [Path(derive_seed(seed, 1 + i)) for i in range(self._num_paths())]
        if self.params.method == "smc":
            # All begin at the prompt's reward, which therefore need not be known.
            compare: Callable[..., Path | None] = self._resampled
        else:
            compare = self._pruned
        for boundary in itertools.count():
            self._extend([path for path in paths if not path.over])
            chosen = compare(paths, seed, boundary)
            if chosen is not None:
                return chosen
        raise AssertionError

    def _pruned(self, paths: list[Path], seed: int, boundary: int) -> Path | None:
        """Speculative rejection: the worst part ends."""
        keep = max(1, round((1 - self.params.rejection_rate) * len(paths)))
        best_first = sorted(paths, key=lambda path: -path.merit)  # stable: the first of equals
        paths[:] = [path for path in paths if any(path is kept for kept in best_first[:keep])]
        return best_first[0] if all(path.over for path in paths) else None

    def _resampled(self, paths: list[Path], seed: int, boundary: int) -> Path | None:
        """Sequential Monte Carlo: heavy paths are copied over light ones."""
        logs = np.array([path.merit - path.before for path in paths]) / self.params.beta
        weights = np.exp(logs - logs.max())
        if not all(path.over for path in paths):
            if weights.sum() ** 2 / (weights**2).sum() >= self.params.ess_threshold * len(paths):
                return None
            self._copy(paths, weights, purpose_uniform(seed, boundary, 0, 0, PURPOSE_RESAMPLE))
            for path in paths:
                path.stream = boundary + 1 if path.stream < 0 else path.stream
                path.before = path.merit
            if not all(path.over for path in paths):
                return None
            weights = np.ones(len(paths))
        ends = np.cumsum(weights)
        uniform = purpose_uniform(seed, boundary, 1, 0, PURPOSE_RESAMPLE)
        return paths[bisect.bisect_left(ends.tolist(), uniform * ends[-1])]

    @staticmethod
    def _copy(paths: list[Path], weights: np.ndarray[Any, Any], uniform: float) -> None:
        """Systematic resampling; a path that is a copy keeps its seed, and its stream is new."""
        number = len(paths)
        points = (np.arange(number) + uniform) / number * weights.sum()
        drawn = np.searchsorted(np.cumsum(weights), points, side="right").tolist()
        gone = [i for i in range(number) if i not in drawn]
        spare = [i for i in range(number) for _ in range(drawn.count(i) - 1)]
        for target, source in zip(gone, spare, strict=True):
            paths[target] = replace(paths[source], seed=paths[target].seed, stream=-1)

    def _output(self, index: int, path: Path) -> CompletionOutput:
        ending = self.texts.read(path.token_ids)
        ids = path.token_ids
        return CompletionOutput(
            index,
            ending.text,
            ids,
            [self.logits.logprob(ids[:i], token) for i, token in enumerate(ids)],
            path.reward,
            "stop" if ending.stopped else "length",
            path.segments,
            [self._top_logprobs(ids[:i]) for i in range(len(ids) * (self.params.top_logprobs > 0))],
        )

    def _top_logprobs(self, before: list[int]) -> dict[int, float]:
        """The most likely tokens of the raw distribution with their log-probabilities."""
        logprobs, tokens = self.logits.after(before).log_softmax(-1).topk(self.params.top_logprobs)
        return dict(zip(tokens.tolist(), logprobs.tolist(), strict=True))
