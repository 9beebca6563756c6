"""Requests that do not end, and connections that say nothing."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx", "openai"):
    pytest.importorskip(package, reason=f"needs {package}, of the extras server and test")
pytest.importorskip("httptools", reason="needs httptools, of the extra server")

import httpx  # noqa: E402
from helpers.serving import Gate, Served, letter_engine, serving  # noqa: E402

from stars_fast.server.connection import MAX_HEAD_BYTES, Connection  # noqa: E402


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(letter_engine(Gate()), Gate()) as served:
        yield served


def test_a_header_without_end_is_431_and_others_are_served(served: Served) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"GET /health HTTP/1.1\r\nHost: {host}\r\nX-Endless: ".encode())
        sent = 0
        try:
            while sent < 100 * MAX_HEAD_BYTES:
                sent += connection.send(b"a" * 4096)
        except OSError:
            pass  # the server has closed the connection
        assert sent < 100 * MAX_HEAD_BYTES
    assert httpx.get(f"{served.url}/health").status_code == 200


@pytest.mark.parametrize(("size", "status"), [(1000, 200), (60_000, 200), (70_000, 431)])
@pytest.mark.parametrize("step", [999, 1 << 20])
def test_whole_heads(served: Served, size: int, status: int, step: int) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    request = f"GET /version HTTP/1.1\r\nHost: {host}\r\nX-Long: {'a' * size}\r\n"
    data = (request + "Connection: close\r\n\r\n").encode()
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        for begin in range(0, len(data), step):
            try:
                connection.sendall(data[begin : begin + step])
            except OSError:
                break
        answer = b""
        try:
            while part := connection.recv(4096):
                answer += part
        except ConnectionResetError:  # it closed with some of our bytes unread
            assert status == 431
    head, _, body = answer.partition(b"\r\n\r\n")
    if answer:
        assert head.startswith(f"HTTP/1.1 {status}".encode())
        assert ("version" in json.loads(body)) == (status == 200)


def test_long_bodies_are_no_heads(served: Served) -> None:
    with httpx.Client() as client:
        for _ in range(3):  # on one connection
            body = {"prompt": "ab", "user": "x" * 200_000}
            response = client.post(f"{served.url}/v1/completions", json=body, timeout=60)
            assert response.status_code == 200


POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


def answer_to(url: str, *parts: bytes) -> bytes:
    """What comes back until the server closes the connection, which the client leaves open."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        answer = b""
        try:
            for part in parts:
                connection.sendall(part)
            while part := connection.recv(4096):
                answer += part
        except OSError:
            pass  # closed with some of our bytes unread
        return answer


def test_what_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "patience", 0.2)
    gate = Gate()
    with serving(letter_engine(gate), gate) as served:
        assert answer_to(served.url) == b""
        body = b'{"prompt": "ab"}'
        whole = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
        for part in (POST, whole[:-1], CHUNKED + b"5\r\n"):
            head, _, error = answer_to(served.url, part).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ")
            assert json.loads(error)["error"]["code"] == "request_timeout"
        # Who waits for an answer may do so, and send the next request meanwhile.
        gate.open.clear()
        threading.Timer(1.0, gate.open.set).start()
        assert answer_to(served.url, whole, POST).count(b"HTTP/1.1 200 ") == 1


def test_chunks_without_a_body_are_refused(served: Served) -> None:
    endless = [b"X-Trailer: " + b"a" * 4096 + b"\r\n"] * 50
    for parts in ([b"0\r\n", *endless], [b"1;" + b"a" * 200_000 + b"\r\n"]):
        assert b" 200 " not in answer_to(served.url, CHUNKED, *parts)
    body = json.dumps({"prompt": "ab", "user": "x" * 15_000}).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    close = CHUNKED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    assert b" 200 " in answer_to(served.url, close, chunks)


def test_head_is_get_without_a_body(served: Served) -> None:
    for path in ("/", "/health", "/v1/models", "/metrics"):
        assert httpx.head(served.url + path).status_code == 200
        assert httpx.head(served.url + path).content == b""
    assert httpx.head(f"{served.url}/v1/completions").status_code == 405
