"""The next draft runs while outputs are made: the same results, nothing late and nothing lost."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers.backends import device_of
from helpers.letter_law import letter_engine
from helpers.tiny_architectures import tiny_lm
from helpers.tiny_lm import small_model
from helpers.tiny_rewards import reward_model
from helpers.tiny_tokenizers import bpe_tokenizer

from stars_fast import AsyncEngine, Engine, Persona, StarsParams
from stars_fast.drafting.base import Draft, LaunchingDrafter, RowSampling
from stars_fast.engine.batches import BatchEngine
from stars_fast.engine.round import Round
from stars_fast.outputs import RequestOutput
from stars_fast.rewards.causal import CausalScorer

PROMPTS = [f"The film was {word}" for word in ("slow", "bad", "good", "old", "red", "late", "ok")]
PARAMS = StarsParams(
    segment_length=8,
    max_tokens=30,
    max_attempts=4,
    target_reward=3.0,
    beta=0.6,
    temperature=1.0,
    top_k=30,
    ignore_eos=True,
)
PASSING = dataclasses.replace(PARAMS, target_reward=-50.0)  # every round commits a segment
KINDS = {
    "stars": PARAMS,
    "clauses": dataclasses.replace(PARAMS, segment_end="clause", min_segment_length=1),
    "penalties": dataclasses.replace(
        PARAMS, repetition_penalty=1.4, frequency_penalty=0.5, bad_words=[" the", "a b"]
    ),
    "stop texts": dataclasses.replace(PARAMS, stop=["e", " a"], max_tokens=60),
    "several": dataclasses.replace(PARAMS, n=3),
    "gibbs": PARAMS.with_method("stars", acceptance="gibbs", candidates=3),
    "cards": PARAMS.with_method("cards", entropy_threshold=4.5, min_segment_length=1),
    "smc": PARAMS.with_method(
        "smc", candidates=3, ess_threshold=1.0, frequency_penalty=1.5, bad_words=[" the", "a b"]
    ),
    "best_of_n": PARAMS.with_method("best_of_n", candidates=3),
    "speculative rejection": PARAMS.with_method("speculative_rejection", candidates=4),
    "regex": dataclasses.replace(PARAMS, guided={"regex": "[a-z ]{3,40}"}, ignore_eos=False),
}


class OnAThread:
    """A drafter whose drafts run beside the host, as those of a GPU do."""

    def __init__(self, drafter: Any) -> None:
        self.drafter = drafter
        self.worker = ThreadPoolExecutor(1)
        self.launched = 0

    def draft(self, plan: Any, sampling: Sequence[RowSampling]) -> Draft:
        return self.launch(plan, sampling)()

    def launch(self, plan: Any, sampling: Sequence[RowSampling]) -> Callable[[], Draft]:
        self.launched += 1

        def run() -> Draft:
            with torch.inference_mode():
                return self.drafter.draft(plan, sampling)

        return self.worker.submit(run).result


def engine(rewards: Any = None, *, beside: bool = False, **options: Any) -> Engine:
    tokenizer = bpe_tokenizer()
    settings: dict[str, Any] = {"num_pages": 300, "page_size": 8, "max_rows": 16}
    if rewards is None:
        rewards = reward_model("llama", tokenizer)
        settings |= {"reward_template": "plain", "reward_tokenizer": tokenizer}
    settings |= {"draft_ahead": True} | options
    made = Engine(small_model(), rewards, tokenizer=tokenizer, **settings)
    if beside:
        made.loop.drafter = OnAThread(made.loop.drafter)
        assert isinstance(made.loop.drafter, LaunchingDrafter)
    return made


def each(params: StarsParams = PARAMS) -> list[StarsParams]:
    return [dataclasses.replace(params, seed=i) for i in range(len(PROMPTS))]


def run(engine: Engine, params: StarsParams = PARAMS) -> list[RequestOutput]:
    return engine.generate(PROMPTS, each(params), use_tqdm=False)


def decisions(outputs: Sequence[RequestOutput]) -> list[Any]:
    """All that does not depend on the batch; rewards differ in their last digits between shapes."""
    return [
        (
            *(one.token_ids, one.text, one.finish_reason),
            [(segment.attempts, segment.accepted) for segment in one.segments],
        )
        for request in outputs
        for one in request.outputs
    ]


def finished(engine: Engine) -> dict[str, RequestOutput]:
    done = {}
    while engine.has_unfinished():
        done.update({output.request_id: output for output in engine.step() if output.finished})
    return done


@functools.cache
def plain(kind: str) -> list[RequestOutput]:
    outputs = run(engine(draft_ahead=False), KINDS[kind])
    assert [output.error for output in outputs] == [None] * len(outputs)
    return outputs


@pytest.mark.parametrize(
    ("beside", "pages"), [(True, 300), (False, 40)], ids=["beside", "preempting"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_same_results(kind: str, beside: bool, pages: int) -> None:
    ahead = engine(num_pages=pages, beside=beside)
    got = run(ahead, KINDS[kind])
    assert decisions(got) == decisions(plain(kind))
    assert [o.drafted_tokens >= len(o.outputs[0].token_ids) for o in got] == [True] * len(got)
    stats = ahead.stats()
    assert stats["pages_used"] == stats["rm_pages_used"] == stats["requests_running"] == 0


def test_outputs_come_while_the_next_draft_runs() -> None:
    """Each step returns before the draft that it has launched is over."""
    one = engine(beside=True)
    drafter = one.loop.drafter
    assert isinstance(drafter, OnAThread)
    for name, prompt, params in zip("abcdefg", PROMPTS, each(PASSING), strict=True):
        one.add_request(name, prompt, params)
    one.step()
    for _ in range(2):
        held = drafter.worker.submit(lambda: None)
        launched = drafter.launched
        # The worker is kept busy from the next launch on; a step that waited would never return.
        gate = _Gate(drafter)
        outputs = one.step()
        assert outputs
        assert drafter.launched == launched + 1
        assert not gate.opened
        gate.open()
        held.result()


class _Gate:
    """Holds what is launched behind it until it is opened."""

    def __init__(self, drafter: OnAThread) -> None:
        self._event = threading.Event()
        launch = drafter.launch

        def held(plan: Any, sampling: Sequence[RowSampling]) -> Callable[[], Draft]:
            drafter.launch = launch  # type: ignore[method-assign]
            drafter.worker.submit(self._event.wait)
            return launch(plan, sampling)

        drafter.launch = held  # type: ignore[method-assign]

    @property
    def opened(self) -> bool:
        return self._event.is_set()

    def open(self) -> None:
        self._event.set()


def test_texts_are_made_once_the_draft_is_launched() -> None:
    one = engine(beside=True)
    launch, seen = one.loop.drafter.launch, []  # type: ignore[attr-defined]

    def noting(*args: Any) -> Callable[[], Draft]:
        outputs = [response.output for response in one.loop._responses.values()]
        seen.append([(len(o.token_ids), len(o.segments), o.text == "") for o in outputs])
        return launch(*args)

    one.loop.drafter.launch = noting  # type: ignore[attr-defined]
    one.add_request("a", PROMPTS[0], dataclasses.replace(PASSING, seed=0))
    (output,) = one.step()
    assert seen == [[(0, 0, True)], [(8, 0, True)]]
    assert len(output.outputs[0].segments) == 1
    assert output.outputs[0].text


def test_candidates_are_made_while_they_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the launch of the pass and the read of its results."""
    one = engine(draft_ahead=False)
    scorer = one.loop.scorer
    assert isinstance(scorer, CausalScorer)
    rounds: list[Round] = []
    made: list[bool] = []

    def noting(run: Callable[..., Any], *, before: bool) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            result = None if before else run(*args)
            made.append("candidates" in rounds[-1].__dict__)
            return run(*args) if before else result

        return noted

    texts, reading = scorer._texts, scorer._reading
    monkeypatch.setattr(texts, "forward", noting(texts.forward, before=False))
    monkeypatch.setattr(reading, "values", noting(reading.values, before=True))
    one.loop.on_round = rounds.append
    one.add_request("a", PROMPTS[0], dataclasses.replace(PASSING, seed=0))
    finished(one)
    assert made[:4] == [False, False, False, True]  # the prompt, then its first segment
    assert made[4:] == [False, True] * (len(rounds) - 1)


