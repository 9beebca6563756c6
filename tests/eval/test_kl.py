"""The estimate of KL(method || base) against cases that can be enumerated."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_lm import LETTERS, letter_model, letter_tokenizer

from stars_fast import Engine, Segment, StarsParams
from stars_fast.eval.kl import alignment_kl, harmonic

SOFT = StarsParams(target_reward=1.0, beta=0.5)


def segment(reward: float, threshold: float, attempts: int, accepted: Any = "test") -> Segment:
    return Segment(0, 4, reward, threshold, attempts, accepted)


def test_by_hand() -> None:
    segments = [segment(0.3, 0.5, 3), segment(2.0, 0.5, 1)]
    found = alignment_kl(SOFT, segments)
    assert found.value == pytest.approx(-0.2 / 0.5 + (1 + 1 / 2))
    assert found.kind == "estimate"
    hard = replace(SOFT, acceptance="hard")
    assert alignment_kl(hard, segments[1:]).value == 0.0
    assert alignment_kl(hard, [segment(0.6, 0.5, 4)]).value == pytest.approx(1 + 1 / 2 + 1 / 3)
    fallback = alignment_kl(SOFT, [segment(-9.0, 0.5, 20, "fallback")])
    assert fallback.value == pytest.approx(math.log(20) - 19 / 20)


@pytest.mark.parametrize("accept", [0.9, 0.5, 0.1])
def test_harmonic_numbers_of_geometric_attempts_estimate_the_acceptance(accept: float) -> None:
    attempts = np.random.default_rng(5).geometric(accept, 40_000)
    values = np.array([harmonic(int(n) - 1) for n in attempts])
    error = values.std() / math.sqrt(len(values))
    assert values.mean() == pytest.approx(-math.log(accept), abs=4 * error)
    assert error < 0.02


def test_a_simulated_test_over_three_segments() -> None:
    rng = np.random.default_rng(2)
    q = np.array([0.6, 0.3, 0.1])
    reward = np.array([-0.5, 0.2, 0.8])
    tau = 0.4
    accept = np.minimum(1.0, np.exp((reward - tau) / SOFT.beta))
    p = q * accept / (q @ accept)
    exact = float(p @ np.log(p / q))
    values = []
    draws = iter(rng.choice(3, p=q, size=100_000))
    for _ in range(10_000):
        attempts = 1
        while rng.random() >= accept[s := next(draws)]:
            attempts += 1
        values.append(alignment_kl(SOFT, [segment(reward[s], tau, attempts)]).value)
    error = float(np.std(values)) / math.sqrt(len(values))
    assert exact > 0.2
    assert np.mean(values) == pytest.approx(exact, abs=4 * error)


def count_a(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(response.count("a")) for response in responses]


def test_the_engine_against_an_enumerated_model() -> None:
    """Two segments of two letters; KL of the whole response by the chain rule over all of them."""
    params = StarsParams(
        segment_length=2, max_tokens=4, target_reward=2.5, beta=0.8, alpha=0.5, max_attempts=400,
        temperature=1.0, top_k=0, ignore_eos=True, candidates=2,
    )  # fmt: skip
    engine = Engine(letter_model(), count_a, tokenizer=letter_tokenizer(), device="cpu")
    exact = _exact_kl(params)
    each = [replace(params, seed=seed) for seed in range(1500)]
    outputs = engine.generate(["ab"] * len(each), each, use_tqdm=False)
    values = [alignment_kl(params, output.outputs[0].segments).value for output in outputs]
    assert all(value is not None for value in values)
    found = np.array(values, np.float64)
    error = found.std() / math.sqrt(len(found))
    assert exact > 0.3
    assert found.mean() == pytest.approx(exact, abs=4 * error)
    assert error < 0.1  # and it is sharp enough to tell methods apart


def _exact_kl(params: StarsParams) -> float:
    prompt = [LETTERS.index(letter) for letter in "ab"]
    assert isinstance(params.target_reward, float)
    start = (1 - params.alpha) * 0.0 + params.alpha * params.target_reward
    total = 0.0
    weights = {(): 1.0}
    for round_number in (1, 2):
        tokens = 2 * round_number
        rise = (params.target_reward - start) * tokens / params.max_tokens
        tau = min(params.target_reward, start + rise)
        following: dict[tuple[int, ...], float] = {}
        for prefix, weight in weights.items():
            segments = list(itertools.product(range(len(LETTERS)), repeat=2))
            q = np.array([_probability(prompt + list(prefix), s) for s in segments])
            rewards = np.array([(prefix + s).count(0) for s in segments])
            accept = np.minimum(1.0, np.exp((rewards - tau) / params.beta))
            p = q * accept / (q @ accept)
            total += weight * float(p @ np.log(p / q))
            for s, share in zip(segments, p, strict=True):
                following[prefix + s] = weight * float(share)
        weights = following
    return total


def _probability(prefix: list[int], segment: tuple[int, ...]) -> float:
    ids = [*prefix, *segment]
    with torch.inference_mode():
        logprobs = letter_model()(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return math.exp(
        sum(float(logprobs[len(prefix) - 1 + i, token]) for i, token in enumerate(segment))
    )


def test_best_of_n_is_bounded() -> None:
    """For distinct rewards the bound is the KL: of the best of N of a fine uniform distribution."""
    count, fine = 4, 100_000
    grid = (np.arange(fine) + 1.0) / fine
    p = np.diff(np.concatenate([[0.0], grid**count]))
    exact = float(p @ np.log(p * fine))
    params = StarsParams(method="best_of_n", candidates=count)
    found = alignment_kl(params, [])
    assert found.value == pytest.approx(exact, abs=1e-3)
    assert found.kind == "upper bound"
    default = alignment_kl(StarsParams(method="best_of_n"), [])
    assert default.value == pytest.approx(math.log(8) - 7 / 8)


def test_where_nothing_is_chosen_there_is_none() -> None:
    assert alignment_kl(StarsParams(method="vanilla"), []).value == 0.0
    greedy = replace(SOFT, temperature=0.0)
    assert alignment_kl(greedy, [segment(-9.0, 0.5, 1, "fallback")]).value == 0.0


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        (StarsParams(method="smc"), "no estimator for smc"),
        (StarsParams(method="mara"), "not draws"),
        (StarsParams(method="cards", rules="public"), "kept untested"),
    ],
)
def test_the_reason_is_given_where_there_is_no_estimate(params: StarsParams, reason: str) -> None:
    found = alignment_kl(params, [segment(0.0, 0.0, 1)])
    assert found.value is None
    assert reason in found.reason
