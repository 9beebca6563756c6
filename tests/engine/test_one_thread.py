"""Threads that use one engine at a time: an error that says so, and nothing else."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers.letter_law import letter_engine
from helpers.outputs import all_same

from stars_fast import Engine, RequestOutput, StarsParams
from stars_fast.errors import ConcurrentCallError

PARAMS = StarsParams(
    segment_length=2,
    max_tokens=6,
    max_attempts=3,
    target_reward=0.5,
    temperature=1.0,
    top_k=0,
    ignore_eos=True,
)
PROMPTS = ["ab", "cc", "ba", "ac", "bb"] * 6


def count_a(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(response.count("a")) - 1.0 for response in responses]


def seeded(number: int) -> StarsParams:
    return dataclasses.replace(PARAMS, seed=number)


@pytest.fixture
def often() -> Iterator[None]:
    """Threads take turns much more often than they do."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def run_all(works: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()


@pytest.mark.usefixtures("often")
def test_one_thread_adds_and_two_step() -> None:
    want = letter_engine(count_a).generate(
        PROMPTS, [seeded(i) for i in range(len(PROMPTS))], use_tqdm=False
    )
    engine = letter_engine(count_a)
    finished: dict[str, RequestOutput] = {}
    refused: list[str] = []
    wrong: list[Exception] = []

    def again(call: Callable[[], Any]) -> Any:
        while True:
            try:
                return call()
            except ConcurrentCallError as error:
                refused.append(str(error))
            except Exception as error:  # noqa: BLE001 - looked at below
                wrong.append(error)
                return []

    def add() -> None:
        for i, prompt in enumerate(PROMPTS):
            again(lambda i=i, prompt=prompt: engine.add_request(str(i), prompt, seeded(i)))

    def step() -> None:
        while len(finished) < len(PROMPTS) and not wrong:
            for output in again(engine.step):
                if output.finished:
                    finished[output.request_id] = output

    run_all([add, step, step])
    assert wrong == []
    assert all_same([finished[str(i)] for i in range(len(PROMPTS))], want)
    assert refused
    for message in set(refused):
        assert "was called while another thread is in Engine." in message


def test_every_call_says_which_and_does_nothing() -> None:
    inside, release = threading.Event(), threading.Event()

    def slow(prompts: list[str], responses: list[str]) -> list[float]:
        inside.set()
        assert release.wait(60)
        return count_a(prompts, responses)

    engine = letter_engine(slow)
    outputs: list[RequestOutput] = []
    thread = threading.Thread(
        target=lambda: outputs.extend(engine.generate("ab", seeded(1), use_tqdm=False))
    )
    thread.start()
    assert inside.wait(60)
    calls: dict[str, Callable[[], Any]] = {
        "add_request": lambda: engine.add_request("a", "ab", seeded(2)),
        "step": engine.step,
        "abort": lambda: engine.abort("generate-0"),
        "generate": lambda: engine.generate("ab", PARAMS),
        "score": lambda: engine.score("ab", ["a"]),
        "calibrate": lambda: engine.calibrate("ab"),
        "reset_prefix_cache": engine.reset_prefix_cache,
        "calibration": lambda: setattr(engine, "calibration", None),
    }
    for name, call in calls.items():
        named = rf"Engine\.{name} was called while another thread is in Engine\.step: one thread"
        with pytest.raises(ConcurrentCallError, match=named):
            call()
    release.set()
    thread.join(60)
    assert all_same(outputs, letter_engine(count_a).generate("ab", seeded(1), use_tqdm=False))
    assert not engine.has_unfinished()


def test_a_call_that_fails_leaves_the_engine_free() -> None:
    engine: Engine = letter_engine(count_a)
    with pytest.raises(ValueError, match="prompt is empty"):
        engine.add_request("a", "", PARAMS)
    free: list[RequestOutput] = []
    run_all([lambda: free.extend(engine.generate("ab", seeded(1), use_tqdm=False))])
    assert [output.error for output in free] == [None]