def test_what_comes_before_a_plan_takes_part_in_it() -> None:
    """Also in one that is launched ahead: a request is no round later."""
    one = engine()
    late = iter(["late"])
    rows: list[set[int]] = []

    def add() -> None:
        for name in late:
            one.add_request(name, PROMPTS[1], dataclasses.replace(PARAMS, seed=1))

    one.loop.before_plan = add
    one.loop.on_round = lambda done: rows.append({r.handle for r in done.responses})
    one.add_request("first", PROMPTS[0], dataclasses.replace(PARAMS, seed=0))
    done = finished(one)
    assert [len(handles) for handles in rows[:2]] == [1, 2]
    want = plain("stars")
    assert decisions([done["first"], done["late"]]) == decisions(want[:2])


def test_an_abort_before_a_plan_loses_no_segment() -> None:
    """What a round decided is written down before its request is stopped."""
    one = engine()
    aborted: list[RequestOutput | None] = []
    one.add_request("gone", PROMPTS[0], dataclasses.replace(PASSING, seed=0))
    one.add_request("kept", PROMPTS[1], dataclasses.replace(PASSING, seed=1))

    def abort() -> None:
        if not aborted:
            aborted.append(one.abort("gone"))

    one.loop.before_plan = abort
    done = finished(one)
    assert set(done) == {"kept"}
    (output,) = aborted
    assert output is not None
    response = output.outputs[0]
    assert response.finish_reason == "abort"
    want = run(engine(draft_ahead=False), PASSING)
    assert response.token_ids == want[0].outputs[0].token_ids[: len(response.token_ids)]
    assert sum(s.end - s.start for s in response.segments) == len(response.token_ids) > 0
    assert want[0].outputs[0].text.startswith(response.text)
    assert response.text
    assert decisions([done["kept"]]) == decisions(want[1:2])
    assert one.stats()["pages_used"] == 0


