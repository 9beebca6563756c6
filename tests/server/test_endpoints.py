"""The smaller endpoints: tokens, the reward model by itself, versions, CORS."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import pytest
from helpers.tiny_lm import small_model
from helpers.tiny_rewards import plain_reward, reward_model
from helpers.tiny_tokenizers import bpe_tokenizer

from stars_fast import Engine

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx", "openai"):
    pytest.importorskip(package, reason=f"needs {package}, of the extras server and test")

import httpx  # noqa: E402
from helpers.serving import PARAMS, Gate, Served, letter_engine, serving  # noqa: E402

from stars_fast.remote import RemoteReward  # noqa: E402
from stars_fast.server import ServerSettings  # noqa: E402

USER = {"role": "user", "content": "Not bad"}
ANSWER = {"role": "assistant", "content": " at all."}


@pytest.fixture(scope="module")
def engine() -> Engine:
    tokenizer = bpe_tokenizer(chat="chatml")
    judge = reward_model("llama", tokenizer)
    return Engine(
        small_model(), judge, tokenizer=tokenizer, reward_tokenizer=tokenizer, num_pages=200
    )


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[Served]:
    few = ServerSettings("chat", PARAMS, max_choices=4, allowed_origins=("http://one.example",))
    with serving(engine, Gate(), few) as running:
        yield running


def answer(served: Served, path: str, body: dict[str, Any]) -> Any:
    response = served.post(body, path)
    assert response.status_code == 200, response.text
    return response.json()


class TestTokens:
    def test_text(self, served: Served) -> None:
        tokenizer = bpe_tokenizer(chat="chatml")
        ids = tokenizer("Not bad")["input_ids"]
        found = answer(served, "/tokenize", {"prompt": "Not bad", "return_token_strs": True})
        assert found["tokens"] == ids
        assert found["count"] == len(ids)
        assert found["token_strs"] == tokenizer.convert_ids_to_tokens(ids)
        assert found["max_model_len"] == small_model().config.max_position_embeddings
        bare = answer(served, "/tokenize", {"prompt": "Not bad", "add_special_tokens": False})
        assert bare["tokens"] == tokenizer("Not bad", add_special_tokens=False)["input_ids"]
        text = answer(served, "/detokenize", {"model": "chat", "tokens": bare["tokens"]})
        assert text == {"prompt": "Not bad"}

    def test_chat(self, served: Served) -> None:
        found = answer(served, "/tokenize", {"messages": [USER]})
        usage = answer(
            served, "/v1/chat/completions", {"messages": [USER], "stars": {"method": "vanilla"}}
        )["usage"]
        assert found["count"] == usage["prompt_tokens"]

    @pytest.mark.parametrize(
        ("path", "body", "message"),
        [
            ("/tokenize", {}, "prompt or messages must be given"),
            ("/tokenize", {"prompt": "a", "messages": [USER]}, "and not both"),
            ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content must be text"),
            ("/detokenize", {"tokens": [-1]}, "tokens[0] must be in [0,"),
            ("/detokenize", {"tokens": [0, 10**9]}, "tokens[1] must be in [0,"),
        ],
    )
    def test_errors(self, served: Served, path: str, body: Any, message: str) -> None:
        response = served.post(body, path)
        assert response.status_code == 400
        assert message in response.json()["error"]["message"]


class TestRewards:
    def test_texts_are_read_as_they_are(self, served: Served) -> None:
        tokenizer = bpe_tokenizer(chat="chatml")
        judge = reward_model("llama", tokenizer)
        texts = ["<|im_start|>user\nNot bad<|im_end|>\n", "Good value."]
        expected = [
            plain_reward(judge, tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in texts
        ]
        raw = answer(served, "/classify", {"input": texts, "use_activation": False})
        assert [item["probs"][0] for item in raw["data"]] == pytest.approx(expected, abs=1e-4)
        assert [item["index"] for item in raw["data"]] == [0, 1]
        assert raw["usage"]["prompt_tokens"] > 0
        probs = answer(served, "/classify", {"input": texts[0]})["data"][0]
        assert probs["probs"] == [pytest.approx(1 / (1 + math.exp(-expected[0])), abs=1e-4)]
        assert (probs["label"], probs["num_classes"]) == ("LABEL_0", 1)
        pooled = answer(served, "/pooling", {"input": texts})["data"]
        assert [item["data"][0] for item in pooled] == pytest.approx(expected, abs=1e-4)

    def test_pairs_and_chats_go_through_the_template(self, served: Served) -> None:
        tokenizer = bpe_tokenizer(chat="chatml")
        judge = reward_model("llama", tokenizer)
        text = tokenizer.apply_chat_template([USER, ANSWER], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected = pytest.approx(plain_reward(judge, ids), abs=1e-4)
        body = {"text_1": USER["content"], "text_2": [ANSWER["content"], ""]}
        for path in ("/score", "/v1/score"):
            data = answer(served, path, body)["data"]
            assert data[0]["score"] == expected
            assert len(data) == 2
        chat = {"messages": [USER, ANSWER], "use_activation": False}
        assert answer(served, "/classify", chat)["data"][0]["probs"] == [expected]
        assert answer(served, "/pooling", chat)["data"][0]["data"] == [expected]

    def test_texts_are_read_beside_the_rounds(
        self, served: Served, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        threads: set[str] = set()

        def noted(own: Callable[..., Any], *given: Any) -> Any:
            threads.add(threading.current_thread().name)
            return own(*given)

        for name in ("read", "response_ids"):
            own = getattr(engine.reader, name)
            monkeypatch.setattr(engine.reader, name, functools.partial(noted, own))
        answer(served, "/score", {"text_1": "Not", "text_2": " bad"})
        answer(served, "/classify", {"input": "Not bad"})
        assert threads == {"stars-fast-reader"}

    @pytest.mark.parametrize("path", ["/classify", "/pooling", "/score", "/v1/score"])
    def test_our_own_remote_reward_reads_it(self, served: Served, path: str) -> None:
        remote = RemoteReward(served.url + path, model="chat", batch_size=2)
        found = remote.score(["Not bad"] * 3, [" at", " all", " day"])
        remote.close()
        tokenizer = bpe_tokenizer(chat="chatml")
        texts = []
        for response in (" at", " all", " day"):
            chat = [{"role": "user", "content": "Not bad"}, {**ANSWER, "content": response}]
            pair = path.endswith("score")  # which goes through the template
            text = tokenizer.apply_chat_template(chat, tokenize=False)
            texts.append(text if pair else f"Not bad{response}")
        data = answer(served, "/pooling", {"input": texts})["data"]
        assert found == pytest.approx([item["data"][0] for item in data], abs=1e-4)

    def test_a_function(self) -> None:
        with serving(letter_engine(Gate()), Gate()) as letters:
            data = answer(letters, "/pooling", {"input": ["ab", "ba"]})["data"]
            assert [item["data"] for item in data] == [[0.0], [0.0]]
            scored = answer(letters, "/score", {"text_1": "ab", "text_2": ["aa", "b"]})["data"]
            assert [item["score"] for item in scored] == [1.0, -0.5]

    @pytest.mark.parametrize(
        ("path", "body", "message"),
        [
            ("/classify", {}, "input or messages must be given"),
            ("/classify", {"input": []}, "input must have at least one text"),
            ("/pooling", {"input": ["a", ""]}, "input[1] must be text that is not empty"),
            ("/pooling", {"input": ["a"] * 5}, "input must have at most 4 texts, got 5"),
            ("/classify", {"messages": [USER]}, "a last message of role 'assistant'"),
            ("/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1 must be one text or as"),
            ("/score", {"text_1": "a"}, "text_2 is missing"),
        ],
    )
    def test_errors(self, served: Served, path: str, body: Any, message: str) -> None:
        response = served.post(body, path)
        assert response.status_code == 400
        assert message in response.json()["error"]["message"]

    def test_what_asks_for_nothing_is_accepted(self, served: Served) -> None:
        nothing = {"truncate_prompt_tokens": -1, "encoding_format": "float", "priority": 0,
                   "dimensions": None, "whatever": None}  # fmt: skip
        for path in ("/classify", "/pooling"):
            answer(served, path, {"input": "a", **nothing})
        answer(served, "/score", {"text_1": "a", "text_2": "b", **nothing})
        answer(served, "/tokenize", {"prompt": "a", **nothing})
        refused = served.post({"input": "a", "truncate_prompt_tokens": 3}, "/pooling")
        assert refused.status_code == 400
        assert "truncate_prompt_tokens is not supported" in refused.json()["error"]["message"]

    def test_another_model(self, served: Served) -> None:
        assert served.post({"model": "gpt", "input": "a"}, "/classify").status_code == 404

    def test_without_a_reward_model(self) -> None:
        bare = Engine(small_model(), tokenizer=bpe_tokenizer(), num_pages=100)
        with serving(bare, Gate()) as running:
            response = running.post({"input": "a"}, "/classify")
        assert response.status_code == 400
        assert "a reward model is needed" in response.json()["error"]["message"]


def test_version_and_ping(served: Served) -> None:
    assert httpx.get(f"{served.url}/version").json() == {"version": version("stars-fast")}
    assert httpx.get(f"{served.url}/ping").status_code == 200
    (model,) = httpx.get(f"{served.url}/v1/models").json()["data"]
    assert (model["root"], model["parent"]) == ("chat", None)
    assert model["max_model_len"] == small_model().config.max_position_embeddings


PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


class TestOrigins:
    def test_those_named_may_call(self, served: Served) -> None:
        url = f"{served.url}/v1/completions"
        headers = {"Origin": "http://one.example", **PREFLIGHT}
        allowed = httpx.options(url, headers=headers)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "http://one.example"
        other = httpx.options(url, headers={**headers, "Origin": "http://two.example"})
        assert "access-control-allow-origin" not in other.headers
        health = httpx.get(f"{served.url}/health", headers={"Origin": "http://one.example"})
        assert health.headers["access-control-allow-origin"] == "http://one.example"

    def test_off_by_default_and_in_front_of_the_key(self) -> None:
        headers = {"Origin": "http://one.example", **PREFLIGHT}
        with serving(letter_engine(Gate()), Gate()) as running:
            response = httpx.options(f"{running.url}/v1/completions", headers=headers)
            assert response.status_code == 405
            assert "access-control-allow-origin" not in response.headers
        closed = ServerSettings("letters", PARAMS, api_key="k", allowed_origins=("*",))
        with serving(letter_engine(Gate()), Gate(), closed) as running:
            url = f"{running.url}/v1/completions"
            assert httpx.options(url, headers=headers).status_code == 200
            refused = httpx.post(url, json={}, headers={"Origin": "http://one.example"})
            assert refused.status_code == 401
            assert refused.headers["access-control-allow-origin"] == "*"
            for path in ("/tokenize", "/classify", "/score", "/pooling", "/detokenize"):
                assert httpx.post(running.url + path, json={}).status_code == 401
            for path in ("/version", "/ping", "/health"):
                assert httpx.get(running.url + path).status_code == 200
