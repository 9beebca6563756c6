"""The HTTP server, with OpenAI's own client and without it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import logging
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.tiny_lm import LETTERS, letter_model, letter_tokenizer, small_model
from helpers.tiny_tokenizers import bpe_tokenizer

from stars_fast import Engine, Reward, StarsParams

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx", "openai"):
    pytest.importorskip(package, reason=f"needs {package}, of the extras server and test")

import httpx  # noqa: E402
import openai  # noqa: E402
from helpers.serving import PARAMS, Gate, Served, letter_engine, serving, until  # noqa: E402

from stars_fast.server import ServerSettings  # noqa: E402

VANILLA: dict[str, Any] = {"method": "vanilla"}


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    """A server that the tests leave as they found it, with its front in a process of its own."""
    gate = Gate()
    with serving(letter_engine(gate), gate, front=True) as served:
        yield served


def whole(params: StarsParams, prompt: Any = "ab") -> Any:
    """What the engine itself returns."""
    (output,) = letter_engine(Gate()).generate(prompt, params, use_tqdm=False)
    assert output.error is None
    return output


class TestCompletions:
    def test_whole(self, shared: Served) -> None:
        expected = whole(dataclasses.replace(PARAMS, seed=7, n=2))
        response = shared.client().completions.create(model="letters", prompt="ab", seed=7, n=2)
        assert [c.text for c in response.choices] == [o.text for o in expected.outputs]
        assert [c.index for c in response.choices] == [0, 1]
        assert {c.finish_reason for c in response.choices} == {"length"}
        assert response.model == "letters"
        assert response.object == "text_completion"
        for choice, output in zip(response.choices, expected.outputs, strict=True):
            assert choice.stars["reward"] == output.reward  # type: ignore[attr-defined]
            segments = choice.stars["segments"]  # type: ignore[attr-defined]
            assert [s["attempts"] for s in segments] == [s.attempts for s in output.segments]
        usage: Any = response.usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (2, 24, 26)
        attempts = sum(s.attempts for o in expected.outputs for s in o.segments)
        assert usage.discarded_tokens >= 4 * attempts - 24
        assert usage.rm_tokens == 0  # a function

    def test_streamed(self, shared: Served) -> None:
        expected = whole(dataclasses.replace(PARAMS, seed=7, n=2))
        stream = shared.client().completions.create(
            model="letters", prompt="ab", seed=7, n=2, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        texts, reasons, segments, usage = ["", ""], [None, None], [0, 0], None
        for chunk in stream:
            usage = chunk.usage
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                reasons[choice.index] = choice.finish_reason  # type: ignore[call-overload]
                found = choice.stars["segments"]  # type: ignore[attr-defined]
                segments[choice.index] += len(found)
                assert len(choice.text) <= sum(s["end"] - s["start"] for s in found)
        assert texts == [output.text for output in expected.outputs]
        assert reasons == ["length", "length"]
        assert segments == [3, 3]
        assert usage is not None
        assert usage.completion_tokens == 24

    def test_prompts_of_every_form(self, shared: Served) -> None:
        client = shared.client()
        forms: list[tuple[Any, list[Any]]] = [
            ([0, 1], ["ab"]),
            (["ab", "ba"], ["ab", "ba"]),
            ([[0, 1], [1, 0, 2]], ["ab", "bac"]),
        ]
        for prompt, texts in forms:
            response = client.completions.create(
                model="letters", prompt=prompt, seed=1, n=2, extra_body={"stars": VANILLA}
            )
            params = dataclasses.replace(PARAMS.with_method("vanilla"), seed=1, n=2)
            expected = [output.text for text in texts for output in whole(params, text).outputs]
            assert [choice.index for choice in response.choices] == list(range(len(expected)))
            assert [choice.text for choice in response.choices] == expected

    def test_logprobs(self, shared: Served) -> None:
        params = dataclasses.replace(PARAMS, seed=2)
        output = whole(params).outputs[0]
        create = shared.client().completions.create
        response = create(model="letters", prompt="ab", seed=2, logprobs=0)
        logprobs = response.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens == [LETTERS[token] for token in output.token_ids]
        assert logprobs.token_logprobs == pytest.approx(output.logprobs, abs=1e-4)
        text, offsets = response.choices[0].text, logprobs.text_offset or []
        for token, offset in zip(logprobs.tokens or [], offsets, strict=True):
            assert token == "$" or text[offset] == token  # the end of a sequence is no text
        assert create(model="letters", prompt="ab", seed=2).choices[0].logprobs is None
        streamed: list[int] = []
        for chunk in create(model="letters", prompt="ab", seed=2, logprobs=0, stream=True):
            found = chunk.choices[0].logprobs
            assert found is not None
            streamed += found.text_offset or []
        assert streamed == offsets

    def test_stars_parameters(self, shared: Served) -> None:
        stars = {"target_reward": 30.0, "acceptance": "hard", "max_attempts": 2, "trace": True}
        response = shared.client().completions.create(
            model="letters", prompt="ab", max_tokens=8, extra_body={"stars": stars}
        )
        segments = response.choices[0].stars["segments"]  # type: ignore[attr-defined]
        assert [s["accepted"] for s in segments] == ["fallback"] * 2
        assert [s["attempts"] for s in segments] == [2, 2]
        for segment in segments:
            (lost,) = segment["rejected"]
            assert lost["reward"] <= segment["reward"]
            assert lost["text"] == "".join(LETTERS[token] for token in lost["token_ids"])

    def test_methods_that_choose_at_the_end_are_one_delta(self, shared: Served) -> None:
        for method in ("best_of_n", "smc", "speculative_rejection"):
            stars = {"method": method, "candidates": 3}
            body = {"prompt": "ab", "seed": 3, "stars": stars, "stream": True}
            chunks = events(shared.post(body))
            assert len(chunks) == 1
            (choice,) = chunks[0]["choices"]
            params = dataclasses.replace(PARAMS, seed=3).with_method(method, candidates=3)  # type: ignore[arg-type]
            assert choice["text"] == whole(params).outputs[0].text
            assert choice["finish_reason"] == "length"


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert data.pop() == "[DONE]"
    return [json.loads(item) for item in data]


@pytest.mark.parametrize("length", [2, 3, 4])
def test_a_stop_text_across_a_border_is_never_sent(shared: Served, length: int) -> None:
    params = dataclasses.replace(PARAMS.with_method("vanilla"), seed=5)
    free = whole(params).outputs[0].text
    for at in range(3, 9 - length):
        stop = free[at : at + length]
        body = {"prompt": "ab", "seed": 5, "stop": stop, "stars": VANILLA, "stream": True}
        texts = [chunk["choices"][0]["text"] for chunk in events(shared.post(body))]
        assert "".join(texts) == free[: free.index(stop)]


def test_a_character_cut_by_a_border_is_sent_whole() -> None:
    """Single bytes of letters of several: nothing but whole ones may go out."""
    gate = Gate()
    tokenizer = bpe_tokenizer()
    ids = tokenizer("\u20ac\U0001f600", add_special_tokens=False)["input_ids"]
    assert len(ids) > 4
    engine = Engine(small_model(), tokenizer=tokenizer, num_pages=100)
    draw = engine.loop.drafter.draft

    def scripted(plan: Any, sampling: Any) -> Any:
        drafted = draw(plan, sampling)
        for row in range(len(sampling)):
            drafted.tokens[row, :1] = ids[len(sent) % len(ids)]
            sent.append(1)
        return drafted

    sent: list[int] = []
    engine.loop.drafter.draft = scripted  # type: ignore[method-assign]
    settings = ServerSettings("bytes", StarsParams(method="vanilla", ignore_eos=True))
    with serving(engine, gate, settings) as served:
        body = {
            "prompt": "A", "max_tokens": len(ids), "stars": {"segment_length": 1}, "stream": True
        }  # fmt: skip
        texts = [chunk["choices"][0]["text"] for chunk in events(served.post(body))]
    assert "".join(texts) == "\u20ac\U0001f600"
    assert set(texts) == {"", "\u20ac", "\U0001f600"}


def test_several_rewards_whole_and_streamed() -> None:
    gate = Gate()
    rewards = [Reward("a", gate), Reward("b", gate, weight=0.5, at_least=9.0)]
    engine = Engine(letter_model(), rewards, tokenizer=letter_tokenizer(), num_pages=400)
    body = {"model": "letters", "prompt": "ab", "seed": 7, "stars": {"trace": True}}
    with serving(engine, gate) as served:
        (choice,) = served.post(body).json()["choices"]
        streamed = served.post({**body, "stream": True}).text
    events = [json.loads(line[6:]) for line in streamed.split("\n\n") if line.startswith("data: {")]
    deltas = [event["choices"][0]["stars"] for event in events]
    stars = choice["stars"]
    attempts = [attempt for segment in stars["segments"] for attempt in segment["rejected"]]
    for one in (stars, deltas[-1], *stars["segments"], *attempts):
        assert list(one["rewards"]) == ["a", "b"]
        assert one["reward"] == 1.5 * one["rewards"]["a"]
    assert {segment["accepted"] for segment in stars["segments"]} == {"fallback"}
    assert [s for delta in deltas for s in delta["segments"]] == stars["segments"]
    assert all("rewards" not in delta for delta in deltas[:-1])


def test_chat() -> None:
    gate = Gate()
    tokenizer = bpe_tokenizer(chat="chatml")
    engine = Engine(small_model(), tokenizer=tokenizer, num_pages=200)
    settings = ServerSettings("chat", StarsParams(method="vanilla", max_tokens=8))
    messages: list[Any] = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Not bad "},
                                     {"type": "text", "text": "at all?"}]},
    ]  # fmt: skip
    plain = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Not bad at all?"},
    ]
    (expected,) = Engine(small_model(), tokenizer=tokenizer, num_pages=200).generate(
        [plain], dataclasses.replace(settings.params, seed=1), use_tqdm=False
    )
    with serving(engine, gate, settings) as served:
        create = served.client().chat.completions.create
        response = create(
            model="chat", messages=messages, seed=1, max_completion_tokens=8, logprobs=True
        )
        (choice,) = response.choices
        assert choice.message.role == "assistant"
        assert choice.message.content == expected.outputs[0].text
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        values = [token.logprob for token in choice.logprobs.content]
        assert values == pytest.approx(expected.outputs[0].logprobs, abs=1e-4)
        assert response.usage is not None
        assert response.usage.prompt_tokens == len(expected.prompt_token_ids)
        stream = create(
            model="chat", messages=messages, seed=1, stream=True,
            extra_body={"stars": {"segment_length": 3}},
        )  # fmt: skip
        deltas = [chunk.choices[0].delta for chunk in stream]
        assert "".join(delta.content or "" for delta in deltas) == expected.outputs[0].text
        assert [delta.role for delta in deltas] == ["assistant", None, None]
        refused = served.post(
            {"messages": [{"role": "tool", "content": None}]}, "/v1/chat/completions"
        )
        assert refused.status_code == 400


class TestErrors:
    @pytest.mark.parametrize(
        ("body", "param", "message"),
        [
            ({}, "prompt", "prompt is missing"),
            ({"prompt": ""}, "prompt", "prompt is empty"),
            ({"prompt": []}, "prompt", "prompt is empty"),
            ({"prompt": [0, "a"]}, "prompt", "prompt"),
            ({"prompt": [0, 99]}, "prompt", "out of range"),
            ({"prompt": "ab", "max_tokens": 0}, "max_tokens", "max_tokens must be at least 1"),
            ({"prompt": "ab", "max_tokens": 9999}, "prompt", "does not fit the model's context"),
            ({"prompt": "ab", "max_tokens": "9"}, "max_tokens", "max_tokens"),
            ({"prompt": "ab", "temperature": -1}, "temperature", "temperature must be"),
            ({"prompt": "ab", "top_p": 2}, "top_p", "top_p must be in"),
            ({"prompt": "ab", "n": 999}, "n", "128 are allowed"),
            ({"prompt": "ab", "temprature": 1}, None, "unknown parameter 'temprature'; those"),
            ({"prompt": "ab", "logit_bias": {"1": 500}}, "logit_bias", "logit_bias[1] must be in"),
            ({"prompt": "ab", "suffix": "x"}, None, "suffix is not supported"),
            ({"prompt": "ab", "best_of": 3}, None, "best_of is not supported by this server; "),
            ({"prompt": "ab", "logprobs": 50}, "top_logprobs", "top_logprobs must be at most 20"),
            ({"prompt": "ab", "stars": {"betta": 1}}, None, "parameters are method, segment_l"),
            ({"prompt": "ab", "stars": {"beta": 0}}, "beta", "beta must be above 0"),
            ({"prompt": "ab", "stars": 3}, "stars", "stars"),
            (
                {"prompt": "ab", "stars": {"target_reward": "auto"}},
                "stars",
                "start the server with",
            ),
            ({"prompt": "ab", "seed": 1, "stars": {"seed": 1}}, "seed", "seed is given twice"),
        ],
    )
    def test_bad_bodies(
        self, shared: Served, body: dict[str, Any], param: str | None, message: str
    ) -> None:
        for stream in (False, True):
            response = shared.post({**body, "stream": stream})
            assert response.status_code == 400
            error = response.json()["error"]
            assert message in error["message"]
            assert error["param"] == param
            assert error["type"] == "invalid_request_error"

    def test_stream_options_need_a_stream(self, shared: Served) -> None:
        response = shared.post({"prompt": "ab", "stream_options": {"include_usage": True}})
        assert response.status_code == 400
        assert "stream_options must be left out" in response.json()["error"]["message"]

    @pytest.mark.parametrize(
        "content", [b"{", b"[]", b"null", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}']
    )
    def test_what_is_no_request(self, shared: Served, content: bytes) -> None:
        headers = {"Content-Type": "application/json"}
        response = httpx.post(f"{shared.url}/v1/completions", content=content, headers=headers)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"

    def test_what_asks_for_nothing_is_no_error(self, shared: Served) -> None:
        nothing = {
            "logit_bias": {}, "echo": False, "best_of": 1, "presence_penalty": 0.0, "tools": None,
            "frequency_penalty": 0, "user": "someone", "stop": None, "logprobs": None,
        }  # fmt: skip
        assert shared.post({"prompt": "ab", **nothing}).status_code == 200

    def test_clients_get_their_exceptions(self, shared: Served) -> None:
        create = shared.client().completions.create
        with pytest.raises(openai.NotFoundError, match="'gpt' does not exist"):
            create(model="gpt", prompt="ab")
        with pytest.raises(openai.BadRequestError, match="top_p must be in") as refused:
            create(model="letters", prompt="ab", top_p=3)
        assert refused.value.param == "top_p"
        with pytest.raises(openai.NotFoundError):
            shared.client().models.retrieve("gpt")
        assert httpx.get(f"{shared.url}/nowhere").json()["error"]["message"] == "Not Found"
        assert httpx.get(f"{shared.url}/v1/completions").status_code == 405

    def test_a_failing_reward_is_one_requests_error(self, shared: Served) -> None:
        client = shared.client()
        with pytest.raises(openai.InternalServerError, match="no reward for c"):
            client.completions.create(model="letters", prompt="cb")
        with pytest.raises(openai.APIError, match="no reward for c"):
            list(client.completions.create(model="letters", prompt="cb", stream=True))
        response = client.completions.create(model="letters", prompt="ab")
        assert response.choices[0].finish_reason == "length"
        until(shared.idle)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_its_request(shared: Served, stream: bool) -> None:
    shared.gate.open.clear()
    calls = shared.gate.calls
    before = shared.metrics().get('stars:http_requests_total{status="499"}', 0)
    body = json.dumps({"prompt": "ab", "max_tokens": 400, "stream": stream}).encode()
    host, port = shared.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        until(lambda: shared.gate.calls > calls)
        assert shared.engine.num_running == 1
    until(lambda: shared.metrics().get('stars:http_requests_total{status="499"}', 0) > before)
    shared.gate.open.set()
    until(shared.idle)
    assert shared.gate.calls < calls + 20


def test_a_full_queue_is_429_with_retry_after() -> None:
    gate = Gate()
    settings = ServerSettings("letters", PARAMS)
    with serving(letter_engine(gate), gate, settings, max_running=1, max_waiting=1) as served:
        gate.open.clear()
        results: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: results.append(served.post({"prompt": "ab"})))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        until(lambda: (served.engine.num_running, served.engine.num_waiting) == (1, 1))
        metrics = served.metrics()
        assert metrics["stars:num_requests_running"] == 1
        assert metrics["stars:num_requests_waiting"] == 1
        for stream in (False, True):
            response = served.post({"prompt": "ab", "stream": stream})
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["code"] == "queue_full"
        # Several prompts come in together or not at all.
        assert served.post({"prompt": ["ab", "ab"]}).status_code == 429
        with pytest.raises(openai.RateLimitError, match="queue full"):
            served.client().completions.create(model="letters", prompt="ab")
        gate.open.set()
        for thread in threads:
            thread.join()
        assert [response.status_code for response in results] == [200, 200]
        until(served.idle)


def test_limits_and_the_key() -> None:
    gate = Gate()
    settings = ServerSettings(
        "letters", PARAMS, api_key="secret", request_timeout=0.2, max_body_bytes=200
    )
    with serving(letter_engine(gate), gate, settings, max_prompt_tokens=3) as served:
        good = served.client(api_key="secret")
        assert [model.id for model in good.models.list()] == ["letters"]
        assert good.models.retrieve("letters").owned_by == "stars_fast"
        for key in ("Secret", "secre", "x"):
            with pytest.raises(openai.AuthenticationError, match="API key") as refused:
                served.client(api_key=key).models.list()
            assert refused.value.code == "invalid_api_key"
        assert served.post({"prompt": "ab"}).status_code == 401
        basic = {"Authorization": "Basic secret"}
        assert httpx.get(f"{served.url}/v1/models", headers=basic).status_code == 401
        for path in ("/health", "/ready", "/metrics", "/", "/openapi.json"):
            assert httpx.get(served.url + path).status_code == 200

        with pytest.raises(openai.BadRequestError, match="more than the 3 allowed"):
            good.completions.create(model="letters", prompt="abab")
        with pytest.raises(openai.APIStatusError, match="longer than the 200 bytes") as long:
            good.completions.create(model="letters", prompt="a" * 300)
        assert long.value.status_code == 413
        key = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
        chunks = (b'{"prompt": "' for _ in range(40))  # its length is not told beforehand
        response = httpx.post(f"{served.url}/v1/completions", content=chunks, headers=key)
        assert response.status_code == 413
        assert "longer than" in response.json()["error"]["message"]

        gate.open.clear()
        with pytest.raises(openai.APIStatusError, match="not finished within") as late:
            good.completions.create(model="letters", prompt="ab")
        assert late.value.status_code == 504
        with pytest.raises(openai.APIError, match="not finished within"):
            list(good.completions.create(model="letters", prompt="ab", stream=True))
        gate.open.set()
        until(served.idle)


def test_a_stream_whose_time_is_over_ends_with_an_error() -> None:
    class Late(Gate):
        def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
            if max(map(len, responses)) > PARAMS.segment_length:
                assert self.open.wait(20)
            return (
                super().__call__(prompts, responses) if self.open.is_set() else [0.5] * len(prompts)
            )

    gate = Late()
    gate.open.clear()
    settings = ServerSettings("letters", PARAMS, request_timeout=1.0)
    with serving(letter_engine(gate), gate, settings) as served:
        chunks = events(served.post({"prompt": "ab", "stream": True}))
        assert len(chunks) == 2
        assert chunks[0]["choices"][0]["text"]
        assert "not finished within" in chunks[1]["error"]["message"]
        gate.open.set()
        until(served.idle)
        assert served.metrics()['stars:http_requests_total{status="504"}'] == 1


def test_metrics_move(shared: Served) -> None:
    before = shared.metrics()
    shared.post({"prompt": "ab", "stars": {"target_reward": 30.0, "acceptance": "hard"}})
    until(shared.idle)
    after = shared.metrics()
    moved = {name: after[name] - before.get(name, 0) for name in after}
    assert moved["stars:prompt_tokens_total"] == 2
    assert moved["stars:generation_tokens_total"] == 12
    assert moved["stars:segments_proposed_total"] == 9
    assert moved["stars:fallbacks_total"] == 3
    assert moved["stars:segments_accepted_total"] == 0
    assert moved["stars:tokens_discarded_total"] == 24
    assert moved["stars:time_to_first_token_seconds_count"] == 1
    assert moved["stars:e2e_request_latency_seconds_count"] == 1
    assert moved["stars:segment_attempts_sum"] == 9
    assert moved["stars:segment_reward_count"] == 3
    assert moved['stars:http_requests_total{status="200"}'] == 1
    assert after["stars:kv_cache_usage_perc"] == after["stars:num_requests_running"] == 0
    assert after["stars:rm_tokens_total"] == 0


def test_a_target_that_follows_the_requests() -> None:
    gate = Gate()
    engine = letter_engine(gate)
    engine.calibrate_on_requests(0.75, share=0.5)
    settings = ServerSettings("letters", dataclasses.replace(PARAMS, target_reward="auto"))
    with serving(engine, gate, settings, front=True) as served:
        before = served.metrics()
        assert before["stars:calibration_samples"] == 0
        assert "stars:calibration_target" not in before
        answer = served.post({"prompt": "ab", "seed": 3}).json()
        (choice,) = answer["choices"]
        until(served.idle)
        metrics = served.metrics()
        assert metrics["stars:calibration_samples"] == 4
        assert metrics["stars:calibration_tokens_total"] == 4 * 12
        target = metrics["stars:calibration_target"]
        assert choice["stars"]["target_reward"] == target
        assert answer["usage"]["completion_tokens"] == 12  # the samples are not its own
        body = {"prompt": "ab", "seed": 3, "stars": {"target_reward": target}}
        chunks = events(served.post({**body, "stream": True}))
        targets = [chunk["choices"][0]["stars"].get("target_reward") for chunk in chunks]
        assert targets == [None] * (len(chunks) - 1) + [target]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
        for stars in ({"calibrate_prefixes": True}, {"budget": 4.0}):
            refused = served.post({"prompt": "ab", "stars": {"target_reward": "auto", **stars}})
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "not_calibrated")


def test_logs_have_the_request_id_and_no_prompt(caplog: pytest.LogCaptureFixture) -> None:
    headers, gate = {"X-Request-Id": "my-request.1"}, Gate()
    with (
        caplog.at_level(logging.INFO, logger="stars_fast.server"),
        serving(letter_engine(gate), gate) as served,
    ):
        response = httpx.post(
            f"{served.url}/v1/completions", json={"prompt": "abba"}, headers=headers, timeout=60
        )
        bad = httpx.get(f"{served.url}/health", headers={"X-Request-Id": "a b\tc"})
    assert response.headers["x-request-id"] == "my-request.1"
    records = [record for record in caplog.records if record.name == "stars_fast.server"]
    (record,) = [record for record in records if record.getMessage() == "request"]
    from stars_fast.server.logs import JsonFormatter

    line = json.loads(JsonFormatter().format(record))
    assert line["event"] == "request"
    assert line["request_id"] == "my-request.1"
    assert line["status"] == 200
    assert line["completion_tokens"] == 12
    assert "abba" not in json.dumps(line)
    assert bad.headers["x-request-id"] != "a b\tc"


def test_openapi_and_the_page(shared: Served) -> None:
    schema = httpx.get(f"{shared.url}/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/metrics"} <= schema["paths"].keys()
    assert "stars" in schema["components"]["schemas"]["CompletionRequest"]["properties"]
    page = httpx.get(shared.url)
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    script = page.text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    for outside in ("http://", "https://", "//cdn", "src="):
        assert outside not in page.text
