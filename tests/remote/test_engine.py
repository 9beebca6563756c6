"""`RemoteEngine` against our own server: what it accepts, what it refuses, what it reports."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("httpx", reason="needs httpx, of the extra remote")

from helpers.json_server import Answer, json_server
from helpers.letter_law import EOS, letter_engine, reward_of

from stars_fast import RemoteEngine, StarsParams, _core, demo
from stars_fast.engine.async_engine import AsyncEngine
from stars_fast.engine.base import BaseEngine
from stars_fast.models.quantize import Int8Linear
from stars_fast.remote import RemoteError
from stars_fast.rewards import Persona

BOTH = pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "text"])
PROMPTS = ["ab", "ba", "cab"]
PARAMS = StarsParams(
    segment_length=3,
    max_tokens=10,
    max_attempts=4,
    target_reward=1.0,
    alpha=0.3,
    beta=0.2,
    temperature=1.0,
    top_k=0,
    seed=5,
)


@BOTH
def test_greedy_segments_are_the_whole_response(connect: Any, tokens: bool) -> None:
    params = StarsParams(
        method="vanilla", temperature=0.0, top_k=0, max_tokens=12, segment_length=3
    )
    here = letter_engine().generate(PROMPTS, params, use_tqdm=False)
    there = connect(tokens=tokens).generate(PROMPTS, params, use_tqdm=False)
    for one, other in zip(here, there, strict=True):
        assert other.error is None
        assert other.outputs[0].text == one.outputs[0].text
        assert other.outputs[0].finish_reason == one.outputs[0].finish_reason
        assert other.outputs[0].segments == one.outputs[0].segments
        assert other.outputs[0].token_ids == (one.outputs[0].token_ids if tokens else [])
        assert other.prompt_token_ids == (one.prompt_token_ids if tokens else [])
        assert other.outputs[0].logprobs == []


@BOTH
@pytest.mark.parametrize("acceptance", ["soft", "hard"])
def test_segments_report_rewards_and_thresholds(
    connect: Any, tokens: bool, acceptance: Any
) -> None:
    params = replace(PARAMS, acceptance=acceptance)
    schedule = _core.Schedule(
        target_reward=1.0, alpha=0.3, beta=0.2, max_tokens=10, hard=acceptance == "hard"
    )
    outputs = connect(tokens=tokens).generate(PROMPTS, params, use_tqdm=False)
    tests = 0
    for output in outputs:
        (completion,) = output.outputs
        ended = completion.finish_reason == "stop"
        ends = [segment.end for segment in completion.segments]
        assert ends[-1] == len(completion.text) + ended == (ends[-1] if ended else 10)
        assert ends[:-1] == list(range(3, ends[-1], 3))
        for at, segment in enumerate(completion.segments):
            assert segment.reward == reward_of(completion.text[: segment.end])
            tau = schedule.threshold(reward_of(""), segment.end)
            assert segment.threshold == pytest.approx(tau, abs=1e-12)
            if segment.accepted == "test":
                number = segment.attempts - 1
                uniform = _core.accept_uniform(5, segment.start, number, at)
                assert schedule.accepts(segment.reward, segment.threshold, uniform)
                tests += 1
            else:
                assert segment.attempts == 4
        assert completion.reward == reward_of(completion.text)
        assert output.drafted_tokens >= ends[-1]
    assert tests


@BOTH
def test_draws_depend_on_the_request_alone(connect: Any, tokens: bool) -> None:
    first = connect(tokens=tokens).generate(PROMPTS, PARAMS, use_tqdm=False)
    again = connect(tokens=tokens, max_concurrency=1, overlap_scoring=False).generate(
        PROMPTS[::-1], replace(PARAMS, candidates=4), use_tqdm=False
    )
    shown = [(output.prompt, output.outputs[0].text) for output in first]
    assert [(output.prompt, output.outputs[0].text) for output in again][::-1] == shown
    assert [o.outputs[0].segments for o in again][::-1] == [o.outputs[0].segments for o in first]


@BOTH
@pytest.mark.parametrize(
    "options",
    [
        {"method": "best_of_n", "candidates": 3},
        {"method": "smc", "candidates": 3, "segment_length": 3},
        {"method": "speculative_rejection", "candidates": 4, "segment_length": 3},
        {"method": "rejection", "target_reward": 1.0, "max_attempts": 3},
        {"acceptance": "gibbs", "candidates": 3, "segment_length": 3},
    ],
    ids=lambda options: str(options.get("method", "gibbs")),
)
def test_other_methods(connect: Any, tokens: bool, options: dict[str, Any]) -> None:
    params = StarsParams(max_tokens=8, top_k=0, temperature=1.0, seed=2, n=2, **options)
    engine = connect(tokens=tokens)
    for output in engine.generate(PROMPTS, params, use_tqdm=False):
        assert output.error is None
        assert len(output.outputs) == 2
        for completion in output.outputs:
            assert completion.reward == reward_of(completion.text)
            if tokens:
                assert engine.tokenizer.decode(completion.token_ids).strip("$") == completion.text
    if not tokens:  # nothing is left of requests that are over
        assert engine._history.texts._texts == {}


def test_without_a_seed_one_call_draws_all_candidates(connect: Any) -> None:
    params = replace(PARAMS, acceptance="gibbs", alpha=0.5, target_reward=None, max_attempts=20)
    params = replace(params, candidates=4, max_tokens=6, seed=None, ignore_eos=True)
    shared, apart = connect(tokens=True, seed=None), connect(tokens=True)
    for engine, calls in ((shared, 2), (apart, 8)):
        before = engine.stats()["http_calls"]
        (output,) = engine.generate("ab", params, use_tqdm=False)
        assert output.error is None
        assert engine.stats()["http_calls"] - before == calls
        assert output.drafted_tokens == 24


def test_ids_of_special_tokens_are_kept(connect: Any) -> None:
    """An end that is ignored has no text, and goes on as a token."""
    params = replace(PARAMS, ignore_eos=True, trace=True)
    outputs = connect(tokens=True).generate(PROMPTS, params, use_tqdm=False)
    ids = [output.outputs[0].token_ids for output in outputs]
    assert all(len(one) == 10 for one in ids)
    assert any(EOS in one[:-1] for one in ids)
    segments = [segment for output in outputs for segment in output.outputs[0].segments]
    assert any(segment.rejected for segment in segments)
    assert all(len(segment.rejected) == segment.attempts - 1 for segment in segments)


@BOTH
def test_stop_texts(connect: Any, tokens: bool) -> None:
    params = StarsParams(
        method="vanilla", temperature=0.0, top_k=0, max_tokens=12, segment_length=3
    )
    engine = connect(tokens=tokens)
    (whole,) = engine.generate("ab", params, use_tqdm=False)
    text = whole.outputs[0].text
    stop = text[2:4]  # begins in the first segment and ends in the second
    (output,) = engine.generate("ab", replace(params, stop=stop), use_tqdm=False)
    assert output.outputs[0].text == text[: text.index(stop)]
    assert output.outputs[0].finish_reason == "stop"


@BOTH
def test_calibration_and_scores(connect: Any, tokens: bool) -> None:
    engine = connect(tokens=tokens)
    params = replace(PARAMS, target_reward="auto", calibrate_prefixes=True)
    calibration = engine.calibrate(PROMPTS, samples_per_prompt=4, params=params, use_tqdm=False)
    assert len(calibration.rewards) == 12
    (output,) = engine.generate("ab", params, use_tqdm=False)
    assert output.error is None
    assert output.outputs[0].segments[-1].threshold <= calibration.target_reward
    assert engine.score("ab", ["cab"]) == [reward_of("cab")]
    engine.calibrate_on_requests(share=1.0)
    (output,) = engine.generate("ab", replace(params, calibrate_prefixes=False), use_tqdm=False)
    assert output.error is None
    assert output.target_reward == engine.calibration.target_reward
    assert len(engine.calibration.rewards) == 4


@BOTH
def test_streams(connect: Any, tokens: bool) -> None:
    params = StarsParams(
        method="vanilla", temperature=0.0, top_k=0, segment_length=3, max_tokens=12
    )
    (wanted,) = connect(tokens=tokens).generate("ab", params, use_tqdm=False)

    async def stream(engine: RemoteEngine) -> list[str]:
        running = AsyncEngine(engine)
        texts = [o.outputs[0].text async for o in running.generate("ab", params)]
        running.close(10)
        return texts

    texts = asyncio.run(stream(connect(tokens=tokens)))
    assert len(texts) == len(wanted.outputs[0].segments) > 1
    assert all(len(text) == 3 * (i + 1) for i, text in enumerate(texts[:-1]))
    assert texts[-1] == wanted.outputs[0].text


@BOTH
def test_an_abort_keeps_what_was_accepted(connect: Any, tokens: bool) -> None:
    engine = connect(tokens=tokens)
    params = StarsParams(
        method="vanilla", temperature=0.0, top_k=0, segment_length=3, max_tokens=12
    )
    (whole,) = engine.generate("ab", params, use_tqdm=False)
    engine.add_request("a", "ab", params)
    while not engine.step():
        pass
    output = engine.abort("a")
    assert output is not None
    assert output.outputs[0].finish_reason == "abort"
    assert output.outputs[0].text == whole.outputs[0].text[:3]
    assert output.outputs[0].token_ids == whole.outputs[0].token_ids[:3]
    assert not engine.has_unfinished()


@BOTH
def test_a_request_that_fails_harms_no_neighbour(connect: Any, tokens: bool) -> None:
    """The server's context is 512 tokens."""
    engine = connect(tokens=tokens)
    prompts = ["ab", "a" * 600, "cab"]
    good, failed, other = engine.generate(prompts, PARAMS, use_tqdm=False)
    assert failed.error is not None
    assert "status 400" in failed.error
    assert "context of 512 tokens" in failed.error
    assert failed.finished
    alone = engine.generate([prompts[0], prompts[2]], PARAMS, use_tqdm=False)
    assert [good.outputs, other.outputs] == [output.outputs for output in alone]