@pytest.mark.parametrize("beside", [False, True])
def test_abort_and_add_between_steps(beside: bool) -> None:
    one = engine(beside=beside)
    for i, prompt in enumerate(PROMPTS[:4]):
        one.add_request(f"r{i}", prompt, dataclasses.replace(PARAMS, seed=i))
    one.step()  # the next round is being drafted now
    aborted = one.abort("r1")
    assert aborted is not None
    assert aborted.outputs[0].finish_reason == "abort"
    one.add_request("late", PROMPTS[4], dataclasses.replace(PARAMS, seed=4))
    done = finished(one)
    assert set(done) == {"r0", "r2", "r3", "late"}
    want = plain("stars")
    got = [done[name] for name in ("r0", "r2", "r3", "late")]
    assert decisions(got) == decisions([want[i] for i in (0, 2, 3, 4)])
    assert one.stats()["pages_used"] == 0


@pytest.mark.parametrize("method", ["stars", "smc"])
def test_abort_of_the_last_request_gives_its_pages_back(method: str) -> None:
    """Also of the round that is being drafted, which nobody will step to its end."""
    for steps in range(1, 4):
        one = engine(beside=True)
        one.add_request("a", PROMPTS[0], KINDS[method])
        for _ in range(steps):
            one.step()
        one.abort("a")
        assert not one.has_unfinished()
        stats = one.stats()
        assert stats["pages_used"] == stats["rm_pages_used"] == 0
        assert decisions(run(one)) == decisions(plain("stars"))


def test_a_launch_that_fails_harms_no_output(caplog: pytest.LogCaptureFixture) -> None:
    """The round before comes out, and the next step runs the round that failed."""
    one = engine(beside=True)
    drafter = one.loop.drafter
    assert isinstance(drafter, OnAThread)
    launch, calls = drafter.launch, iter(range(1000))

    def failing(plan: Any, sampling: Sequence[RowSampling]) -> Callable[[], Draft]:
        if next(calls) in (1, 2, 5):
            raise RuntimeError("out of memory")
        return launch(plan, sampling)

    drafter.launch = failing  # type: ignore[method-assign]
    for i, prompt in enumerate(PROMPTS):
        one.add_request(f"r{i}", prompt, dataclasses.replace(PARAMS, seed=i))
    failures, steps, done = 0, 0, {}
    while one.has_unfinished():
        steps += 1
        try:
            outputs = one.step()
        except RuntimeError:
            failures += 1
            one.loop._scheduler.check()
        else:
            assert outputs or steps > 1
            done.update({o.request_id: o for o in outputs if o.finished})
    assert failures == 1  # the second of two in a row
    assert caplog.text.count("could not be launched ahead") == 2
    want = plain("stars")
    assert decisions([done[f"r{i}"] for i in range(len(PROMPTS))]) == decisions(want)


