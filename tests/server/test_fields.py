"""The fields that stacks send, in OpenAI's and vLLM's names."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from helpers.tiny_lm import LETTERS, coin_model, letter_model, small_model
from helpers.tiny_tokenizers import bpe_tokenizer

from stars_fast import Engine, StarsParams

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx", "openai"):
    pytest.importorskip(package, reason=f"needs {package}, of the extras server and test")

import httpx  # noqa: E402
from helpers.serving import PARAMS, Gate, Served, letter_engine, serving  # noqa: E402

from stars_fast.server import ServerSettings  # noqa: E402

CHAT = "/v1/chat/completions"
VANILLA = PARAMS.with_method("vanilla")


@pytest.fixture(scope="module")
def letters() -> Iterator[Served]:
    engine = letter_engine(Gate())
    engine.calibrate("ab", params=VANILLA, use_tqdm=False)
    with serving(engine, Gate(), ServerSettings("letters", VANILLA)) as running:
        yield running


@pytest.fixture(scope="module")
def chats() -> Iterator[Served]:
    engine = Engine(small_model(), tokenizer=bpe_tokenizer(chat="chatml"), num_pages=200)
    params = StarsParams(method="vanilla", max_tokens=8, seed=1, ignore_eos=True)
    with serving(engine, Gate(), ServerSettings("chat", params)) as running:
        yield running


def choice_of(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def engine_text(prompt: Any = "ab", **fields: Any) -> str:
    params = dataclasses.replace(VANILLA, **fields)
    (output,) = letter_engine(Gate()).generate(prompt, params, use_tqdm=False)
    assert output.error is None
    return output.outputs[0].text


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({"top_k": 2}, {"top_k": 2}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"min_p": 0.5}, {"min_p": 0.5}),
        ({"stop_token_ids": [1]}, {"stop_token_ids": [1]}),
        ({"ignore_eos": False}, {"ignore_eos": False}),
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
        ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
        ({"frequency_penalty": -1.5}, {"frequency_penalty": -1.5}),
        ({"logit_bias": {"2": 50}}, {"logit_bias": {2: 50}}),
        ({"bad_words": ["ab", "c"]}, {"bad_words": ["ab", "c"]}),
        ({"min_tokens": 9, "ignore_eos": False}, {"min_tokens": 9, "ignore_eos": False}),
    ],
)
def test_sampling(letters: Served, fields: dict[str, Any], params: dict[str, Any]) -> None:
    plain = [engine_text(seed=seed) for seed in range(4)]
    texts = []
    for seed in range(4):
        found = choice_of(letters.post({"prompt": "ab", "seed": seed, **fields}))["text"]
        assert found == engine_text(seed=seed, **params)
        texts.append(found)
    assert (texts == plain) == (params == {"top_k": 0})


def test_guidance(letters: Served) -> None:
    guide = coin_model(1e-9, 1e-9)
    with serving(letter_engine(Gate(), guide=guide), Gate(), ServerSettings("led", VANILLA)) as led:
        for fields in ({"guide_weight": 1.0}, {"stars": {"guide_weight": 1.0}}):
            text = choice_of(led.post({"prompt": "ab", "seed": 2, **fields}))["text"]
            assert set(text) == {"b"} != set(engine_text(seed=2))
    response = letters.post({"prompt": "ab", "guide_weight": 0.5})
    assert response.status_code == 400
    assert "guide_weight must be 0" in response.json()["error"]["message"]


def test_a_draft_model(letters: Served) -> None:
    """By the body's object, and by the model's name."""
    draft = coin_model(1e-9, 1e-9)
    engine = letter_engine(Gate(), draft_model=draft)
    with serving(engine, Gate(), ServerSettings("led", VANILLA)) as led:
        asked = {"method": "rsd", "target_reward": -9.0}
        text = choice_of(led.post({"prompt": "ab", "seed": 2, "stars": asked}))["text"]
        assert set(text) == {"b"} != set(engine_text(seed=2))
        assert led.post({"prompt": "ab", "model": "led:sss"}).status_code == 200
    response = letters.post({"prompt": "ab", "stars": asked})
    assert response.status_code == 400
    assert "method='rsd' needs a draft model" in response.json()["error"]["message"]


NOTHING: dict[str, Any] = {
    "repetition_penalty": 1.0, "min_tokens": 0, "top_k": -1, "min_p": 0.0, "best_of": 1,
    "use_beam_search": False, "length_penalty": 1.0, "skip_special_tokens": True,
    "spaces_between_special_tokens": True, "include_stop_str_in_output": False,
    "truncate_prompt_tokens": None, "prompt_logprobs": None, "priority": 0, "request_id": "x",
    "return_token_ids": False, "temperature": None, "whatever": None, "logit_bias": {},
    "guide_weight": 0.0,
    "verbosity": "low", "metadata": {"a": "b"}, "response_format": {"type": "text"},
    "tools": [{"type": "function"}], "tool_choice": "none", "store": False, "user": None,
    "parallel_tool_calls": True, "service_tier": "auto", "cache_salt": "x", "detokenize": True,
}  # fmt: skip


def test_what_asks_for_nothing_is_accepted(letters: Served, chats: Served) -> None:
    body = {"prompt": "ab", "seed": 3, **NOTHING, "add_special_tokens": True, "echo": False}
    assert choice_of(letters.post(body))["text"] == engine_text(seed=3)
    body = {**NOTHING, "add_generation_prompt": True, "continue_final_message": False,
            "add_special_tokens": False, "reasoning_effort": "low", "top_logprobs": 0}  # fmt: skip
    choice_of(chats.post({"messages": [{"role": "user", "content": "Hi"}], **body}, CHAT))


@pytest.mark.parametrize(
    ("name", "value"),
    [("use_beam_search", True), ("length_penalty", 2), ("tools", [{"type": "function"}]),
     ("truncate_prompt_tokens", 5), ("prompt_logprobs", 1)],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(letters: Served, name: str, value: Any) -> None:
    response = letters.post({"prompt": "ab", name: value})
    assert response.status_code == 400
    assert f"{name} is not supported" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"prompt": "ab \ud83d"}, "prompt must be text, got half of a surrogate pair (U+D83D)"),
        ({"prompt": "ab", "stop": ["x", "\ud800"]}, "stop[1] must be text"),
        ({"prompt": "ab", "user": "\udfff"}, "user must be text"),
        ({"prompt": "ab", "metadata": {"a": "\ud800"}}, "metadata.a must be text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content must be text"),
    ],
)
def test_half_a_surrogate_pair_is_refused_by_its_place(
    letters: Served, body: dict[str, Any], place: str
) -> None:
    path = CHAT if "messages" in body else "/v1/completions"
    headers = {"Content-Type": "application/json"}
    response = httpx.post(letters.url + path, content=json.dumps(body), headers=headers)
    assert response.status_code == 400
    assert place in response.json()["error"]["message"]


class TestStopTexts:
    def test_the_text_that_ended_it_can_be_shown(self, letters: Served) -> None:
        free = engine_text(seed=5)
        for stop in (free[4:6], free[3]):
            shown = free[: free.index(stop) + len(stop)]
            body = {"prompt": "ab", "seed": 5, "stop": stop, "include_stop_str_in_output": True}
            assert choice_of(letters.post(body))["text"] == shown
            texts = [
                c["choices"][0]["text"] for c in chunks_of(letters.post({**body, "stream": True}))
            ]
            assert "".join(texts) == shown
            hidden = {**body, "include_stop_str_in_output": False}
            assert choice_of(letters.post(hidden))["text"] == free[: free.index(stop)]


class TestSpecialTokens:
    def test_they_can_be_shown(self, chats: Served) -> None:
        tokenizer = bpe_tokenizer(chat="chatml")
        special = tokenizer.convert_tokens_to_ids("<|im_end|>")
        body = {"prompt": "Not bad", "logit_bias": {str(special): 100}, "max_tokens": 3}
        assert choice_of(chats.post(body))["text"] == ""
        shown = {**body, "skip_special_tokens": False}
        assert choice_of(chats.post(shown))["text"] == "<|im_end|>" * 3
        chunks = chunks_of(chats.post({**shown, "stream": True, "stars": {"segment_length": 1}}))
        assert [c["choices"][0]["text"] for c in chunks] == ["<|im_end|>"] * 3

    def test_the_one_that_ended_it_belongs_to_what_ended_it(self, chats: Served) -> None:
        special = bpe_tokenizer(chat="chatml").convert_tokens_to_ids("<|im_end|>")
        body = {"prompt": "Not bad", "logit_bias": {str(special): 100},
                "stop_token_ids": [special], "skip_special_tokens": False}  # fmt: skip
        assert choice_of(chats.post(body))["text"] == ""
        shown = choice_of(chats.post({**body, "include_stop_str_in_output": True}))
        assert shown["text"] == "<|im_end|>"
        assert shown["finish_reason"] == "stop"


class TestUsage:
    def test_in_every_chunk(self, letters: Served) -> None:
        options = {"continuous_usage_stats": True, "include_usage": True}
        chunks = chunks_of(
            letters.post({"prompt": "ab", "stream": True, "stream_options": options})
        )
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == [4, 8, 12, 12]
        assert [len(chunk["choices"]) for chunk in chunks] == [1, 1, 1, 0]


class TestLogprobs:
    def test_alternatives_of_completions(self, letters: Served) -> None:
        params = dataclasses.replace(VANILLA, seed=2, top_logprobs=2)
        (output,) = letter_engine(Gate()).generate("ab", params, use_tqdm=False)
        body = {"prompt": "ab", "seed": 2, "logprobs": 2}
        found = choice_of(letters.post(body))["logprobs"]
        for number, top in enumerate(found["top_logprobs"]):
            own, value = found["tokens"][number], found["token_logprobs"][number]
            assert top[own] == value  # also in the last bit
            best = [LETTERS[token] for token in output.outputs[0].top_logprobs[number]]
            assert set(top) == {*best, own}
        streamed = []
        for chunk in chunks_of(letters.post({**body, "stream": True})):
            streamed += chunk["choices"][0]["logprobs"]["top_logprobs"]
        assert streamed == found["top_logprobs"]
        assert choice_of(letters.post({**body, "logprobs": 0}))["logprobs"]["top_logprobs"] is None

    def test_alternatives_of_chats(self, chats: Served) -> None:
        body = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "max_tokens": 4}
        content = choice_of(chats.post({**body, "top_logprobs": 3}, CHAT))["logprobs"]["content"]
        for token in content:
            values = [one["logprob"] for one in token["top_logprobs"]]
            assert len(values) == 3
            assert values == sorted(values, reverse=True)
        refused = chats.post({**body, "logprobs": False, "top_logprobs": 3}, CHAT)
        assert refused.status_code == 400
        assert "top_logprobs needs logprobs" in refused.json()["error"]["message"]


class TestEcho:
    def test_text(self, letters: Served) -> None:
        body = {"prompt": ["ab", "ba"], "seed": 4, "n": 2, "echo": True}
        response = letters.post(body).json()
        plain = letters.post({**body, "echo": False}).json()
        for prompt, echoed, bare in zip(
            ["ab", "ab", "ba", "ba"], response["choices"], plain["choices"], strict=True
        ):
            assert echoed["text"] == prompt + bare["text"]
        assert response["usage"] == plain["usage"]
        chunks = chunks_of(letters.post({**body, "prompt": "ab", "n": 1, "stream": True}))
        texts = [chunk["choices"][0]["text"] for chunk in chunks]
        assert "".join(texts) == response["choices"][0]["text"]

    @pytest.mark.parametrize("max_tokens", [0, 1, 3])
    def test_log_probabilities_of_the_prompt(self, letters: Served, max_tokens: int) -> None:
        prompt = [0, 1, 2, 0, 3]
        body = {"prompt": [prompt], "max_tokens": max_tokens, "echo": True, "logprobs": 1}
        choice = choice_of(letters.post({**body, "temperature": 0}))
        found = choice["logprobs"]
        assert len(found["tokens"]) == len(prompt) + max_tokens
        assert found["token_logprobs"][0] is None
        assert found["top_logprobs"][0] is None
        with torch.inference_mode():
            logits = letter_model()(input_ids=torch.tensor([prompt])).logits[0]
        expected = logits.float().log_softmax(-1)
        for number, token in enumerate(prompt[1:], 1):
            own = found["token_logprobs"][number]
            assert own == pytest.approx(float(expected[number - 1, token]), abs=1e-4)
            greedy = int(expected[number - 1].argmax()) == token
            assert (max(found["top_logprobs"][number].values()) == own) == greedy
        for number in range(len(prompt), len(prompt) + max_tokens):  # drawn greedily
            top = found["top_logprobs"][number]
            assert max(top.values()) == found["token_logprobs"][number]
        assert choice["finish_reason"] == "length"
        for text, offset in zip(found["tokens"], found["text_offset"], strict=True):
            assert text == "$" or choice["text"][offset] == text

    def test_a_prompt_that_is_refused(self, letters: Served) -> None:
        for max_tokens in (0, 2):
            body = {"prompt": [[0, 99]], "max_tokens": max_tokens, "echo": True, "logprobs": 1}
            response = letters.post(body)
            assert response.status_code == 400
            assert "out of range" in response.json()["error"]["message"]


class TestMethodInAWord:
    @pytest.mark.parametrize("word", ["best_of_n:3", "best_of_n", "stars:2", "vanilla", "smc:4"])
    def test_by_name_and_by_header(self, letters: Served, word: str) -> None:
        method, _, budget = word.partition(":")
        name = "max_attempts" if method == "stars" else "candidates"
        stars = {"method": method, **({name: int(budget)} if budget else {})}
        body = {"prompt": "ab", "seed": 6}
        expected = letters.post({**body, "stars": stars}).json()["choices"]
        named = letters.post({**body, "model": f"letters:{word}"}).json()
        assert named["choices"] == expected
        assert named["model"] == f"letters:{word}"
        by_header = httpx.post(
            f"{letters.url}/v1/completions", json=body, headers={"X-Stars-Method": word}
        )
        assert by_header.json()["choices"] == expected
        found = letters.client().models.retrieve(f"letters:{word}")
        assert found.id == f"letters:{word}"

    @pytest.mark.parametrize(
        ("model", "status", "message"),
        [
            ("letters:mirostat", 400, "method must be one of stars"),
            ("letters:best_of_n:x", 400, "the budget of method 'best_of_n' must be a number"),
            ("letters:best_of_n:0", 400, "candidates must be at least 1"),
            ("letters:vanilla:3", 400, "method 'vanilla' has no budget"),
            ("lettersx", 404, "does not exist"),
        ],
    )
    def test_errors(self, letters: Served, model: str, status: int, message: str) -> None:
        response = letters.post({"prompt": "ab", "model": model})
        assert response.status_code == status
        assert message in response.json()["error"]["message"]

    def test_twice_is_an_error(self, letters: Served) -> None:
        body = {"prompt": "ab", "model": "letters:smc", "stars": {"method": "smc"}}
        response = letters.post(body)
        assert response.status_code == 400
        assert "method is given twice" in response.json()["error"]["message"]


@pytest.fixture(scope="module")
def drawn() -> Iterator[Served]:
    pytest.importorskip("llguidance", reason="needs llguidance, of the extra guided")
    engine = Engine(small_model(), tokenizer=bpe_tokenizer(chat="chatml"), num_pages=200)
    params = StarsParams(method="vanilla", max_tokens=40, seed=1)
    with serving(engine, Gate(), ServerSettings("chat", params)) as running:
        yield running


class TestFormats:
    SCHEMA: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {"a": {"enum": [1, 22]}},
        "required": ["a"],
        "additionalProperties": False,
    }

    @pytest.mark.parametrize("path", ["/v1/completions", CHAT, "/v1/responses"])
    def test_a_schema(self, drawn: Served, path: str) -> None:
        schema = {"type": "json_schema", "json_schema": {"name": "A", "schema": self.SCHEMA}}
        body: dict[str, Any] = {"prompt": "Hi", "response_format": schema}
        if path == CHAT:
            body = {"messages": [{"role": "user", "content": "Hi"}], "response_format": schema}
        if path == "/v1/responses":
            form = {"type": "json_schema", "name": "A", "schema": self.SCHEMA}
            body = {"input": "Hi", "text": {"format": form}}
        response = drawn.post(body, path)
        assert response.status_code == 200, response.text
        found = response.json()
        if path == "/v1/responses":
            text = found["output"][0]["content"][0]["text"]
            assert found["text"]["format"]["type"] == "json_schema"
        else:
            choice = found["choices"][0]
            text = choice["text"] if path == "/v1/completions" else choice["message"]["content"]
        assert json.loads(text)["a"] in (1, 22)

    def test_a_regular_expression(self, drawn: Served) -> None:
        body = {"prompt": "Hi", "structured_outputs": {"regex": "[ab]{3}c"}}
        text = choice_of(drawn.post(body))["text"]
        assert re.fullmatch("[ab]{3}c", text)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"response_format": {"type": "xml"}}, "must be text, json_object or json_schema"),
            ({"response_format": {"type": "json_schema"}}, "response_format.json_schema is miss"),
            ({"structured_outputs": {}}, "structured_outputs must have json or regex"),
            ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
             "must not both be given"),
            ({"response_format": {"type": "json_object"}, "stars": {"method": "args"}},
             "guided is no parameter of method='args'"),
        ],
    )  # fmt: skip
    def test_errors(self, letters: Served, fields: dict[str, Any], message: str) -> None:
        response = letters.post({"prompt": "ab", **fields})
        assert response.status_code == 400
        assert message in response.json()["error"]["message"]
