"""Calls are made again where that can help, and end with what the server said where it cannot."""

from __future__ import annotations

import socket
from typing import Any

import pytest

pytest.importorskip("httpx", reason="needs httpx, of the extra remote")

from helpers.json_server import Answer, json_server

from stars_fast.remote import RemoteError, http
from stars_fast.remote.http import Endpoint

AT_ONCE = {"Retry-After": "0"}


class Failing:
    """Fails with each of the given answers in turn, then tells what it was asked."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, Any]] = []
        self.headers: dict[str, str] = {}

    def __call__(self, path: str, body: Any, headers: dict[str, str]) -> Answer:
        self.asked.append((path, body))
        self.headers = headers
        return self.answers.pop(0) if self.answers else (200, {}, {"body": body})


def test_passing_failures_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_FIRST_WAIT", 0.01)
    server = Failing((429, AT_ONCE, {}), (503, AT_ONCE, b"busy"), (500, {}, {}), (0, {}, None))
    with json_server(server) as url:
        endpoint = Endpoint(f"{url}/v1/", api_key="secret")
        assert endpoint.post("/completions", {"a": 1}) == {"body": {"a": 1}}
        assert endpoint.stats() == {"http_calls": 5, "http_retries": 4}
        endpoint.close()
    assert server.asked == [("/v1/completions", {"a": 1})] * 5
    assert server.headers["Authorization"] == "Bearer secret"


def test_a_wrong_request_is_not_tried_again() -> None:
    server = Failing((400, {}, {"error": {"message": "max_tokens must be at least 1"}}))
    with json_server(server) as url:
        endpoint = Endpoint(url)
        with pytest.raises(RemoteError, match="status 400: max_tokens must be at least 1"):
            endpoint.post("/completions", {})
        endpoint.close()
    assert len(server.asked) == 1


def test_the_last_failure_is_raised() -> None:
    server = Failing(*[(503, AT_ONCE, {"detail": "no worker"})] * 9)
    with json_server(server) as url:
        endpoint = Endpoint(url, retries=2)
        with pytest.raises(RemoteError, match=r"status 503: no worker \(3 times\)"):
            endpoint.get("/models")
        endpoint.close()
    assert len(server.asked) == 3


def test_no_server() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = Endpoint(f"http://127.0.0.1:{port}", retries=0)
    with pytest.raises(RemoteError, match="ConnectError"):
        endpoint.get("/models")
    endpoint.close()


def test_an_answer_that_is_not_json() -> None:
    with json_server(Failing((200, {}, b"<html>"))) as url:
        endpoint = Endpoint(url)
        with pytest.raises(RemoteError, match="not JSON: '<html>'"):
            endpoint.get("/models")
        endpoint.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "127.0.0.1:8000"}, "base_url must be an address such as"),
        ({"timeout": 0}, "timeout must be above 0"),
        ({"retries": -1}, "retries must be at least 0"),
        ({"max_connections": 0}, "max_concurrency must be at least 1"),
    ],
)
def test_bad_parameters(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Endpoint(**({"base_url": "http://127.0.0.1"} | options))
