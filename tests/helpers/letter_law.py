"""Laws of responses of the letter model, enumerated exactly, and how far counts are from them."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from helpers.tiny_lm import LETTERS, letter_model, letter_tokenizer
from scipy import stats

from stars_fast import CompletionOutput, Engine, StarsParams

PROMPT = "ab"
EOS = len(LETTERS) - 1

Tokens = tuple[int, ...]
Law = dict[Tokens, float]


def reward_of(response: str) -> float:
    """A fixed reward that differs between all responses and rises and falls along them."""
    return math.sin(2.3 * sum((i + 1.7) * (ord(c) - 95.5) for i, c in enumerate(response))) * 1.5


def reward_model(prompts: list[str], responses: list[str]) -> list[float]:
    """`reward_of` as the engine takes it.

    "$" is a special token and no part of the text; two responses may share one text.
    """
    return [reward_of(response) for response in responses]


def letter_engine(reward: Any = reward_model, model: Any = None, **options: Any) -> Engine:
    """An engine on the letter model with room for many requests."""
    settings: dict[str, Any] = {"num_pages": 4000, "max_rows": 1024}
    settings["tokenizer"] = letter_tokenizer()
    return Engine(model or letter_model(), reward, **(settings | options))


@cache
def next_probs(
    tokens: Tokens, temperature: float = 1.0, prompt: str = PROMPT, head_dim: int = 8
) -> list[float]:
    """The model's probability of each letter after the prompt and the tokens."""
    before = [LETTERS.index(c) for c in prompt]
    with torch.no_grad():
        logits = letter_model(head_dim)(torch.tensor([[*before, *tokens]])).logits[0, -1].double()
    probs: list[float] = torch.softmax(logits / temperature, -1).tolist()
    return probs


@dataclass(frozen=True)
class World:
    """A model, a reward, and a letter that ends a segment."""

    probs: Callable[[Tokens, float], list[float]] = next_probs
    reward: Callable[[str], float] = reward_of
    ends: int | None = None


LETTER = World()


def segments(
    done: Tokens, length: int, temperature: float = 1.0, world: World = LETTER
) -> Iterator[tuple[Tokens, float]]:
    """Every segment of at most `length` tokens that can follow, with its probability."""

    def grow(segment: Tokens, p: float) -> Iterator[tuple[Tokens, float]]:
        if len(segment) == length or (segment and segment[-1] in (EOS, world.ends)):
            yield segment, p
            return
        for token, chance in enumerate(world.probs(done + segment, temperature)):
            if chance > 0:
                yield from grow((*segment, token), p * chance)

    yield from grow((), 1.0)


def text(tokens: Tokens) -> str:
    """The text of a response."""
    return "".join(LETTERS[t] for t in tokens if t != EOS)


def is_over(tokens: Tokens, max_tokens: int) -> bool:
    """Whether a response is finished."""
    return len(tokens) == max_tokens or tokens[-1:] == (EOS,)


def law_of(step: Callable[[Tokens], Law], max_tokens: int) -> Law:
    """The law of responses; `step` is that of a response with its next segment."""
    finished: Law = {}
    unfinished: Law = {(): 1.0}
    while unfinished:
        state, weight = unfinished.popitem()
        for whole, chance in step(state).items():
            into = finished if is_over(whole, max_tokens) else unfinished
            into[whole] = into.get(whole, 0.0) + weight * chance
    assert math.isclose(sum(finished.values()), 1.0, abs_tol=1e-9)
    return finished


def model_law(max_tokens: int, temperature: float = 1.0, world: World = LETTER) -> Law:
    """The law of plain samples."""
    return dict(segments((), max_tokens, temperature, replace(world, ends=None)))


def tilted(law: Law, beta: float, world: World = LETTER) -> Law:
    """p(y) exp(r(y) / beta) / Z."""
    weights = {y: p * math.exp(world.reward(text(y)) / beta) for y, p in law.items()}
    total = sum(weights.values())
    return {y: w / total for y, w in weights.items()}


