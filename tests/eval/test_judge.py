"""The judge, against a server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from stars_fast.eval.judge import Judge, JudgeError, verdict_of


class Server:
    """An endpoint that prefers the longer response and can misbehave.

    Attributes
    ----------
    requests
        Bodies and headers, in order.
    failures
        Statuses to answer with first; 0 closes the connection without an answer.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.failures: list[int] = []
        self.answer: str | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.handle(self)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        self.requests.append((body, dict(handler.headers)))
        if self.failures:
            status = self.failures.pop(0)
            if status:
                handler.send_error(status)
            return
        if handler.path != "/v1/chat/completions":
            handler.send_error(404)
            return
        text = body["messages"][0]["content"]
        a, b = (text.split(f"[Response {x}]\n")[1].split("\n[End")[0] for x in "AB")
        verdict = "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
        reply = {"choices": [{"message": {"content": self.answer or verdict}}]}
        data = json.dumps(reply).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        thread.join()
        server.http.server_close()


def judge(server: Server, **options: Any) -> Judge:
    return Judge(server.url, "judge-1", **{"backoff": 0.001, "timeout": 5.0, **options})


def test_both_orders_are_asked(server: Server) -> None:
    assert judge(server).compare("p", "long {b} answer", "short") == (1.0, 1.0)
    assert judge(server).compare("p", "short", "long answer") == (0.0, 0.0)
    assert judge(server).compare("p", "same", "size") == (0.5, 0.5)
    body, headers = server.requests[0]
    assert body["temperature"] == 0
    assert body["model"] == "judge-1"
    assert "[Response A]\nlong {b} answer\n" in body["messages"][0]["content"]
    assert "[Response B]\nlong {b} answer\n" in server.requests[1][0]["messages"][0]["content"]
    assert "Authorization" not in headers


def test_a_judge_that_goes_by_the_place_contradicts_itself(server: Server) -> None:
    server.answer = "A"
    assert judge(server).compare("p", "x", "y") == (1.0, 0.0)


def test_the_key_is_sent(server: Server) -> None:
    judge(server, key="secret").ask("p", "x", "y")
    assert server.requests[0][1]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("failures", [[429], [500, 503], [0], [0, 502, 408]])
def test_a_busy_endpoint_is_asked_again(server: Server, failures: list[int]) -> None:
    server.failures = list(failures)
    assert judge(server).ask("p", "longer", "x") == "A"
    assert len(server.requests) == len(failures) + 1


def test_tries_come_to_an_end(server: Server) -> None:
    server.failures = [503] * 9
    with pytest.raises(JudgeError, match="HTTP 503"):
        judge(server, retries=2).ask("p", "x", "y")
    assert len(server.requests) == 3


def test_a_refusal_is_not_repeated(server: Server) -> None:
    server.failures = [401]
    with pytest.raises(JudgeError, match="HTTP 401"):
        judge(server).ask("p", "x", "y")
    assert len(server.requests) == 1


def test_nobody_there() -> None:
    with pytest.raises(JudgeError, match="127.0.0.1:9"):
        Judge("http://127.0.0.1:9", "m", retries=1, backoff=0.001).ask("p", "x", "y")
    with pytest.raises(ValueError, match="http"):
        Judge("file:///etc/passwd", "m")


def test_a_bad_answer_harms_no_other(server: Server) -> None:
    pairs = [("p", "x" * n, "yyy") for n in range(1, 7)]
    server.failures = [400]
    results = dict(judge(server, workers=1).compare_all(pairs))
    errors = [place for place, found in results.items() if isinstance(found, JudgeError)]
    assert len(errors) == 1
    expected = [(0.0, 0.0)] * 2 + [(0.5, 0.5)] + [(1.0, 1.0)] * 3
    assert all(results[i] == expected[i] for i in range(6) if i not in errors)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("A", "A"),
        (" b.\n", "B"),
        ("**Tie**", "tie"),
        ("Response B is better.", "B"),
        ("My final verdict is: [[A]]", "A"),
        ("[[C]]", "tie"),
        ("Both are fine, but one is longer.\n\nVerdict: A", "A"),
    ],
)
def test_verdicts(answer: str, verdict: str) -> None:
    assert verdict_of(answer) == verdict


@pytest.mark.parametrize("answer", ["", "A or B", "A good answer would be B", "neither", "AB"])
def test_no_verdict(answer: str) -> None:
    with pytest.raises(JudgeError, match="no verdict"):
        verdict_of(answer)
