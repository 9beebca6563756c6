"""Pictures in chats over HTTP: data URLs, and links to hosts that the server was told of."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.json_server import Answer, json_server
from helpers.tiny_vision import PICTURES, chat, tiny_vision

from stars_fast import Engine, StarsParams

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx", "openai"):
    pytest.importorskip(package, reason=f"needs {package}, of the extras server and test")

from helpers.serving import Gate, Served, serving  # noqa: E402

from stars_fast.server import ServerSettings  # noqa: E402

PATH = "/v1/chat/completions"
PARAMS = StarsParams(method="vanilla", temperature=0, max_tokens=6)
UPRIGHT = PICTURES[0]


def png() -> bytes:
    file = io.BytesIO()
    UPRIGHT.save(file, "PNG")
    return file.getvalue()


DATA_URL = f"data:image/png;base64,{base64.b64encode(png()).decode()}"


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    answers: dict[str, Answer] = {
        "/cat.png": (200, {}, png()),
        "/moved.png": (302, {"Location": "/cat.png"}, b""),
    }
    with json_server(lambda path, _, __: answers.get(path, (404, {}, b""))) as url:
        yield url.removeprefix("http://")


@pytest.fixture(scope="module")
def engine() -> Engine:
    model, processor = tiny_vision("llava")
    return Engine(model, processor=processor, page_size=4, num_pages=200)


@pytest.fixture(scope="module")
def expected(engine: Engine) -> str:
    (output,) = engine.generate(chat(UPRIGHT, "w1 w2"), PARAMS, use_tqdm=False)
    return output.outputs[0].text


@pytest.fixture(scope="module")
def served(engine: Engine, expected: str, host: str) -> Iterator[Served]:
    settings = ServerSettings("llava", PARAMS, image_hosts=(host,))
    with serving(engine, Gate(), settings, front=True) as running:
        yield running


def body(url: object, kind: str = "image_url") -> dict[str, Any]:
    value = {"url": url, "detail": "low"} if kind == "image_url" else url
    parts = [{"type": kind, kind: value}, {"type": "text", "text": "w1 w2"}]
    return {"messages": [{"role": "user", "content": parts}]}


@pytest.mark.parametrize("url", [DATA_URL, "http://{host}/cat.png"], ids=["data", "link"])
def test_an_image_is_seen(served: Served, host: str, expected: str, url: str) -> None:
    answer = served.post(body(url.format(host=host)), PATH)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == expected
    assert answer.json()["usage"]["prompt_tokens"] == 20


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (body("data:image/png;base64,AAAA"), "no picture of a format"),
        (body("http://elsewhere/cat.png"), "leads to 'elsewhere', from which this server"),
        (body("http://{host}/moved.png"), "cannot be fetched: HTTP Error 302"),
        (body("http://{host}/none.png"), "cannot be fetched: HTTP Error 404"),
        (body("http://[/"), "no link"),
        (body("file:///etc/hostname"), "must be a data URL"),
        (body("/etc/hostname", "image"), "must be given"),  # a path of the server's
        (body(7), "messages[0].content"),
    ],
)
def test_a_bad_image_is_the_clients_fault(
    served: Served, host: str, sent: dict[str, Any], reason: str
) -> None:
    part = sent["messages"][0]["content"][0]
    if "image_url" in part and isinstance(part["image_url"]["url"], str):
        part["image_url"]["url"] = part["image_url"]["url"].format(host=host)
    answer = served.post(sent, PATH)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]["message"]