def total_variation(counts: Counter[Tokens], law: Law) -> float:
    """Between what was counted and the law."""
    total = counts.total()
    return sum(abs(counts[y] / total - law.get(y, 0.0)) for y in {*counts, *law}) / 2


def responses_of(
    engine: Engine, params: StarsParams, requests: int, prompt: Any = PROMPT
) -> list[CompletionOutput]:
    """Responses to one prompt, drawn with the seeds 1000, 1001, ..."""
    each = [replace(params, seed=1000 + i) for i in range(requests)]
    outputs = engine.generate([prompt] * requests, each, use_tqdm=False)
    assert all(output.error is None for output in outputs)
    return [output.outputs[0] for output in outputs]


def count(
    engine: Engine, params: StarsParams, requests: int, prompt: Any = PROMPT
) -> Counter[Tokens]:
    """How often each response came."""
    found = responses_of(engine, params, requests, prompt)
    return Counter(tuple(response.token_ids) for response in found)


def p_value(counts: Counter[Tokens], law: Law) -> float:
    """Chi-square p-value; outcomes with a small expectation are pooled."""
    total = counts.total()
    assert all(law.get(outcome, 0.0) > 0 for outcome in counts), "an impossible response"
    observed, wanted, rare_observed, rare_wanted = [], [], 0.0, 0.0
    for outcome, probability in law.items():
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


def first_to_pass(table: Iterable[tuple[Tokens, float, float, float]], attempts: int) -> Law:
    """The law of a segment whose attempts are tested in turn, the best kept if none passes.

    The rows are (response, p, reward, chance a to pass), with q = p (1 - a) and A = sum p a:

        P(y) = p(y) a(y) (1 + (1-A) + ... + (1-A)^(R-1))            y passed, after k rejections
             + (sum of q over r <= r(y))^R - (sum of q over r < r(y))^R    R rejections, y the best
    """
    rows = list(table)
    rejected = 1 - sum(p * a for _, p, _, a in rows)
    tries = sum(rejected**k for k in range(attempts))
    law: Law = {}
    for whole, p, reward, a in rows:
        below = sum(q * (1 - b) for _, q, r, b in rows if r < reward)
        equal = sum(q * (1 - b) for _, q, r, b in rows if r == reward)
        best = (below + equal) ** attempts - below**attempts
        # Of equal rewards the first drawn is kept.
        law[whole] = p * a * tries + (best * p * (1 - a) / equal if equal else 0.0)
    return law


def stars_law(params: StarsParams, world: World = LETTER) -> Law:
    """The law of responses of STARS, where the target is a number."""
    target, total = float(params.target_reward or 0), params.max_tokens
    start = (1 - params.alpha) * world.reward("") + params.alpha * target

    def step(done: Tokens) -> Law:
        table = []
        length = min(params.segment_length, total - len(done))
        for segment, p in segments(done, length, params.temperature, world):
            whole = done + segment
            reward = world.reward(text(whole))
            tau = min(target, start + (target - start) * len(whole) / total)
            table.append((whole, p, reward, min(1.0, math.exp((reward - tau) / params.beta))))
        return first_to_pass(table, _attempts(params, done))

    return law_of(step, total)


def gibbs_law(params: StarsParams, beta: float, world: World = LETTER) -> Law:
    """The law of responses of ``acceptance="gibbs"``: every tuple of N independent segments."""

    def step(done: Tokens) -> Law:
        length = min(params.segment_length, params.max_tokens - len(done))
        table = [
            (done + segment, p, math.exp(world.reward(text(done + segment)) / beta))
            for segment, p in segments(done, length, params.temperature, world)
        ]
        law: Law = {}
        for drawn in itertools.product(table, repeat=_attempts(params, done)):
            chance = math.prod(p for _, p, _ in drawn) / sum(w for _, _, w in drawn)
            for whole, _, weight in drawn:
                law[whole] = law.get(whole, 0.0) + chance * weight
        return law

    return law_of(step, params.max_tokens)


def _attempts(params: StarsParams, done: Tokens) -> int:
    """Attempts of the segment behind some tokens."""
    if not params.attempts_at:
        return params.attempts_per_segment
    return params.attempts_at[len(done) // params.attempts_span]