def test_a_launch_that_fails_keeps_what_the_judge_has_read() -> None:
    """Its rewards are of the tokens behind those that it knows to be committed."""
    persona = Persona(template="c{prompt}ca")
    params = StarsParams(
        method="persona_judge", max_attempts=4, max_tokens=24, temperature=1.5, seed=3, top_k=0
    )
    want = letter_engine(persona).generate("ab", params, use_tqdm=False)
    one = letter_engine(persona, draft_ahead=True)
    one.loop.drafter = OnAThread(one.loop.drafter)
    launch, calls = one.loop.drafter.launch, iter(range(1000))

    def failing(*args: Any) -> Callable[[], Draft]:
        if next(calls) % 3 == 1:
            raise RuntimeError("out of memory")
        return launch(*args)

    one.loop.drafter.launch = failing  # type: ignore[method-assign]
    one.add_request("a", "ab", params)
    (got,) = finished(one).values()
    assert decisions([got]) == decisions(want)
    for mine, theirs in zip(got.outputs[0].segments, want[0].outputs[0].segments, strict=True):
        assert mine.reward == pytest.approx(theirs.reward, abs=1e-4)


def test_an_interrupted_launch_loses_no_output() -> None:
    one = engine(beside=True)
    drafter = one.loop.drafter
    assert isinstance(drafter, OnAThread)
    launch, calls = drafter.launch, iter(range(1000))

    def interrupted(*args: Any) -> Callable[[], Draft]:
        if next(calls) in (1, 2, 5):
            raise KeyboardInterrupt
        return launch(*args)

    drafter.launch = interrupted  # type: ignore[method-assign]
    for i, prompt in enumerate(PROMPTS):
        one.add_request(f"r{i}", prompt, dataclasses.replace(PARAMS, seed=i))
    interruptions, done = 0, {}
    while one.has_unfinished():
        try:
            done.update({o.request_id: o for o in one.step() if o.finished})
        except KeyboardInterrupt:
            interruptions += 1
            one.loop._scheduler.check()
    assert interruptions == 3
    assert decisions([done[f"r{i}"] for i in range(len(PROMPTS))]) == decisions(plain("stars"))


def test_a_draft_that_fails_is_drawn_again() -> None:
    one = engine(beside=True)
    drafter = one.loop.drafter
    assert isinstance(drafter, OnAThread)
    draft, calls = drafter.drafter.draft, iter(range(1000))

    def failing(*args: Any) -> Draft:
        if next(calls) in (1, 4):
            raise RuntimeError("the device is gone")
        return draft(*args)

    drafter.drafter.draft = failing
    for i, prompt in enumerate(PROMPTS):
        one.add_request(f"r{i}", prompt, dataclasses.replace(PARAMS, seed=i))
    failures, done = 0, {}
    while one.has_unfinished():
        try:
            done.update({o.request_id: o for o in one.step() if o.finished})
        except RuntimeError:
            failures += 1
            one.loop._scheduler.check()
    assert failures == 2
    want = plain("stars")
    assert decisions([done[f"r{i}"] for i in range(len(PROMPTS))]) == decisions(want)


def test_a_grammar_is_not_launched_ahead() -> None:
    """The host takes part in its steps, and outputs would wait for them."""
    one = engine(beside=True)
    drafter = one.loop.drafter
    assert isinstance(drafter, OnAThread)
    seen = []
    one.add_request("a", PROMPTS[0], dataclasses.replace(KINDS["regex"], seed=0))
    while one.has_unfinished():
        before = drafter.launched
        one.step()
        seen.append(drafter.launched - before)
    assert set(seen) == {1}


def test_by_an_async_engine() -> None:
    """Requests that come, go and are given up while rounds run."""

    async def ask(serving: AsyncEngine, i: int) -> RequestOutput | None:
        params = dataclasses.replace(PARAMS, seed=i % len(PROMPTS))
        last = None
        async for output in serving.generate(PROMPTS[i % len(PROMPTS)], params):
            last = output
            if i >= 21 and output.outputs[0].segments:
                break  # its caller leaves
        return last

    async def everyone(one: Engine) -> list[RequestOutput | None]:
        serving = AsyncEngine(one, max_running=5)
        try:
            return await asyncio.gather(*(ask(serving, i) for i in range(28)))
        finally:
            await serving.drain(0)

    one = engine(beside=True)
    got = asyncio.run(everyone(one))
    want = decisions(plain("stars"))
    whole = [output for output in got[:21] if output is not None]
    assert decisions(whole) == want * 3
    assert one.loop.before_plan is None
    assert one.stats()["pages_used"] == 0


