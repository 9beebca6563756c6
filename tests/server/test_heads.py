"""Request heads that do not end."""

from __future__ import annotations

import json
import socket

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx", "openai"):
    pytest.importorskip(package, reason=f"needs {package}, of the extras server and test")
pytest.importorskip("httptools", reason="needs httptools, of the extra server")

import httpx  # noqa: E402
from helpers.serving import Gate, letter_engine, serving  # noqa: E402

from stars_fast.server.head_limit import MAX_HEAD_BYTES  # noqa: E402


def test_a_header_without_end_is_431_and_others_are_served() -> None:
    with serving(letter_engine(Gate()), Gate()) as served:
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
def test_whole_heads(size: int, status: int, step: int) -> None:
    with serving(letter_engine(Gate()), Gate()) as served:
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


def test_long_bodies_are_no_heads() -> None:
    with serving(letter_engine(Gate()), Gate()) as served, httpx.Client() as client:
        for _ in range(3):  # on one connection
            body = {"prompt": "ab", "user": "x" * 200_000}
            response = client.post(f"{served.url}/v1/completions", json=body, timeout=60)
            assert response.status_code == 200
