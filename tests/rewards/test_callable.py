"""Rewards from Python code, and what becomes of its mistakes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from stars_fast.errors import RewardError
from stars_fast.rewards import Prompt, RewardModel, ScoreJob, Scorer, load_scorer


def scorer_of(function: Callable[[list[str], list[str]], Any]) -> Scorer:
    scorer = load_scorer(function, lm_tokenizer=None)
    for request, text in enumerate(("Is rice good?", "And tea?")):
        scorer.start(request, Prompt(text, [1], None), 8)
    return scorer


JOBS = [
    ScoreJob(0, 0, [5], "yes"),
    ScoreJob(1, 1, [6], "no"),
    ScoreJob(0, 2, [], ""),
]


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, iter])
def test_one_call_per_round_in_order(kind: Callable[[list[int]], Any]) -> None:
    calls = []

    def reward(prompts: list[str], responses: list[str]) -> Any:
        calls.append((prompts, responses))
        return kind([10 * len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])

    scorer = scorer_of(reward)
    assert scorer.score(JOBS) == [133.0, 82.0, 130.0]
    assert calls == [
        (["Is rice good?", "And tea?", "Is rice good?"], ["yes", "no", ""]),
    ]
    assert scorer.score([]) == []
    assert len(calls) == 1


def test_object_with_method_score() -> None:
    class Lengths:
        def score(self, prompts: list[str], responses: list[str]) -> list[float]:
            return [float(len(response)) for response in responses]

    assert isinstance(Lengths(), RewardModel)
    scorer = load_scorer(Lengths(), lm_tokenizer=None)
    scorer.start(0, Prompt("a", [1], None), 8)
    assert scorer.score([JOBS[0]]) == [3.0]


def test_raising_fails_the_bad_job_alone() -> None:
    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        prompts.clear()  # what it does to its lists is its own affair
        if "no" in responses:
            raise KeyError("no")
        return [float(len(response)) for response in responses]

    yes, no, empty = scorer_of(reward).score(JOBS)
    assert (yes, empty) == (3.0, 0.0)
    assert isinstance(no, RewardError)
    assert "KeyError" in str(no)
    assert isinstance(no.__cause__, KeyError)


@pytest.mark.parametrize(
    ("returned", "message"),
    [([1.0, 2.0], "returned 2 for 1 responses"), ([], "returned 0"), (np.float64(1.0), "single")],
)
def test_wrong_count_fails_the_bad_job_alone(returned: Any, message: str) -> None:
    def reward(_: list[str], responses: list[str]) -> Any:
        if "no" in responses:
            return returned
        return [float(len(response)) for response in responses]

    yes, no, empty = scorer_of(reward).score(JOBS)
    assert (yes, empty) == (3.0, 0.0)
    assert isinstance(no, RewardError)
    assert message in str(no)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (10**400, "too large"),
        (None, "NoneType"),
        ("1.5", "str"),
        ([1.0], "list"),
        (1j, "complex"),
        (torch.ones(2), "Tensor"),
    ],
)
def test_values_that_are_no_numbers_fail_their_job_alone(value: object, message: str) -> None:
    calls = 0

    def reward(_: list[str], responses: list[str]) -> list[object]:
        nonlocal calls
        calls += 1
        return [value if response == "no" else 1.5 for response in responses]

    yes, no, empty = scorer_of(reward).score(JOBS)
    assert (yes, empty) == (1.5, 1.5)
    assert isinstance(no, RewardError)
    assert message in str(no)
    assert calls == 1


def test_numbers_of_other_types() -> None:
    values: list[Any] = [np.float32(1.5), torch.tensor(2.5), True]
    assert scorer_of(lambda prompts, responses: values).score(JOBS) == [1.5, 2.5, 1.0]


def test_returned_none_is_an_error_of_each_job() -> None:
    results = scorer_of(lambda prompts, responses: None).score(JOBS)
    assert [type(result) for result in results] == [RewardError] * 3


def test_cache_calls_and_finish_do_nothing_harmful() -> None:
    scorer = scorer_of(lambda prompts, responses: [0.0] * len(prompts))
    scorer.score(JOBS)
    scorer.keep(0, 0)
    scorer.prune(0)
    scorer.accept(0, 0)
    scorer.finish(0)
    scorer.finish(0)
    assert scorer.score([ScoreJob(1, 3, [7], "perhaps")]) == [0.0]
    assert scorer.stats() == {"rm_jobs": 4, "rm_calls": 2, "rm_tokens": 0}


@pytest.mark.parametrize("reward_model", [3, None, object()])
def test_neither_model_nor_callable(reward_model: Any) -> None:
    with pytest.raises(TypeError, match="reward_model must be"):
        load_scorer(reward_model, lm_tokenizer=None)


def test_other_torch_modules_are_wrapped_by_the_user() -> None:
    with pytest.raises(TypeError, match=r"Linear, not a transformers model.*function f\("):
        load_scorer(torch.nn.Linear(2, 2), lm_tokenizer=None)


def test_template_is_for_models() -> None:
    with pytest.raises(ValueError, match="reward_template is for transformers models"):
        load_scorer(lambda prompts, responses: [], lm_tokenizer=None, template="chat")