def test_a_server_that_goes_away(connect: Any) -> None:
    class Fleeting:
        """Answers one call."""

        calls = 0

        def __call__(self, path: str, body: Any, headers: dict[str, str]) -> Answer:
            self.calls += 1
            if self.calls > 1:
                return 503, {"Retry-After": "0"}, {"detail": "gone"}
            choice = {"index": 0, "text": "abc", "finish_reason": "length"}
            return 200, {}, {"choices": [choice], "usage": {"completion_tokens": 3}}

    params = StarsParams(method="vanilla", segment_length=3, max_tokens=9)
    with (
        json_server(Fleeting()) as url,
        RemoteEngine(url, "m", server="vllm", retries=1) as engine,
    ):
        (output,) = engine.generate("ab", params, use_tqdm=False)
    assert output.error is not None
    assert "status 503: gone (2 times)" in output.error
    assert output.outputs[0].text == "abc"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"choices": []}, "returned 0 choices for n=1"),
        ({"error": "busy"}, "returned no choices for n=1"),
        ([], "returned \\[\\] where a completion was due"),
        ({"choices": [{"text": None}]}, "None where a choice's text was due"),
        ({"choices": [{"text": "a", "finish_reason": "abort"}]}, "with finish_reason 'abort'"),
        ({"choices": [{"text": "a", "finish_reason": "stop"}]}, "how many tokens it drew"),
    ],
)
def test_answers_that_are_no_completions(answer: Any, message: str) -> None:
    params = StarsParams(method="vanilla", segment_length=3, max_tokens=9)
    with (
        json_server(lambda *_: (200, {}, answer)) as url,
        RemoteEngine(url, "m", server="vllm") as engine,
    ):
        (output,) = engine.generate("ab", params, use_tqdm=False)
    assert output.error is not None
    assert re.search(message, output.error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "cards", "target_reward": 1.0}, "method must be one of 'stars', 'vanilla'"),
        ({"method": "args"}, "method must be one of"),
        ({"method": "mara"}, "method must be one of"),
        ({"segment_end": "clause", "target_reward": 1.0}, "segment_end must be 'length'"),
        ({"trace": True, "target_reward": 1.0}, "trace needs token ids"),
        ({"ignore_eos": True, "target_reward": 1.0}, "ignore_eos needs token ids"),
        ({"presence_penalty": 0.5, "target_reward": 1.0}, "presence_penalty must be 0.0 with Rem"),
        ({"frequency_penalty": 0.5, "target_reward": 1.0}, "frequency_penalty .* several calls"),
        ({"guided": {"regex": "a+"}, "target_reward": 1.0}, "guided must be None with RemoteEng"),
        ({}, "needs Engine.calibrate first"),
    ],
)
def test_parameters_that_cannot_be_had(connect: Any, options: dict[str, Any], message: str) -> None:
    engine = connect(tokens=False)
    with pytest.raises(ValueError, match=message):
        engine.add_request("a", "ab", StarsParams(**options))
    assert not engine.has_unfinished()


