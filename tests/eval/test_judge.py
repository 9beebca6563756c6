"""The judge, against a server; how its calls are made again: tests/remote/test_http.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("httpx", reason="needs httpx, of the extra eval")

from helpers.json_server import Answer, json_server

from stars_fast.eval.judge import JudgeError, PairJudge, verdict_of
from stars_fast.remote.http import Endpoint


class Server:
    """An endpoint that prefers the longer response, after the answers that it is told to give."""

    def __init__(self) -> None:
        self.first: list[Answer] = []
        self.says: str | None = None
        self.requests: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Answer:
        self.requests.append((path, body))
        if self.first:
            return self.first.pop(0)
        text = body["messages"][0]["content"]
        a, b = (text.split(f"[Response {x}]\n")[1].split("\n[End")[0] for x in "AB")
        verdict = "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
        return 200, {}, {"choices": [{"message": {"content": self.says or verdict}}]}


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def judge(server: Server) -> Iterator[PairJudge]:
    with json_server(server) as url:
        endpoint = Endpoint(f"{url}/v1", retries=0)
        yield PairJudge(endpoint, "judge-1", workers=1)
        endpoint.close()


def test_both_orders_are_asked(server: Server, judge: PairJudge) -> None:
    assert judge.compare("p", "long {b} answer", "short") == (1.0, 1.0)
    assert judge.compare("p", "short", "long answer") == (0.0, 0.0)
    assert judge.compare("p", "same", "size") == (0.5, 0.5)
    path, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert body["temperature"] == 0
    assert body["model"] == "judge-1"
    assert "[Response A]\nlong {b} answer\n" in body["messages"][0]["content"]
    assert "[Response B]\nlong {b} answer\n" in server.requests[1][1]["messages"][0]["content"]


def test_a_judge_that_goes_by_the_place_contradicts_itself(
    server: Server, judge: PairJudge
) -> None:
    server.says = "A"
    assert judge.compare("p", "x", "y") == (1.0, 0.0)


@pytest.mark.parametrize("sent", [{}, [], {"choices": []}, {"choices": [{"message": None}]}])
def test_an_answer_that_is_no_completion(server: Server, judge: PairJudge, sent: object) -> None:
    server.first = [(200, {}, sent)]
    with pytest.raises(JudgeError, match="no chat completion"):
        judge.ask("p", "x", "y")


def test_a_bad_answer_harms_no_other(server: Server, judge: PairJudge) -> None:
    pairs = [("p", "x" * n, "yyy") for n in range(1, 7)]
    server.first = [(400, {}, {"detail": "too long"})]
    results = dict(judge.compare_all(pairs))
    errors = {place: str(found) for place, found in results.items() if isinstance(found, Exception)}
    assert len(errors) == 1
    assert "status 400: too long" in next(iter(errors.values()))
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
