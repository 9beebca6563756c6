"""`StarsLLM` over a stand-in of vLLM's engine: an asynchronous generator, or one batch a call."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("httpx", reason="needs httpx, of the extra remote")

from helpers import fake_vllm
from helpers.fake_vllm import LetterClient, LetterLLM
from helpers.letter_law import letter_engine, p_value, reward_model, stars_law

from stars_fast import StarsParams, demo
from stars_fast.engine.async_engine import AsyncEngine
from stars_fast.models.quantize import Int8Linear
from stars_fast.rewards import Persona
from stars_fast.vllm import StarsLLM
from stars_fast.vllm.options import PluginOptions

PROMPTS = ["ab", "ba", "bab"]
GREEDY = StarsParams(
    method="vanilla", temperature=0.0, top_k=0, segment_length=3, max_tokens=12, top_logprobs=3
)
STARS = StarsParams(
    segment_length=2,
    max_tokens=4,
    max_attempts=3,
    target_reward=0.5,
    alpha=0.7,
    beta=0.3,
    temperature=1.0,
    top_k=0,
)
BOTH = pytest.mark.parametrize("made", [LetterClient, LetterLLM], ids=["client", "llm"])


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch)


@contextmanager
def engine_on(llm: Any, **options: Any) -> Iterator[StarsLLM]:
    with StarsLLM(llm, reward_model, **options) as engine:
        yield engine


@BOTH
def test_greedy_segments_are_the_whole_response(made: Any) -> None:
    here = letter_engine().generate(PROMPTS, GREEDY, use_tqdm=False)
    with engine_on(made()) as engine:
        there = engine.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert engine.stats()["call_prompt_tokens"] > engine.stats()["call_cached_tokens"] > 0
    for one, other in zip(here, there, strict=True):
        assert other.error is None
        assert other.prompt_token_ids == one.prompt_token_ids
        (found,), (wanted,) = other.outputs, one.outputs
        assert found.token_ids == wanted.token_ids
        assert (found.text, found.finish_reason) == (wanted.text, wanted.finish_reason)
        assert found.segments == wanted.segments
        assert found.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)
        for likely, expected in zip(found.top_logprobs, wanted.top_logprobs, strict=True):
            assert list(likely) == list(expected)
            assert likely == pytest.approx(expected, abs=1e-5)


def test_matches_the_closed_form() -> None:
    with engine_on(LetterLLM()) as engine:
        outputs = engine.generate(["ab"] * 400, replace(STARS, candidates=2), use_tqdm=False)
    counts = Counter(tuple(output.outputs[0].token_ids) for output in outputs)
    assert p_value(counts, stars_law(STARS)) > 1e-3
    assert p_value(counts, stars_law(replace(STARS, max_attempts=1))) < 1e-3


def test_draws_depend_on_the_request_alone() -> None:
    with engine_on(LetterClient()) as one, engine_on(LetterLLM(), overlap_scoring=True) as other:
        params = replace(STARS, max_tokens=8, seed=5)
        first = one.generate(PROMPTS, params, use_tqdm=False)
        again = other.generate(PROMPTS[::-1], replace(params, candidates=3), use_tqdm=False)
    assert [o.outputs for o in again][::-1] == [o.outputs for o in first]


def test_what_vllm_is_asked_for() -> None:
    client = LetterClient()
    options = {"top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}
    params = replace(
        STARS, **options, stop_token_ids=[1], logit_bias={0: 1.5}, min_tokens=3, stop="zz"
    )
    with engine_on(client, logprobs=False, seed=None) as engine:
        (output,) = engine.generate("ab", replace(params, candidates=2), use_tqdm=False)
    assert output.outputs[0].logprobs == []
    with (
        engine_on(LetterLLM(), logprobs=False) as engine,
        pytest.raises(ValueError, match="must be 0"),
    ):
        engine.add_request("a", "ab", GREEDY)
    asked = vars(client.calls[0])
    assert options.items() <= asked.items()
    assert asked["stop_token_ids"] == [1]
    assert asked["logit_bias"] == {"0": 1.5}
    assert (asked["n"], asked["seed"], asked["max_tokens"], asked["min_tokens"]) == (2, None, 2, 2)
    assert asked["logprobs"] is None
    assert not asked["detokenize"]
    assert "stop" not in asked  # a stop text can lie across two segments


@BOTH
def test_a_request_that_fails_harms_no_neighbour(made: Any) -> None:
    with engine_on(made()) as engine:
        outputs = engine.generate(["ab", "cab", "ba"], STARS, use_tqdm=False)
        assert [output.error for output in outputs] == [
            None,
            "vllm: ValueError: no prompt may begin with c",
            None,
        ]
        alone = engine.generate(["ab", "cab", "ba"][::2], STARS, use_tqdm=False)
    assert all(output.outputs[0].token_ids for output in alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "args"}, "method must be one of .* with StarsLLM, got 'args'"),
        ({"segment_end": "clause"}, "segment_end must be 'length' with StarsLLM"),
        ({"guided": {"regex": "a+"}}, "guided must be None with StarsLLM"),
        ({"presence_penalty": 0.5}, "presence_penalty must be 0.0 with StarsLLM where"),
        ({"top_logprobs": 4}, "top_logprobs must be at most vLLM's max_logprobs, 3, got 4"),
        ({"max_tokens": 63}, "64"),
    ],
)
def test_parameters_that_cannot_be_had(options: dict[str, Any], message: str) -> None:
    needed = {"top_k": 0} if "method" in options else {"top_k": 0, "target_reward": 1.0}
    params = StarsParams(**needed | options)
    with engine_on(LetterLLM()) as engine, pytest.raises(ValueError, match=message):
        engine.add_request("a", "ab", params)


def test_constructor() -> None:
    for options, message in (
        ({"seed": -1}, "seed must be None or in"),
        ({"max_rows": 0}, "max_rows must be at least 1"),
        ({"reward_model": Persona("kind")}, "must not be a Persona"),
        ({"reward_timeout": 0}, "reward_timeout must be above 0"),
        ({"reward_quantize": "int4"}, "reward_quantize must be one of none, int8, got 'int4'"),
        ({"reward_quantize": "int8", "dtype": "bfloat16"}, "dtype must be 'auto' or 'float32' wi"),
        ({"loop": asyncio.new_event_loop()}, "loop must be None with a vllm.LLM"),
    ):
        with pytest.raises(ValueError, match=message):
            StarsLLM(LetterLLM(), **options)
        if "loop" in options:
            options["loop"].close()


def test_a_reward_model_with_8_bit_weights() -> None:
    options = PluginOptions(
        reward_model=str(demo.reward_model_dir()),
        reward_quantize="int8",
        params={"target_reward": 1.0},
        tokenizer=str(demo.model_dir()),
    )
    with StarsLLM(LetterLLM(), options.make_reward_model(), **options.engine_options()) as engine:
        scorer: Any = engine.loop.scorer
        assert any(isinstance(module, Int8Linear) for module in scorer.module.modules())


def test_chunked_prefill_on_a_cpu_is_refused() -> None:
    """It would end vLLM's engine, for all who use it."""
    with pytest.raises(ValueError, match="start it with --no-enable-chunked-prefill"):
        StarsLLM(LetterClient(vllm_config=fake_vllm.vllm_config("cpu")))
    StarsLLM(LetterClient(vllm_config=fake_vllm.vllm_config("cpu", chunked=False))).close()


