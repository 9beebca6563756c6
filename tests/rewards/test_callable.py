"""Rewards from Python code, and what becomes of its mistakes."""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from stars_fast.errors import RewardError
from stars_fast.rewards import Prompt, RewardModel, ScoreJob, Scorer, load_scorer
from stars_fast.rewards.deadline import MAX_HANGING


def scorer_of(
    function: Callable[[list[str], list[str]], Any], timeout: float | None = None
) -> Scorer:
    scorer = load_scorer(function, lm_tokenizer=None, timeout=timeout)
    for request, text in enumerate(("Is rice good?", "And tea?")):
        scorer.start(request, Prompt(text, [1], None), 8)
    return scorer


JOBS = [
    ScoreJob(0, 0, [5], "yes"),
    ScoreJob(1, 1, [6], "no"),
    ScoreJob(0, 2, [], ""),
]


def column(values: list[int]) -> torch.Tensor:
    return torch.tensor(values)[:, None]


KINDS = [list, tuple, np.array, torch.tensor, iter, column, lambda values: column(values).numpy()]


@pytest.mark.parametrize("kind", KINDS)
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
    [
        ([1.0, 2.0], "returned 2 for 1 responses; it must return one reward per response"),
        ([], "returned 0"),
        (itertools.repeat(1.0), "returned 2 or more for 1 responses"),
        (np.float64(1.0), "a single number"),
        (torch.tensor(1.0), r"a single number \(1.0\)"),
        (1.0, r"a single number \(1.0\)"),
        (None, "returned None; it must"),
        ({"no": 1.0}, r"returned a dict \(\{'no': 1.0\}\)"),
        ({1.0}, "returned a set"),
        ("1", "returned a str"),
        (object(), "returned a object"),
        (np.ones((1, 2)), r"returned a list \(\[1.0, 1.0\]\) where a number was due"),
    ],
)
def test_wrong_count_fails_the_bad_job_alone(returned: Any, message: str) -> None:
    def reward(_: list[str], responses: list[str]) -> Any:
        if "no" in responses:
            return returned
        return [float(len(response)) for response in responses]

    yes, no, empty = scorer_of(reward).score(JOBS)
    assert (yes, empty) == (3.0, 0.0)
    assert isinstance(no, RewardError)
    assert re.search(message, str(no))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (10**400, "too large"),
        (None, "returned None where a number was due"),
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


ENDS = [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()]


@pytest.mark.parametrize("end", ENDS, ids=repr)
@pytest.mark.parametrize("timeout", [None, 60.0])
def test_what_would_end_a_process_fails_the_bad_job_alone(
    end: BaseException, timeout: float | None
) -> None:
    def reward(_: list[str], responses: list[str]) -> list[float]:
        if "no" in responses:
            raise end
        return [float(len(response)) for response in responses]

    scorer, results = scorer_of(reward, timeout), []
    # As the engine of a server: Ctrl-C comes to the main thread alone.
    thread = threading.Thread(target=lambda: results.extend(scorer.score(JOBS)))
    thread.start()
    thread.join()
    yes, no, empty = results
    assert (yes, empty) == (3.0, 0.0)
    assert isinstance(no, RewardError)
    assert type(end).__name__ in str(no)


def test_ctrl_c_on_the_main_thread_is_not_a_reward() -> None:
    def reward(*_: list[str]) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scorer_of(reward).score(JOBS)


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_async_functions_keep_their_event_loop(timeout: float | None) -> None:
    loops = set()

    async def reward(_: list[str], responses: list[str]) -> list[float]:
        loops.add(asyncio.get_running_loop())
        await asyncio.sleep(0)
        if "no" in responses:
            raise ValueError("no")
        return [float(len(response)) for response in responses]

    scorer = scorer_of(reward, timeout)

    async def in_a_notebook() -> list[float | Exception]:
        return scorer.score(JOBS)

    yes, no, empty = asyncio.run(in_a_notebook())
    assert (yes, empty) == (3.0, 0.0)
    assert isinstance(no, RewardError)
    assert "raised ValueError: no" in str(no)
    assert len(loops) == 1


