"""The routes of ``vllm serve``, mounted by vLLM's own two calls over a stand-in of its engine."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs fastapi, of the extra server")
pytest.importorskip("prometheus_client", reason="needs prometheus_client, of the extra server")
pytest.importorskip("httpx", reason="needs httpx, of the extra remote")

import httpx
from fastapi import FastAPI
from helpers import fake_vllm
from helpers.fake_vllm import LetterClient
from helpers.letter_law import letter_engine

from stars_fast import StarsParams
from stars_fast.remote import RemoteReward
from stars_fast.vllm.options import options_from
from stars_fast.vllm.plugin import StarsPlugin

REWARD = {"function": "helpers.letter_law:reward_model"}
OPTIONS = {
    "reward_model": REWARD,
    "params": {"target_reward": 0.5, "top_k": 0, "segment_length": 3, "max_tokens": 9},
}
BODY = {"prompt": "ab", "stars": {"method": "vanilla"}, "temperature": 0, "max_tokens": 12}
KEY = {"Authorization": "Bearer sesame"}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch)
    monkeypatch.setenv("STARS_OPTIONS", json.dumps(OPTIONS))
    monkeypatch.delenv("STARS_REWARD_MODEL", raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


@asynccontextmanager
async def served(client: LetterClient | None, **args: Any) -> AsyncIterator[httpx.AsyncClient]:
    """vLLM's application with the plugin, as vLLM makes it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.vllm_is_up = True
        yield

    app = FastAPI(lifespan=lifespan)
    plugin = StarsPlugin()
    plugin.attach_router(app)
    settings = {"model": "letters", "served_model_name": None, "api_key": None} | args
    await plugin.init_state(client, app.state, Namespace(**settings))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://vllm/plugins/stars") as http,
    ):
        assert app.state.vllm_is_up
        yield http


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


def test_it_is_found_by_vllm() -> None:
    (found,) = entry_points(group="vllm.endpoint_plugins", name="stars")
    plugin = found.load()()
    assert (plugin.name, plugin.required_tasks) == ("stars", ("generate",))


def test_answers_are_those_of_our_server() -> None:
    async def test() -> None:
        (wanted,) = letter_engine().generate(
            "ab",
            StarsParams(method="vanilla", temperature=0.0, top_k=0, max_tokens=12),
            use_tqdm=False,
        )
        async with served(LetterClient()) as http:
            answer = (await http.post("/v1/completions", json={**BODY, "logprobs": 0})).json()
            (choice,) = answer["choices"]
            assert choice["text"] == wanted.outputs[0].text
            assert choice["finish_reason"] == wanted.outputs[0].finish_reason
            found = choice["logprobs"]["token_logprobs"]
            assert found == pytest.approx(wanted.outputs[0].logprobs, abs=1e-5)
            events = await http.post("/v1/completions", json={**BODY, "stream": True})
            lines = [line[6:] for line in events.text.splitlines() if line.startswith("data: ")]
            assert lines.pop() == "[DONE]"
            chunks = [choice for line in lines for choice in json.loads(line)["choices"]]
            assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
            aligned = await http.post("/v1/completions", json={"prompt": "ba", "model": "letters"})
            (segment, *_) = aligned.json()["choices"][0]["stars"]["segments"]
            assert segment["reward"] is not None
            refused = await http.post("/v1/completions", json={**BODY, "guided": 1, "n": 0})
            assert refused.status_code == 400
            metrics = (await http.get("/metrics")).text
            assert 'stars:http_requests_total{status="200"} 3.0' in metrics

    run(test)


def test_without_logprobs_nobody_can_ask_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STARS_OPTIONS", json.dumps({**OPTIONS, "logprobs": False}))

    async def test() -> None:
        async with served(LetterClient()) as http:
            assert (await http.post("/v1/completions", json=BODY)).status_code == 200
            refused = await http.post("/v1/completions", json={**BODY, "logprobs": 0})
            assert refused.status_code == 400
            assert "keeps none" in refused.json()["error"]["message"]

    run(test)


