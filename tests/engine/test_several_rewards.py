"""Several rewards at once: the law of responses, enumerated exactly, and what is reported."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
from helpers.letter_law import (
    PROMPT,
    Law,
    Tokens,
    count,
    first_to_pass,
    law_of,
    letter_engine,
    model_law,
    p_value,
    responses_of,
    reward_model,
    reward_of,
    segments,
    text,
)

from stars_fast import Engine, Reward, StarsParams

REQUESTS = 1500
MOST = 0.2
WEIGHT = 0.5


def harm_of(response: str) -> float:
    return math.cos(1.9 * sum((i + 1.3) * (ord(c) - 96.2) for i, c in enumerate(response)))


def harm_model(prompts: list[str], responses: list[str]) -> list[float]:
    return [harm_of(response) for response in responses]


HELP = Reward("help", reward_model)
HARM = Reward("harm", harm_model, weight=WEIGHT, at_most=MOST)


@dataclasses.dataclass(frozen=True)
class World:
    """What the rewards are taken to be."""

    most: float = MOST
    weight: float = WEIGHT
    fallback_keeps: bool = True

    def reward(self, response: str) -> float:
        return reward_of(response) + self.weight * harm_of(response)

    def keeps(self, response: str) -> bool:
        return harm_of(response) <= self.most


WORLD = World()
UNBOUND = World(most=math.inf)
PLANTED = {
    "no constraint": UNBOUND,
    "another bound": World(most=-0.2),
    "another weight": World(weight=3.0),
}
TEST_ONLY = {"a fallback for its reward alone": World(fallback_keeps=False)}

STARS = StarsParams(
    segment_length=2,
    max_tokens=3,
    max_attempts=3,
    target_reward=0.7,
    alpha=0.4,
    beta=0.6,
    temperature=1.0,
    top_k=0,
)
GIBBS = StarsParams(
    acceptance="gibbs",
    segment_length=2,
    max_tokens=2,
    beta=0.5,
    candidates=2,
    temperature=1.0,
    top_k=0,
)
BEST = StarsParams(
    method="best_of_n", segment_length=2, max_tokens=2, candidates=2, temperature=1.0, top_k=0
)
PATHS = BEST.with_method("speculative_rejection", segment_length=1, rejection_rate=0.0)


def of_tests(params: StarsParams, world: World) -> Law:
    """A response is tested by its combined reward; one that breaks the bound never passes."""
    assert isinstance(params.target_reward, float)
    target = params.target_reward
    start = (1 - params.alpha) * world.reward("") + params.alpha * target

    def step(done: Tokens) -> Law:
        table: list[Any] = []
        length = min(params.segment_length, params.max_tokens - len(done))
        for segment, p in segments(done, length):
            whole = done + segment
            reward, keeps = world.reward(text(whole)), world.keeps(text(whole))
            tau = min(target, start + (target - start) * len(whole) / params.max_tokens)
            passes = min(1.0, math.exp((reward - tau) / params.beta)) if keeps else 0.0
            table.append((whole, p, (keeps or not world.fallback_keeps, reward), passes))
        return first_to_pass(table, params.max_attempts)

    return law_of(step, params.max_tokens)


def of_choices(params: StarsParams, world: World) -> Law:
    """One of those that keep the bound is drawn by exp(r / beta); of all, if none does."""
    law: Law = {}
    table = [
        (y, p, math.exp(world.reward(text(y)) / params.beta), world.keeps(text(y)))
        for y, p in segments((), params.max_tokens)
    ]
    for drawn in itertools.product(table, repeat=params.num_candidates):
        allowed = [one for one in drawn if one[3]] or list(drawn)
        chance = math.prod(p for _, p, _, _ in drawn) / sum(w for _, _, w, _ in allowed)
        for y, _, weight, _ in allowed:
            law[y] = law.get(y, 0.0) + chance * weight
    return law


def of_the_best(params: StarsParams, world: World) -> Law:
    """The best of those that keep the bound; of all, if none does: a test that nothing passes."""
    table: list[Any] = [
        (y, p, (world.keeps(text(y)), world.reward(text(y))), 0.0)
        for y, p in model_law(params.max_tokens).items()
    ]
    return first_to_pass(table, params.num_candidates)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return letter_engine([HELP, HARM])


@pytest.mark.parametrize(
    ("params", "law", "planted"),
    [
        (dataclasses.replace(STARS, candidates=1), of_tests, PLANTED | TEST_ONLY),
        (dataclasses.replace(STARS, candidates=2), of_tests, PLANTED | TEST_ONLY),
        (GIBBS, of_choices, PLANTED),
        (BEST, of_the_best, PLANTED),
        (PATHS, of_the_best, PLANTED),
    ],
    ids=["a round each", "two of a round", "choice", "best of n", "best path"],
)
def test_matches_the_exact_law(
    engine: Engine,
    params: StarsParams,
    law: Callable[[StarsParams, World], Law],
    planted: dict[str, World],
) -> None:
    counts = count(engine, params, REQUESTS)
    assert p_value(counts, law(params, WORLD)) > 1e-3
    found = {name: p_value(counts, law(params, world)) for name, world in planted.items()}
    assert all(p < 1e-4 for p in found.values()), found


def test_reports_every_reward_beside_the_combined_one(engine: Engine) -> None:
    params = dataclasses.replace(STARS, trace=True, candidates=2)
    for output in responses_of(engine, params, 40):
        assert output.segments
        for segment in output.segments:
            response = text(tuple(output.token_ids[: segment.end]))
            assert segment.rewards == {"help": reward_of(response), "harm": harm_of(response)}
            assert segment.reward == pytest.approx(WORLD.reward(response), abs=1e-12)
            for attempt in segment.rejected:
                response = text((*output.token_ids[: segment.start], *attempt.token_ids))
                assert attempt.rewards == {"help": reward_of(response), "harm": harm_of(response)}
        assert (output.reward, output.rewards) == (
            output.segments[-1].reward,
            output.segments[-1].rewards,
        )
    (best,) = responses_of(engine, BEST, 1)
    response = text(tuple(best.token_ids))
    assert best.rewards == {"help": reward_of(response), "harm": harm_of(response)}
    assert best.segments[0].rewards == {}
    assert engine.score([PROMPT], ["ab"]) == [pytest.approx(WORLD.reward("ab"))]


def test_one_reward_has_no_name_unless_it_is_given_one() -> None:
    plain, named = letter_engine(), letter_engine(HELP)
    (a,), (b,) = responses_of(plain, STARS, 1), responses_of(named, STARS, 1)
    assert a.token_ids == b.token_ids
    assert a.rewards == {}
    assert b.rewards == {"help": b.reward}
    assert [s.rewards for s in a.segments] == [{}] * len(a.segments)


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        ("sum", lambda a, b: a + 0.5 * b),
        ("min", lambda a, b: min(a, 0.5 * b)),
        ("mean_minus_std", lambda a, b: (a + 0.5 * b) / 2 - 1.5 * abs(a - 0.5 * b) / 2),
    ],
)
def test_ways_to_combine(combine: Any, expected: Callable[[float, float], float]) -> None:
    aside = Reward("aside", lambda prompts, responses: [1e3] * len(prompts), weight=0)
    engine = letter_engine([HELP, aside, HARM], combine=combine, combine_stds=1.5)
    texts = ["", "a", "bca", "cc"]
    wanted = [expected(reward_of(one), harm_of(one)) for one in texts]
    assert engine.score([PROMPT] * 4, texts) == pytest.approx(wanted)


def test_a_calibrated_target_is_of_the_combined_reward(engine: Engine) -> None:
    found = letter_engine([HELP, HARM]).calibrate([PROMPT] * 40, params=STARS, use_tqdm=False)
    reached = {WORLD.reward(text(y)) for y in model_law(3)}
    assert all(min(abs(r - one) for one in reached) < 1e-9 for r in found.rewards)
    assert len(found.rewards) == 160


def test_an_error_names_its_reward_and_fails_its_request_alone() -> None:
    def picky(prompts: list[str], responses: list[str]) -> list[float]:
        return [math.nan if prompt == "ba" else 0.0 for prompt in prompts]

    engine = letter_engine([HELP, Reward("picky", picky)])
    params = dataclasses.replace(STARS, seed=1)
    bad, good = engine.generate(["ba", PROMPT], params, use_tqdm=False)
    assert bad.error is not None
    assert bad.error.startswith("reward of the prompt: 'picky': the reward model returned nan")
    assert good.error is None
    assert set(good.outputs[0].rewards) == {"help", "picky"}
