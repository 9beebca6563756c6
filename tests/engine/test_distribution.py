"""The responses follow the closed form of STARS, enumerated exactly on a tiny vocabulary."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from helpers import letter_law
from helpers.letter_law import (
    LETTER,
    PROMPT,
    Law,
    Tokens,
    World,
    first_to_pass,
    law_of,
    letter_engine,
    model_law,
    p_value,
    segments,
    text,
)
from helpers.ragged_law import EVEN, RAGGED, SETTINGS, coin, count, ragged_engine

from stars_fast import Engine, StarsParams

REQUESTS = 6000


@dataclass(frozen=True)
class Rule:
    """The acceptance settings that the closed form is evaluated at."""

    target: float
    alpha: float
    beta: float
    hard: bool
    attempts: int
    max_tokens: int
    segment: int
    temperature: float
    fallback_is_best: bool = True
    world: World = LETTER

    def tau(self, tokens: int) -> float:
        prompt = self.world.reward("")
        start = (1 - self.alpha) * prompt + self.alpha * self.target
        return min(self.target, start + (self.target - start) * tokens / self.max_tokens)

    def pass_chance(self, reward: float, tokens: int) -> float:
        gap = reward - self.tau(tokens)
        if self.hard:
            return 1.0 if gap >= 0 else 0.0
        return min(1.0, math.exp(gap / self.beta))


def closed_form(rule: Rule) -> Law:
    """Probability of every response."""

    def step(done: Tokens) -> Law:
        table = []
        length = min(rule.segment, rule.max_tokens - len(done))
        for segment, p in segments(done, length, rule.temperature, rule.world):
            whole = done + segment
            reward = rule.world.reward(text(whole))
            table.append((whole, p, reward, rule.pass_chance(reward, len(whole))))
        if rule.fallback_is_best:
            return first_to_pass(table, rule.attempts)
        rejected = 1 - sum(p * a for _, p, _, a in table)
        tries = sum(rejected**k for k in range(rule.attempts))
        last = rejected ** (rule.attempts - 1)
        return {whole: p * a * tries + last * p * (1 - a) for whole, p, _, a in table}

    return law_of(step, rule.max_tokens)


SOFT = Rule(0.9, 0.4, 0.6, False, 3, 4, 2, 0.9)
HARD = Rule(0.5, 0.7, 1.0, True, 3, 4, 2, 1.0)
ODD = Rule(1.2, 0.0, 0.4, False, 2, 3, 2, 0.7)  # the last segment is cut short by the budget


@pytest.fixture(scope="module")
def engine() -> Engine:
    return letter_engine()


def params_of(rule: Rule, candidates: int) -> StarsParams:
    return StarsParams(
        segment_length=rule.segment,
        max_tokens=rule.max_tokens,
        max_attempts=rule.attempts,
        target_reward=rule.target,
        alpha=rule.alpha,
        beta=rule.beta,
        acceptance="hard" if rule.hard else "soft",
        temperature=rule.temperature,
        top_k=0,
        candidates=candidates,
    )


def sample(engine: Engine, rule: Rule, candidates: int) -> Counter[Tokens]:
    params = params_of(rule, candidates)
    return letter_law.count(engine, params, REQUESTS)


@pytest.mark.parametrize(
    ("rule", "candidates"),
    [(SOFT, 1), (SOFT, 3), (HARD, 2), (ODD, 1)],
    ids=["soft", "soft, three candidates", "hard", "cut short"],
)
def test_matches_closed_form(engine: Engine, rule: Rule, candidates: int) -> None:
    assert p_value(sample(engine, rule, candidates), closed_form(rule)) > 1e-3


SOFT_RAGGED = Rule(0.0, 1.0, 1.0, False, 50, 5, 5, 1.0, world=RAGGED)
HARD_RAGGED = Rule(-1.0, 1.0, 1.0, True, 50, 5, 5, 1.0, world=RAGGED)


_STEP = {"segment_end": "step", "step_text": ","}  # cut by the host, where a clause ends


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        (SOFT_RAGGED, {}),
        (HARD_RAGGED, {}),
        (dataclasses.replace(HARD_RAGGED, attempts=3), _STEP),
    ],
    ids=["soft", "hard", "fallbacks by steps"],
)
def test_segments_of_unequal_length_match_closed_form(rule: Rule, changes: Any) -> None:
    params = dataclasses.replace(params_of(rule, 2), **(SETTINGS | changes))
    counts = count(ragged_engine(), params, REQUESTS)
    assert p_value(counts, closed_form(rule)) > 1e-3
    assert p_value(counts, closed_form(dataclasses.replace(rule, world=EVEN))) < 1e-6


def test_segments_ended_by_entropy_match_closed_form() -> None:
    """The distribution after "b" has more entropy than 0.6, that after "a" has less."""
    chances = (0.75, 0.6)
    rule = dataclasses.replace(SOFT_RAGGED, world=coin(*chances))
    params = params_of(rule, 2).with_method(
        "cards", entropy_threshold=0.6, min_segment_length=1, segment_length=5
    )
    counts = count(ragged_engine(*chances), params, REQUESTS)
    assert p_value(counts, closed_form(rule)) > 1e-3
    even = dataclasses.replace(rule.world, ends=None)
    assert p_value(counts, closed_form(dataclasses.replace(rule, world=even))) < 1e-6


def test_rejects_every_planted_change(engine: Engine) -> None:
    """The same counts are far from the closed form of a slightly different algorithm."""
    soft, hard = sample(engine, SOFT, 2), sample(engine, HARD, 2)
    assert p_value(soft, closed_form(SOFT)) > 1e-3
    planted = {
        "beta": (soft, dataclasses.replace(SOFT, beta=0.8)),
        "schedule without slope": (soft, dataclasses.replace(SOFT, alpha=1.0)),
        "schedule from r(x)": (soft, dataclasses.replace(SOFT, alpha=0.0)),
        "hard schedule": (hard, dataclasses.replace(HARD, alpha=0.2)),
        "target": (soft, dataclasses.replace(SOFT, target=1.6)),
        "attempts": (soft, dataclasses.replace(SOFT, attempts=2)),
        "fallback": (soft, dataclasses.replace(SOFT, fallback_is_best=False)),
        "hard fallback": (hard, dataclasses.replace(HARD, fallback_is_best=False)),
        "soft as hard": (hard, dataclasses.replace(HARD, hard=False)),
    }
    found = {name: p_value(counts, closed_form(rule)) for name, (counts, rule) in planted.items()}
    assert all(p < 1e-6 for p in found.values()), found


def test_vanilla_is_the_model(engine: Engine) -> None:
    params = StarsParams(method="vanilla", segment_length=2, max_tokens=3, temperature=1.0, top_k=0)
    each = [dataclasses.replace(params, seed=i) for i in range(REQUESTS)]
    outputs = engine.generate([PROMPT] * REQUESTS, each, use_tqdm=False)
    counts = Counter(tuple(output.outputs[0].token_ids) for output in outputs)
    assert p_value(counts, model_law(3)) > 1e-3


def test_rejection_is_one_segment_against_the_target(engine: Engine) -> None:
    """That is STARS with the whole response as its segment and a flat schedule."""
    rule = Rule(0.9, 1.0, 0.6, False, 3, 3, 3, 0.9)
    params = StarsParams(
        method="rejection",
        max_tokens=rule.max_tokens,
        max_attempts=rule.attempts,
        target_reward=rule.target,
        beta=rule.beta,
        temperature=rule.temperature,
        top_k=0,
    )
    each = [dataclasses.replace(params, seed=i) for i in range(REQUESTS)]
    outputs = [o.outputs[0] for o in engine.generate([PROMPT] * REQUESTS, each, use_tqdm=False)]
    assert {len(output.segments) for output in outputs} == {1}
    counts = Counter(tuple(output.token_ids) for output in outputs)
    assert p_value(counts, closed_form(rule)) > 1e-3
    for planted in ({"alpha": 0.4}, {"attempts": 2}, {"segment": 2}, {"beta": 0.8}):
        assert p_value(counts, closed_form(dataclasses.replace(rule, **planted))) < 1e-6, planted