def test_a_chat_reads_the_template_of_vllm(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    body = {"messages": [{"role": "user", "content": "ab"}], "stars": BODY["stars"]}

    async def test() -> None:
        for given in (str(template), template.read_text()):
            async with served(LetterClient(), chat_template=given) as http:
                answer = (await http.post("/v1/chat/completions", json=body)).json()
                assert answer["usage"]["prompt_tokens"] == 2
        async with served(LetterClient()) as http:
            assert (await http.post("/v1/chat/completions", json=body)).status_code == 400

    run(test)


@pytest.mark.parametrize("keys", [["sesame", "other"], None])
def test_the_keys_of_vllm_are_asked_for(
    keys: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if keys is None:
        monkeypatch.setenv("VLLM_API_KEY", "sesame")

    async def test() -> None:
        async with served(LetterClient(), api_key=keys) as http:
            for headers, status in ((KEY, 200), ({}, 401), ({"Authorization": "Bearer no"}, 401)):
                answer = await http.post("/v1/completions", json=BODY, headers=headers)
                assert answer.status_code == status
            other = {"Authorization": "Bearer other"}
            answer = await http.post("/v1/completions", json=BODY, headers=other)
            assert answer.status_code == (401 if keys is None else 200)
            assert (await http.get("/health")).status_code == 200

    run(test)


def test_without_an_engine_the_routes_say_so() -> None:
    async def test() -> None:
        async with served(None) as http:
            answer = await http.post("/v1/completions", json=BODY)
            assert answer.status_code == 503
            assert "no engine" in answer.json()["error"]["message"]

    run(test)


def test_a_client_that_leaves_aborts_its_calls() -> None:
    async def test() -> None:
        client = LetterClient(hold=asyncio.Event())
        async with served(client) as http:
            leaving = asyncio.create_task(http.post("/v1/completions", json=BODY))
            while not client.calls:
                await asyncio.sleep(0.001)
            leaving.cancel()
            while not client.aborted:
                await asyncio.sleep(0.001)
            client.hold = None
            assert (await http.post("/v1/completions", json=BODY)).status_code == 200

    run(test)


def test_options(tmp_path: Path) -> None:
    assert options_from({"STARS_REWARD_MODEL": "DIR"}).make_reward_model() == "DIR"
    file = tmp_path / "options.json"
    server = {"url": "http://127.0.0.1:1/classify", "model": "rm"}
    file.write_text(json.dumps({"reward_model": server, "max_rows": 8, "max_waiting": 3}))
    options = options_from({"STARS_OPTIONS": str(file)})
    assert isinstance(options.make_reward_model(), RemoteReward)
    assert options.engine_options()["max_rows"] == 8
    assert options.queue_options()["max_waiting"] == 3
    assert options_from({"STARS_OPTIONS": '{"params": {"method": "vanilla"}}'}).reward_model is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "reward_model is needed for method 'stars': set STARS_REWARD_MODEL"),
        ("/no/such/file", "STARS_OPTIONS must be a JSON object or a file"),
        ("{", "STARS_OPTIONS must be a JSON object or a file"),
        ('{"reward_model": "r", "max_row": 1}', "STARS_OPTIONS: max_row"),
        ('{"reward_model": "r", "max_rows": 0}', "STARS_OPTIONS: max_rows: .*greater than"),
        ('{"reward_model": "r", "params": {"beta": -1}}', "beta must be"),
        ('{"reward_model": "r", "params": {"target_reward": "auto"}}', "must be a number or null"),
        ('{"reward_model": "r", "max_choices": 0}', "max_choices must be at least 1"),
    ],
)
def test_options_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options_from({"STARS_OPTIONS": text})


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"function": "no.such:name"}, "cannot import 'no.such:name'"),
        ({"function": "math:pi"}, "must be a function"),
        ({"address": "http://x"}, "must be arguments of RemoteReward"),
    ],
)
def test_reward_models_that_are_refused(reward: dict[str, str], message: str) -> None:
    options = options_from({"STARS_OPTIONS": json.dumps({"reward_model": reward})})
    with pytest.raises(ValueError, match=message):
        options.make_reward_model()


def test_two_reward_models_are_refused() -> None:
    text = '{"reward_model": "one"}'
    with pytest.raises(ValueError, match="must not differ"):
        options_from({"STARS_OPTIONS": text, "STARS_REWARD_MODEL": "two"})