def test_a_loop_of_its_own_ends_with_what_runs_on_it() -> None:
    """An `AsyncLLM` has a task there that reads outputs."""
    ended = threading.Event()

    class Reading(LetterClient):
        reader: asyncio.Task[None] | None = None

        async def read(self) -> None:
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()

        async def generate(self, *call: Any) -> AsyncIterator[Any]:
            self.reader = self.reader or asyncio.ensure_future(self.read())
            async for output in super().generate(*call):
                yield output

    with engine_on(Reading()) as engine:
        (output,) = engine.generate("ab", STARS, use_tqdm=False)
        assert output.error is None
        assert not ended.is_set()
    assert ended.is_set()
    engine.close()  # once more


def test_rounds_on_the_event_loop_of_the_engine_are_refused() -> None:
    async def run() -> None:
        with engine_on(LetterClient(), loop=asyncio.get_running_loop()) as engine:
            engine.add_request("a", "ab", STARS)
            with pytest.raises(RuntimeError, match="must not run on vLLM's event loop"):
                engine.step()
            engine.abort("a")

    asyncio.run(run())


def test_an_abort_reaches_the_engine() -> None:
    """Calls under way end at once; those of the neighbour go on."""

    async def run() -> None:
        client = LetterClient(hold=asyncio.Event())
        engine = AsyncEngine(StarsLLM(client, reward_model, loop=asyncio.get_running_loop()))
        assert client.hold is not None
        began, together = threading.Event(), threading.Event()
        waits = asyncio.ensure_future(engine.call(lambda _: (began.set(), together.wait())))
        while not began.is_set():
            await asyncio.sleep(0.001)
        stopped = engine.submit("ab", replace(STARS, candidates=2), request_id="stopped")
        left = engine.submit("ab", STARS, request_id="left")
        kept = engine.submit("ba", STARS, request_id="kept")
        while engine._commands.qsize() < 3:  # their prompts have been read
            await asyncio.sleep(0.001)
        together.set()
        await waits
        while len(client.calls) < 4:
            await asyncio.sleep(0.001)
        engine.abort("stopped")
        left.abort()
        while len(client.aborted) < 3:
            await asyncio.sleep(0.001)
        assert {name.split("-")[1] for name in client.aborted} == {"stopped", "left"}
        client.hold.set()
        (output,) = [output async for output in stopped]
        assert (output.error, output.outputs[0].finish_reason) == (None, "abort")
        assert [output async for output in left] == []
        outputs = [output async for output in kept]
        assert outputs[-1].outputs[0].finish_reason in ("stop", "length")
        await engine.drain(5)

    asyncio.run(run())


def test_a_drain_does_not_wait_for_long_drafts() -> None:
    async def run() -> None:
        client = LetterClient(hold=asyncio.Event())
        engine = AsyncEngine(StarsLLM(client, reward_model, loop=asyncio.get_running_loop()))
        stream = engine.submit("ab", STARS)
        while not client.calls:
            await asyncio.sleep(0.001)
        await engine.drain(0.01)
        assert [output.outputs[0].finish_reason async for output in stream] == ["abort"]

    asyncio.run(run())