def test_penalties_are_for_responses_of_one_call(connect: Any) -> None:
    for params in (
        StarsParams(method="rejection", target_reward=0.0, top_k=0, presence_penalty=0.5),
        StarsParams(method="vanilla", segment_length=9, max_tokens=9, top_k=0, frequency_penalty=1),
    ):
        (output,) = connect(tokens=False).generate("ab", params, use_tqdm=False)
        assert output.error is None


@pytest.mark.parametrize("prompt", ["", [0, 1], [{"role": "user", "content": "ab"}]])
def test_prompts_that_need_a_tokenizer(connect: Any, prompt: Any) -> None:
    with pytest.raises(ValueError, match="prompt"):
        connect(tokens=False).add_request("a", prompt, PARAMS)


def test_constructor(letters: Any) -> None:
    url = f"{letters.url}/v1"
    with pytest.raises(ValueError, match="seed must be None or in"):
        RemoteEngine(url, seed=-1)
    with pytest.raises(ValueError, match="max_rows must be at least 1"):
        RemoteEngine(url, max_rows=0)
    with pytest.raises(ValueError, match="reward_quantize must be one of none, int8, got 'int4'"):
        RemoteEngine(url, reward_quantize="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must not be a Persona"):
        RemoteEngine(url, reward_model=Persona("kind"))
    with pytest.raises(ValueError, match="server must be 'auto' or one of"):
        RemoteEngine(url, server="tgi")
    with pytest.raises(RemoteError, match="404"):
        RemoteEngine(letters.url + "/v2")
    rewards = str(demo.reward_model_dir())
    with RemoteEngine(url, reward_model=rewards, reward_quantize="int8") as engine:
        scorer: Any = engine.loop.scorer
        assert any(isinstance(module, Int8Linear) for module in scorer.module.modules())
    with RemoteEngine(url) as engine:
        assert engine.model_name == "letters"
        assert isinstance(engine, BaseEngine)
        with pytest.raises(ValueError, match="needs a reward model"):
            engine.add_request("a", "ab", PARAMS)
