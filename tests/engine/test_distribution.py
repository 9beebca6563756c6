"""The responses follow the closed form of STARS, enumerated exactly on a tiny vocabulary.

For one segment from a given state, with p(y) the model's probability of segment y, a(y) its chance
to pass, q(y) = p(y) (1 - a(y)) and A = sum p a:

    P(y) = p(y) a(y) (1 + (1-A) + ... + (1-A)^(R-1))            y passed, after k rejections
         + (sum of q over r <= r(y))^R - (sum of q over r < r(y))^R    R rejections, y the best
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from helpers.tiny_lm import LETTERS, letter_model, letter_tokenizer
from scipy import stats

from stars_fast import Engine, StarsParams

PROMPT = "ab"
EOS = len(LETTERS) - 1
REQUESTS = 6000


def reward_of(response: str) -> float:
    """A fixed reward that differs between all responses and rises and falls along them."""
    return math.sin(2.3 * sum((i + 1.7) * (ord(c) - 95.5) for i, c in enumerate(response))) * 1.5


def reward_model(prompts: list[str], responses: list[str]) -> list[float]:
    # "$" is a special token and no part of the text; two responses may share one text, which the
    # closed form allows for.
    return [reward_of(response) for response in responses]


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

    def tau(self, tokens: int) -> float:
        prompt = reward_of("")
        start = (1 - self.alpha) * prompt + self.alpha * self.target
        return min(self.target, start + (self.target - start) * tokens / self.max_tokens)

    def pass_chance(self, reward: float, tokens: int) -> float:
        gap = reward - self.tau(tokens)
        if self.hard:
            return 1.0 if gap >= 0 else 0.0
        return min(1.0, math.exp(gap / self.beta))


def next_probs(tokens: tuple[int, ...], temperature: float) -> list[float]:
    prompt = [LETTERS.index(c) for c in PROMPT]
    with torch.no_grad():
        logits = letter_model()(torch.tensor([[*prompt, *tokens]])).logits[0, -1].double()
    probs: list[float] = torch.softmax(logits / temperature, -1).tolist()
    return probs


def segments(rule: Rule, done: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every segment that can follow, with the model's probability of it."""

    def grow(segment: tuple[int, ...], p: float) -> Iterator[tuple[tuple[int, ...], float]]:
        length = min(rule.segment, rule.max_tokens - len(done))
        if len(segment) == length or (segment and segment[-1] == EOS):
            yield segment, p
            return
        for token, chance in enumerate(next_probs(done + segment, rule.temperature)):
            yield from grow((*segment, token), p * chance)

    yield from grow((), 1.0)


def text(tokens: tuple[int, ...]) -> str:
    return "".join(LETTERS[t] for t in tokens if t != EOS)


def closed_form(rule: Rule) -> dict[tuple[int, ...], float]:
    """Probability of every response."""
    finished: dict[tuple[int, ...], float] = {}
    open_states = {(): 1.0}
    while open_states:
        state, weight = open_states.popitem()
        table = []
        for segment, p in segments(rule, state):
            whole = state + segment
            reward = reward_of(text(whole))
            table.append((whole, p, reward, rule.pass_chance(reward, len(whole))))
        rejected = 1 - sum(p * a for _, p, _, a in table)
        tries = sum(rejected**k for k in range(rule.attempts))
        for whole, p, reward, a in table:
            chance = p * a * tries
            if rule.fallback_is_best:
                below = sum(q * (1 - b) for _, q, r, b in table if r < reward)
                equal = sum(q * (1 - b) for _, q, r, b in table if r == reward)
                best = (below + equal) ** rule.attempts - below**rule.attempts
                # Of equal rewards the first drawn is kept.
                chance += best * p * (1 - a) / equal if equal else 0.0
            else:
                chance += rejected ** (rule.attempts - 1) * p * (1 - a)
            over = whole[-1] == EOS or len(whole) == rule.max_tokens
            into = finished if over else open_states
            into[whole] = into.get(whole, 0.0) + weight * chance
    assert math.isclose(sum(finished.values()), 1.0, abs_tol=1e-9)
    return finished


def p_value(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Chi-square p-value; outcomes with a small expectation are pooled."""
    total = sum(counts.values())
    assert all(expected.get(outcome, 0.0) > 0 for outcome in counts), "an impossible response"
    observed, wanted, rare_observed, rare_wanted = [], [], 0.0, 0.0
    for outcome, probability in expected.items():
        if probability * total < 8:
            rare_observed += counts[outcome]
            rare_wanted += probability * total
        else:
            observed.append(float(counts[outcome]))
            wanted.append(probability * total)
    if rare_wanted > 1:
        observed.append(rare_observed)
        wanted.append(rare_wanted)
    scale = sum(observed) / sum(wanted)
    return float(stats.chisquare(observed, [w * scale for w in wanted]).pvalue)


SOFT = Rule(0.9, 0.4, 0.6, False, 3, 4, 2, 0.9)
HARD = Rule(0.5, 0.7, 1.0, True, 3, 4, 2, 1.0)
ODD = Rule(1.2, 0.0, 0.4, False, 2, 3, 2, 0.7)  # the last segment is cut short by the budget


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(
        letter_model(), reward_model, tokenizer=letter_tokenizer(), num_pages=4000, max_rows=1024
    )


def sample(engine: Engine, rule: Rule, candidates: int) -> Counter[tuple[int, ...]]:
    params = StarsParams(
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
    each = [dataclasses.replace(params, seed=1000 + i) for i in range(REQUESTS)]
    outputs = engine.generate([PROMPT] * REQUESTS, each, use_tqdm=False)
    assert all(output.error is None for output in outputs)
    return Counter(tuple(output.outputs[0].token_ids) for output in outputs)


@pytest.mark.parametrize(
    ("rule", "candidates"), [(SOFT, 1), (SOFT, 3), (HARD, 2), (ODD, 1)], ids=str
)
def test_matches_closed_form(engine: Engine, rule: Rule, candidates: int) -> None:
    assert p_value(sample(engine, rule, candidates), closed_form(rule)) > 1e-3


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
    expected: dict[tuple[int, ...], float] = {}
    for length in (1, 2, 3):
        for tokens in itertools.product(range(len(LETTERS)), repeat=length):
            if EOS in tokens[:-1] or (length < 3 and tokens[-1] != EOS):
                continue
            p = 1.0
            for i, token in enumerate(tokens):
                p *= next_probs(tokens[:i], 1.0)[token]
            expected[tokens] = p
    assert math.isclose(sum(expected.values()), 1.0, abs_tol=1e-6)
    assert p_value(counts, expected) > 1e-3