class TestDeadlines:
    def test_a_call_that_hangs_fails_its_jobs_and_no_later_ones(self) -> None:
        released, threads = threading.Event(), set()

        def reward(_: list[str], responses: list[str]) -> list[float]:
            threads.add(threading.current_thread())
            if "no" in responses:
                released.wait()
            return [float(len(response)) for response in responses]

        scorer = scorer_of(reward, 0.05)
        try:
            assert [str(result) for result in scorer.score(JOBS)] == [
                f"reward function {reward.__qualname__} did not return within 0.05 s"
            ] * 3
            assert scorer.score([JOBS[0], JOBS[2]]) == [3.0, 0.0]
            assert scorer.score([ScoreJob(0, 4, [7], "perhaps")]) == [7.0]
            assert len(threads) == 2
        finally:
            released.set()

    def test_a_generator_that_hangs_between_two_rewards(self) -> None:
        released = threading.Event()

        def reward(_: list[str], responses: list[str]) -> Any:
            for response in responses:
                yield float(len(response))
                released.wait()

        try:
            assert "within 0.05 s" in str(scorer_of(reward, 0.05).score(JOBS)[0])
        finally:
            released.set()

    def test_calls_that_hang_do_not_pile_up(self) -> None:
        released, calls = threading.Event(), 0

        def reward(_: list[str], responses: list[str]) -> list[float]:
            nonlocal calls
            calls += 1
            released.wait()
            return [1.0] * len(responses)

        scorer = scorer_of(reward, 0.02)
        try:
            errors = [str(scorer.score([JOBS[0]])[0]) for _ in range(MAX_HANGING + 3)]
            assert calls == MAX_HANGING
            assert all("did not return" in error for error in errors[:MAX_HANGING])
            assert all("was not called: 4 calls before" in error for error in errors[MAX_HANGING:])
        finally:
            released.set()
        deadline = time.monotonic() + 30
        while scorer.score([JOBS[0]]) != [1.0]:  # it is asked again once a call has ended
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def test_what_an_async_function_awaits_is_cancelled(self) -> None:
        cancelled = threading.Event()

        async def reward(_: list[str], responses: list[str]) -> list[float]:
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                cancelled.set()
                raise
            return []

        assert "did not return within" in str(scorer_of(reward, 0.05).score(JOBS)[0])
        assert cancelled.wait(30)


def test_its_thread_ends_with_the_scorer() -> None:
    threads = []

    def reward(_: list[str], responses: list[str]) -> list[float]:
        threads.append(threading.current_thread())
        return [0.0] * len(responses)

    scorer = scorer_of(reward, 60.0)
    scorer.score(JOBS)
    scorer.score([ScoreJob(0, 4, [7], "perhaps")])
    assert len(set(threads)) == 1
    del scorer
    gc.collect()
    threads[0].join(30)
    assert not threads[0].is_alive()


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


class Growth:
    """Rewards what a response adds to the committed text; refuses "no"."""

    reads_committed = True

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[str], list[str]]] = []

    async def score_each(
        self, prompts: list[str], responses: list[str], committed: list[str]
    ) -> list[float | Exception]:
        self.calls.append((prompts, responses, committed))
        return [
            ValueError("no!") if response == "no" else float(len(response) - len(before))
            for response, before in zip(responses, committed, strict=True)
        ]


def test_an_error_in_the_place_of_a_reward_is_that_of_its_job() -> None:
    function = Growth()
    scorer = scorer_of(function)  # type: ignore[arg-type]
    found = scorer.score(JOBS)
    assert found[0] == 3.0
    assert found[2] == 0.0
    assert isinstance(found[1], ValueError)
    assert len(function.calls) == 1


def test_the_committed_text_is_that_of_the_accepted_branch() -> None:
    scorer = scorer_of(Growth())  # type: ignore[arg-type]

    def score(request: int, branch: int, text: str) -> Any:
        return scorer.score([ScoreJob(request, branch, [5], text)])[0]

    assert score(0, 0, "") == 0
    scorer.accept(0, 0)
    assert score(0, 1, "ab") == 2
    scorer.keep(0, 1)
    scorer.prune(0)
    assert score(0, 2, "abcd") == 4  # rejected, too: the text is still empty
    scorer.accept(0, 1)  # the fallback
    assert score(0, 3, "abcd") == 2  # not the reward that it had before
    scorer.accept(0, 3)
    scorer.fork(0, 1)
    assert score(1, 4, "abcde") == 1
    scorer.finish(0)
    scorer.start(0, Prompt("Is rice good?", [1], None), 8)
    assert score(0, 5, "abcd") == 4
