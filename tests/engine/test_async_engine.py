"""The engine for asyncio: streams, cancellation, limits, deadlines, draining."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers.gate import Gate
from helpers.outputs import same
from helpers.tiny_lm import letter_model, letter_tokenizer

from stars_fast import Engine, RequestOutput, StarsParams
from stars_fast.engine.async_engine import AsyncEngine
from stars_fast.engine.readers import LONG_TEXT, is_long
from stars_fast.engine.streams import Outbox, RequestStream
from stars_fast.errors import DeadlineError, EngineStoppedError, QueueFullError
from stars_fast.prompts import Prompt

PARAMS = StarsParams(
    segment_length=4,
    max_tokens=12,
    max_attempts=3,
    target_reward=0.5,
    temperature=1.0,
    top_k=0,
    seed=3,
    ignore_eos=True,
)
GUIDED = dataclasses.replace(PARAMS, guided={"regex": "[a-z]+"})
LONG = dataclasses.replace(PARAMS.with_method("vanilla"), max_tokens=80)


def new_engine(reward: Any = None) -> Engine:
    return Engine(
        letter_model(),
        reward or Gate(),
        tokenizer=letter_tokenizer(),
        num_pages=400,
        page_size=4,
        max_rows=8,
    )


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


@pytest.fixture
def make(gate: Gate) -> Iterator[Callable[..., AsyncEngine]]:
    made: list[AsyncEngine] = []

    def make(**options: Any) -> AsyncEngine:
        made.append(AsyncEngine(new_engine(gate), **options))
        return made[-1]

    yield make
    gate.open.set()
    for engine in made:
        engine.close(20)
        assert not engine._thread.is_alive()


async def collect(engine: AsyncEngine, *args: Any, **options: Any) -> list[RequestOutput]:
    return [output async for output in engine.generate(*args, **options)]


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def idle(engine: AsyncEngine) -> bool:
    stats = engine.stats()
    return stats["pages_used"] == 0 and engine.num_running == engine.num_waiting == 0


@pytest.mark.parametrize(
    ("tokens", "asked", "reader", "error"),
    [
        ([0, 1], PARAMS, False, ""),
        ([0, 600], PARAMS, False, "prompt token id 600"),
        ([0, 1], GUIDED, True, "ignore_eos must be False"),
    ],
    ids=["good", "bad", "grammar"],
)
def test_a_prompt_that_was_read_is_checked_where_it_comes_in(
    make: Callable[..., AsyncEngine],
    tokens: list[int],
    asked: StarsParams,
    reader: bool,
    error: str,
) -> None:
    async def main() -> None:
        engine = make()
        threads: list[str] = []
        check = engine.checked

        def noted(*args: Any) -> Prompt:
            threads.append(threading.current_thread().name)
            return check(*args)

        engine.checked = noted  # type: ignore[method-assign]
        stream = RequestStream("one", Prompt("ab", tokens), asked, lambda: None, None)
        engine.add(stream, check_here=True)
        found = ""
        try:
            assert [output async for output in stream][-1].finished
        except ValueError as refused:
            found = str(refused)
        assert found.startswith(error)
        assert bool(found) == bool(error)
        assert threads == ["stars-fast-reader" if reader else threading.current_thread().name]

    asyncio.run(main())


def test_outputs_are_those_of_the_engine(make: Callable[..., AsyncEngine]) -> None:
    seeds = range(6)
    each = [dataclasses.replace(PARAMS, seed=seed) for seed in seeds]
    expected = new_engine().generate(["ab"] * 6, each, use_tqdm=False)

    async def main() -> None:
        engine = make()
        seen = await asyncio.gather(*(collect(engine, "ab", params) for params in each))
        for outputs, whole in zip(seen, expected, strict=True):
            assert [len(output.outputs[0].segments) for output in outputs] == [1, 2, 3]
            assert [output.finished for output in outputs] == [False, False, True]
            assert same(outputs[-1].outputs[0], whole.outputs[0])
        await until(lambda: idle(engine))

    asyncio.run(main())


def test_a_prompt_is_read_once(
    make: Callable[..., AsyncEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, parsed = make(), []
    parse = engine._engine._reader._parse

    def counted(prompt: Any, max_tokens: int) -> Any:
        parsed.append(prompt)
        return parse(prompt, max_tokens)

    monkeypatch.setattr(engine._engine._reader, "_parse", counted)
    asyncio.run(collect(engine, "ab", PARAMS))
    assert parsed == ["ab"]


LONG_PROMPT = "b" * (LONG_TEXT + 1)


@pytest.fixture
def reading(
    make: Callable[..., AsyncEngine], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[AsyncEngine, Gate]]:
    """An engine, and a gate at which those who read long prompts wait."""
    engine, gate = make(), Gate()
    parse = engine._engine._reader._parse

    def slow(prompt: Any, max_tokens: int) -> Any:
        if prompt == LONG_PROMPT:
            gate([], [])
        if prompt == "cc":
            raise SystemExit(1)
        return parse(prompt, max_tokens)

    monkeypatch.setattr(engine._engine._reader, "_parse", slow)
    gate.open.clear()
    yield engine, gate
    gate.open.set()


def test_rounds_go_on_while_a_long_prompt_is_read(reading: tuple[AsyncEngine, Gate]) -> None:
    async def main() -> None:
        engine, gate = reading
        long = asyncio.create_task(collect(engine, LONG_PROMPT, PARAMS))
        await until(lambda: gate.calls)
        assert await engine.call(lambda e: e.max_rows) == 8
        with pytest.raises(RuntimeError, match="SystemExit: 1"):
            await collect(engine, "cc", PARAMS)
        assert await engine.read(lambda reader: reader.read("ab", 0).text, "ab") == "ab"
        started: list[str] = []
        add = engine._engine.add_request

        def noted(name: str, *rest: Any) -> None:
            started.append(name)
            add(name, *rest)

        engine._engine.add_request = noted  # type: ignore[method-assign]
        names = [f"short-{i}" for i in range(12)]
        done = await asyncio.gather(
            *(collect(engine, "ab", PARAMS, request_id=name) for name in names)
        )
        assert all(outputs[-1].finished for outputs in done)
        assert started == names
        assert not long.done()
        assert engine.num_waiting == 1
        gate.open.set()
        with pytest.raises(ValueError, match="does not fit"):
            await long
        await until(lambda: idle(engine))

    asyncio.run(main())


@pytest.mark.parametrize("how", ["abort", "leave", "deadline", "drain", "stuck"])
def test_who_leaves_while_the_prompt_is_read(reading: tuple[AsyncEngine, Gate], how: str) -> None:
    async def main() -> None:
        engine, gate = reading
        streams = [
            engine.submit(
                LONG_PROMPT, PARAMS, request_id=name, timeout=0.2 if how == "deadline" else None
            )
            for name in ("one", "two")
        ]
        await until(lambda: gate.calls)
        if how == "stuck":
            engine._stuck_after = 1e-3
            await until(lambda: not engine.healthy)
            engine._stuck_after = None
        if how == "drain":
            draining = asyncio.create_task(engine.drain(0.01))
        for stream in streams:
            if how in ("leave", "stuck"):
                stream.abort()
                continue
            if how == "abort":
                engine.abort(stream.request_id)
            if how == "deadline":
                with pytest.raises(DeadlineError):
                    await stream.admitted()
                continue
            assert await stream.admitted() == 0
            (output,) = [output async for output in stream]
            assert output.outputs[0].finish_reason == "abort"
        if how == "drain":
            await draining
        else:
            await until(lambda: idle(engine))
            # Its id may be used again, and what is still read is not taken for that.
            gate.open.set()
            assert (await collect(engine, "ab", PARAMS, request_id="one"))[-1].finished
            await until(lambda: idle(engine))
        assert gate.calls == 1  # nobody reads for who has left

    asyncio.run(main())


@pytest.mark.parametrize(
    ("prompt", "long"),
    [
        ("a" * LONG_TEXT, False),
        ("a" * (LONG_TEXT + 1), True),
        ([1] * (LONG_TEXT + 1), True),
        ([{"role": "user", "content": "a" * LONG_TEXT}], True),
        ({"messages": [{"role": "user", "content": [{"text": "a" * 100}]}]}, False),
        (b"a", False),
        (None, False),
        ([], False),
    ],
)
def test_long_prompts(prompt: Any, long: bool) -> None:
    assert is_long(prompt) == long


@pytest.mark.parametrize("how", ["cancel", "break", "abort"])
def test_who_leaves_frees_the_pages(make: Callable[..., AsyncEngine], how: str) -> None:
    async def main() -> None:
        engine = make()
        begun = asyncio.Event()
        seen: list[RequestOutput] = []

        async def read() -> None:
            async for output in engine.generate("ab", LONG, request_id="one"):
                seen.append(output)
                begun.set()
                if how == "break":
                    break

        task = asyncio.create_task(read())
        await begun.wait()
        if how == "cancel":
            task.cancel()
        if how == "abort":
            engine.abort("one")
        await asyncio.wait([task])
        assert task.cancelled() == (how == "cancel")
        if how == "abort":
            assert seen[-1].finished
            assert seen[-1].outputs[0].finish_reason == "abort"
        await until(lambda: idle(engine))
        assert len(seen[-1].outputs[0].token_ids) < 80
        # The engine goes on.
        assert (await collect(engine, "ab", PARAMS))[-1].finished

    asyncio.run(main())


def test_an_id_that_is_used_again_is_not_taken_for_the_old_request(
    make: Callable[..., AsyncEngine],
) -> None:
    async def main() -> None:
        engine = make()
        old = engine.submit("ab", PARAMS, request_id="one")
        await old.admitted()
        with pytest.raises(ValueError, match="'one' is in use"):
            engine.submit("ab", PARAMS, request_id="one")
        while engine.num_running:  # blocks on purpose: nothing is delivered yet
            time.sleep(0.005)
        new = engine.submit("ab", LONG, request_id="one")
        old.abort()
        outputs = [output async for output in new]
        assert outputs[-1].outputs[0].finish_reason == "length"

    asyncio.run(main())


def test_queue_full(make: Callable[..., AsyncEngine], gate: Gate) -> None:
    async def main() -> None:
        engine = make(max_running=2, max_waiting=1)
        gate.open.clear()
        streams = [engine.submit("ab", PARAMS) for _ in range(3)]
        with pytest.raises(QueueFullError, match="queue full: 2 requests run and 1 wait"):
            engine.submit("ab", PARAMS)
        with pytest.raises(QueueFullError):
            await collect(engine, "ab", PARAMS)
        gate.open.set()
        for stream in streams:
            assert [output async for output in stream][-1].finished
        await until(lambda: idle(engine))
        assert (await collect(engine, "ab", PARAMS))[-1].finished

    asyncio.run(main())


def test_a_waiting_request_can_leave(make: Callable[..., AsyncEngine], gate: Gate) -> None:
    async def main() -> None:
        engine = make(max_running=1, max_waiting=2)
        first = engine.submit("ab", PARAMS)
        await first.admitted()
        gate.open.clear()
        left = engine.submit("ab", PARAMS)
        named = engine.submit("ab", PARAMS, request_id="named")
        await until(lambda: engine._commands.qsize() == 2)  # both prompts have been read
        left.abort()
        engine.abort("named")
        gate.open.set()
        assert [output async for output in left] == []
        (only,) = [output async for output in named]
        assert only.finished
        assert (only.prompt, only.prompt_token_ids) == ("ab", letter_tokenizer()("ab")["input_ids"])
        assert only.outputs[0].finish_reason == "abort"
        assert [output async for output in first][-1].outputs[0].finish_reason == "length"
        await until(lambda: idle(engine))

    asyncio.run(main())


def test_deadline(make: Callable[..., AsyncEngine], gate: Gate) -> None:
    async def main() -> None:
        engine = make()
        params = dataclasses.replace(PARAMS, max_tokens=400)
        gate.open.clear()
        begun = time.monotonic()
        with pytest.raises(DeadlineError, match=r"not finished within 0\.05 s"):
            await collect(engine, "ab", params, timeout=0.05)
        assert time.monotonic() - begun < 10  # though the round has not ended
        gate.open.set()
        await until(lambda: idle(engine))
        assert gate.calls < 20
        assert (await collect(engine, "ab", PARAMS, timeout=20))[-1].finished

    asyncio.run(main())


def test_the_event_loop_is_not_held_up(make: Callable[..., AsyncEngine], gate: Gate) -> None:
    async def main() -> None:
        engine = make()
        gate.open.clear()
        task = asyncio.create_task(collect(engine, "ab", PARAMS))
        await until(lambda: gate.calls)
        for _ in range(5):  # a round is under way
            engine.submit("ab", PARAMS).abort()
            engine.stats()
            await asyncio.sleep(0)
        assert not task.done()
        gate.open.set()
        assert (await task)[-1].finished

    asyncio.run(main())


def test_refused_requests_harm_no_other(make: Callable[..., AsyncEngine]) -> None:
    async def main() -> None:
        engine = make(max_prompt_tokens=5)
        bad = [
            ("ab", dataclasses.replace(PARAMS, stop_token_ids=[99]), "stop_token_ids must be in"),
            ("", PARAMS, "prompt is empty"),
            ("ababab", PARAMS, "prompt has 6 tokens, more than the 5 allowed"),
            ("ab", dataclasses.replace(PARAMS, max_tokens=1000), "does not fit"),
            ("ab", dataclasses.replace(PARAMS, target_reward="auto"), "calibrate first"),
        ]
        good = asyncio.create_task(collect(engine, "ab", PARAMS))
        for prompt, params, message in bad:
            with pytest.raises(ValueError, match=message):
                await collect(engine, prompt, params)
            with pytest.raises(ValueError, match=message):
                await engine.submit(prompt, params).admitted()
        assert await engine.submit("ab", PARAMS).admitted() == 2
        assert (await good)[-1].finished
        assert engine.healthy

    asyncio.run(main())


def test_a_failing_reward_ends_its_own_request(make: Callable[..., AsyncEngine]) -> None:
    async def main() -> None:
        engine = make()
        good, bad = await asyncio.gather(
            collect(engine, "ab", PARAMS), collect(engine, "cb", PARAMS)
        )
        assert good[-1].error is None
        assert len(good[-1].outputs[0].token_ids) == 12
        assert "no reward for c" in (bad[-1].error or "")
        assert bad[-1].finished

    asyncio.run(main())


def test_a_round_that_raises_once_is_run_again(
    make: Callable[..., AsyncEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        engine = make()
        step, raised = engine._engine.step, []

        def fail_once() -> list[RequestOutput]:
            if not raised:
                raised.append(1)
                raise RuntimeError("out of memory")
            return step()

        monkeypatch.setattr(engine._engine, "step", fail_once)
        assert (await collect(engine, "ab", PARAMS))[-1].error is None
        assert engine.healthy

        def fail() -> list[RequestOutput]:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(engine._engine, "step", fail)
        for _ in range(2):
            (output,) = await collect(engine, "ab", PARAMS)
            assert output.error == "the round failed: RuntimeError: out of memory"
            assert output.outputs[0].finish_reason == "error"
        assert not engine.healthy

    asyncio.run(main())


def test_a_thread_that_dies_leaves_nobody_waiting(
    make: Callable[..., AsyncEngine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        engine, told = make(), threading.Event()
        engine.call_when_ended(told.set)
        assert engine.failure is None

        def fault(*_: object) -> None:
            raise SystemExit(3)

        monkeypatch.setattr(engine, "_pass_on", fault)
        with pytest.raises(EngineStoppedError, match="has stopped: SystemExit: 3"):
            await collect(engine, "ab", PARAMS)
        assert not engine.accepting
        with pytest.raises(EngineStoppedError):
            engine.submit("ab", PARAMS)
        await until(lambda: not engine.healthy)
        assert told.is_set()
        assert isinstance(engine.failure, SystemExit)

    asyncio.run(main())
    (record,) = [r for r in caplog.records if r.levelname == "CRITICAL"]
    assert record.getMessage() == "the engine has stopped: SystemExit: 3"
    assert record.exc_info


def test_a_round_that_is_stuck_is_not_healthy(make: Callable[..., AsyncEngine], gate: Gate) -> None:
    async def main() -> None:
        patient, engine = make(stuck_after=None), make(stuck_after=0.05)
        gate.open.clear()
        tasks = [asyncio.create_task(collect(e, "ab", PARAMS)) for e in (patient, engine)]
        await until(lambda: not engine.healthy)
        assert patient.healthy
        gate.open.set()
        await asyncio.gather(*tasks)
        await until(lambda: engine.healthy)

    asyncio.run(main())
    with pytest.raises(ValueError, match="stuck_after must be above 0 or None, got 0"):
        make(stuck_after=0)


def test_a_fork_says_that_its_engine_is_dead(make: Callable[..., AsyncEngine]) -> None:
    async def in_the_fork() -> None:
        with pytest.raises(EngineStoppedError, match=rf"process {os.getpid()} was forked"):
            engine.submit("ab", PARAMS)
        assert not engine.healthy
        assert not engine.accepting
        await engine.drain()
        engine.close()

    engine = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks where there are threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            asyncio.run(in_the_fork())
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_drain_finishes_what_is_under_way(make: Callable[..., AsyncEngine], gate: Gate) -> None:
    async def main() -> None:
        engine = make(max_running=1)
        gate.open.clear()
        tasks = [asyncio.create_task(collect(engine, "ab", PARAMS)) for _ in range(3)]
        await until(lambda: engine.num_waiting == 2)
        drained = asyncio.create_task(engine.drain())
        await until(lambda: not engine.accepting)
        with pytest.raises(EngineStoppedError, match="takes no requests"):
            engine.submit("ab", PARAMS)
        gate.open.set()
        await drained
        for outputs in await asyncio.gather(*tasks):
            assert outputs[-1].outputs[0].finish_reason == "length"

    asyncio.run(main())


def test_drain_aborts_what_takes_too_long(make: Callable[..., AsyncEngine], gate: Gate) -> None:
    async def main() -> None:
        engine = make(max_running=1)
        gate.open.clear()
        tasks = [asyncio.create_task(collect(engine, "ab", PARAMS)) for _ in range(2)]
        await until(lambda: gate.calls)
        asyncio.get_running_loop().call_later(0.1, gate.open.set)
        await engine.drain(0.01)
        for outputs in await asyncio.gather(*tasks):
            assert outputs[-1].outputs[0].finish_reason == "abort"

    asyncio.run(main())


def test_a_slow_reader_gets_all_of_the_text(make: Callable[..., AsyncEngine]) -> None:
    async def main() -> None:
        engine = make()
        params = dataclasses.replace(LONG, segment_length=1)
        stream = engine.submit("ab", params)
        await until(lambda: stream._ended)
        outputs = [output async for output in stream]
        assert len(outputs) <= 64
        assert len(outputs[-1].outputs[0].token_ids) == 80
        counts = [len(output.outputs[0].token_ids) for output in outputs]
        assert counts == sorted(counts)

    asyncio.run(main())


def test_an_event_loop_that_is_gone_ends_its_requests(make: Callable[..., AsyncEngine]) -> None:
    engine = make()
    streams: list[RequestStream] = []

    async def leave() -> None:
        streams.append(engine.submit("ab", LONG))
        await streams[0].admitted()

    asyncio.run(leave())
    deadline = time.monotonic() + 20
    while not idle(engine):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_event_loops_are_woken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what fails for one request keeps nothing from the others."""
    wakes: list[object] = []
    seen: list[object] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe

        def counted(call: Callable[..., object], *arguments: Any) -> asyncio.Handle:
            wakes.append(call)
            return wake(call, *arguments)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        loop.set_exception_handler(lambda _, context: seen.append(type(context["exception"])))
        streams = [RequestStream(str(i), "ab", PARAMS, lambda: None, None) for i in range(3)]
        outbox = Outbox()
        for number, stream in enumerate(streams):
            outbox.put(stream, lambda number=number: seen.append(1 // number))
        assert outbox.send() == outbox.send() == []
        await until(lambda: len(seen) == 3)

    asyncio.run(main())
    assert seen == [ZeroDivisionError, 1, 0]
    assert len(wakes) == 1


def test_costs_of_requests_add_up_to_those_of_the_engine() -> None:
    engine = Engine.demo(num_pages=400)
    params = StarsParams(segment_length=8, max_tokens=24, target_reward=1.0, beta=0.3)
    each = [
        params,
        dataclasses.replace(params, candidates=3, n=2),
        params.with_method("best_of_n", candidates=3),
        params.with_method("smc", candidates=3),
        params.with_method("vanilla"),
    ]
    outputs = engine.generate(["The film", "The kettle", "A", "B", "C"], each, use_tqdm=False)
    stats = engine.stats()
    assert sum(output.drafted_tokens for output in outputs) == stats["drafted_tokens"]
    assert sum(output.rm_tokens for output in outputs) == stats["rm_tokens"]
    assert all(output.drafted_tokens > 0 for output in outputs)
    assert [output.rm_tokens > 0 for output in outputs] == [True] * 4 + [False]


@pytest.mark.parametrize(
    ("name", "value"), [("max_running", 0), ("max_waiting", -1), ("max_prompt_tokens", 0)]
)
def test_limits_are_checked(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=name):
        AsyncEngine(new_engine(), **{name: value})