def test_calls_wait_for_the_end_of_the_round() -> None:
    """They may run rounds of their own, and what those give is not what this one gave."""
    params = [dataclasses.replace(PASSING, seed=i, max_tokens=8) for i in range(2)]
    want = engine(draft_ahead=False).generate(PROMPTS[:2], params, use_tqdm=False)
    one = engine()
    calls: list[Future[list[RequestOutput]]] = []

    async def ask() -> list[RequestOutput]:
        serving = AsyncEngine(one)

        def work(called: BatchEngine) -> list[RequestOutput]:
            return called.generate(PROMPTS[1], params[1], use_tqdm=False)

        def call(_: Round) -> None:
            one.loop.on_round = None
            calls.append(serving.ask(work))

        one.loop.on_round = call
        try:
            return [output async for output in serving.generate(PROMPTS[0], params[0])]
        finally:
            await asyncio.wrap_future(calls[0])
            await serving.drain(0)

    outputs = asyncio.run(ask())
    assert decisions(outputs[-1:]) == decisions(want[:1])
    assert decisions(calls[0].result()) == decisions(want[1:])


def test_requests_wait_for_the_end_of_a_call() -> None:
    """One that comes while a call runs rounds of its own takes no part in them."""
    params = [dataclasses.replace(PASSING, seed=i) for i in range(2)]
    want = engine(draft_ahead=False).generate(PROMPTS[:2], params, use_tqdm=False)
    one = engine()

    async def ask() -> list[RequestOutput]:
        serving = AsyncEngine(one)
        came: list[Future[Any]] = []
        loop = asyncio.get_running_loop()

        def come(*_: object) -> None:
            if not came:
                came.append(asyncio.run_coroutine_threadsafe(last(), loop))
                deadline = time.monotonic() + 20
                while serving._commands.empty():  # until its prompt has been read
                    assert time.monotonic() < deadline
                    time.sleep(0.001)

        async def last() -> RequestOutput:
            return [output async for output in serving.generate(PROMPTS[0], params[0])][-1]

        def work(called: BatchEngine) -> list[RequestOutput]:
            return called.generate(PROMPTS[1], params[1], use_tqdm=False, on_output=come)

        try:
            own = await asyncio.wrap_future(serving.ask(work))
            return [await asyncio.wrap_future(came[0]), *own]
        finally:
            await serving.drain(0)

    assert decisions(asyncio.run(ask())) == decisions(want)


def test_not_with_scoring_that_overlaps() -> None:
    with pytest.raises(ValueError, match="draft_ahead must be False where scoring overlaps"):
        engine(overlap_scoring=True)


def test_captured_steps_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what their drafts took is by the device's own clock, on one that has events."""
    pytest.importorskip("triton", reason="Triton is for Linux only")

    class Event:
        def elapsed_time(self, _: Event) -> float:
            return 1.5  # milliseconds

    monkeypatch.setattr("stars_fast.drafting.captured._mark", lambda device: Event())
    model = tiny_lm("llama", num_hidden_layers=1).to(device_of("triton"))
    params = StarsParams(
        segment_length=1, max_tokens=2, method="vanilla", seed=0, temperature=1.0, top_k=0
    )
    found, seconds = [], []
    for ahead in (False, True):
        one = Engine(model, backend="triton", draft_ahead=ahead, num_pages=64, page_size=8)
        assert isinstance(one.loop.drafter, LaunchingDrafter)
        one.loop.on_round = lambda done: seconds.append(done.seconds["draft"])
        found.append(one.generate([[5, 6, 7], [8, 9]], params, use_tqdm=False))
    assert decisions(found[0]) == decisions(found[1])
    assert set(seconds) == {1.5e-3}


def test_rounds_are_not_recorded_late_without_it() -> None:
    """Off on a CPU, where a draft launched is a draft waited for."""
    one = engine(draft_ahead=None, beside=True)
    rounds: list[Round] = []
    one.loop.on_round = rounds.append
    one.add_request("a", PROMPTS[0], PARAMS)
    one.step()
    assert len(rounds) == 1
    assert one.loop.drafter.launched == 1  # type: ignore[attr-defined]
