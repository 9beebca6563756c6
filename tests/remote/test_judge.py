"""A language model as reward: what it is asked, and how its answers and failures are read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("httpx", reason="needs httpx, of the extra remote")

from helpers.json_server import Answer, json_server
from helpers.letter_law import letter_engine, reward_model, reward_of
from helpers.tiny_lm import small_model
from helpers.tiny_tokenizers import bpe_tokenizer

from stars_fast import Engine, Judge, StarsParams
from stars_fast.remote import RemoteError
from stars_fast.remote.judge import number_on

PARAMS = StarsParams(
    segment_length=2, max_tokens=8, target_reward=0.8, top_k=0, temperature=1.0, seed=4
)
POINTWISE = "{low}..{high}|{prompt}|{response}"
PAIRWISE = "{low}..{high}|{prompt}|{response}|{committed}"


class Server:
    """Rates a question, its parts in order, as the given function does."""

    def __init__(self, rate: Callable[..., str]) -> None:
        self.rate = rate
        self.questions: list[list[str]] = []
        self.bodies: list[dict[str, Any]] = []

    def __call__(self, path: str, body: Any, headers: dict[str, str]) -> Answer:
        assert path == "/v1/chat/completions"
        (message,) = body["messages"]
        question = message["content"].split("|")
        self.bodies.append(body)
        self.questions.append(question)
        return 200, {}, {"choices": [{"message": {"content": self.rate(*question[1:])}}]}


def test_an_engine_gets_the_same_responses_as_with_a_function() -> None:
    prompts, params = ["ab", "c{}a"], replace(PARAMS, candidates=2)
    local = letter_engine(reward_model).generate(prompts, params, use_tqdm=False)
    server = Server(lambda prompt, response: f"I rate it {reward_of(response):.20f}/2.")
    with json_server(server) as url:
        judge = Judge(f"{url}/v1/", "judge", POINTWISE, (-2, 2), extra_body={"max_tokens": 9})
        outputs = letter_engine(judge).generate(prompts, params, use_tqdm=False)
        asked = len(server.questions)
        letter_engine(judge).generate(prompts, params, use_tqdm=False)
        judge.close()
    assert [o.outputs[0].segments for o in outputs] == [o.outputs[0].segments for o in local]
    assert len(server.questions) == asked  # all of them were known
    assert len({tuple(question) for question in server.questions}) == asked
    assert {question[0] for question in server.questions} == {"-2..2"}
    assert {question[1] for question in server.questions} == {"ab", "c{}a"}
    for body in server.bodies:
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0, 9)


@pytest.mark.parametrize("method", ["stars", "smc"])
def test_pairs_are_of_a_response_and_what_it_continues(method: Any) -> None:
    server = Server(lambda _, text, committed: f"{reward_of(text) - reward_of(committed):.20f}")
    params = PARAMS
    if method == "smc":
        params = PARAMS.with_method("smc", beta=0.2, candidates=4, ess_threshold=1.0)
    with json_server(server) as url:
        judge = Judge(f"{url}/v1", "judge", PAIRWISE, (-4, 4))
        outputs = letter_engine(judge).generate(["ab", "ca"], params, use_tqdm=False)
        assert judge.score(["ab"], ["bc"], ["b"]) == [reward_of("bc") - reward_of("b")]
        judge.close()
    for output in outputs:
        assert output.error is None
        (found,) = output.outputs
        assert len(found.segments) > 1
        for segment in found.segments:
            committed, text = found.text[: segment.start], found.text[: segment.end]
            assert segment.reward == reward_of(text) - reward_of(committed)
    for _, _, text, committed in server.questions:
        assert text.startswith(committed)


def test_a_failed_question_harms_no_other() -> None:
    answers = {"b": "no idea", "c": "42", "d": ""}

    def server(path: str, body: Any, headers: dict[str, str]) -> Answer:
        response = body["messages"][0]["content"].split("|")[2]
        if response == "a":
            return 400, {}, {"error": {"message": "too long"}}
        if response == "e":
            return 200, {}, {"choices": []}
        return 200, {}, {"choices": [{"message": {"content": answers.get(response, "6")}}]}

    errors = {
        "a": "status 400: too long",
        "b": "the judge gave no number in its answer 'no idea'",
        "c": "the judge gave no number from 1 to 10, but 42, in its answer '42'",
        "d": "the judge gave no number in its answer ''",
        "e": "the answer is no chat completion",
    }
    with json_server(server) as url:
        judge = Judge(f"{url}/v1", "judge", POINTWISE)
        engine = letter_engine(judge)
        params = PARAMS.with_method("best_of_n", candidates=1, max_tokens=1, seed=None)
        outputs = engine.generate(["ab"] * 12, params, use_tqdm=False)
        for response, message in errors.items():
            with pytest.raises(RemoteError, match=message):
                judge.score(["ab"], [response])
        judge.close()
    seen = set()
    for output in outputs:
        text = output.outputs[0].text
        seen.add(text in errors)
        assert (output.error is not None) == (text in errors)
        assert text not in errors or errors[text] in str(output.error)
    assert seen == {True, False}


def test_the_expected_number() -> None:
    likely = [(" 4", 0.5), ("5", 0.2), ("5 ", 0.01), ("x", 0.2), ("9", 0.09)]
    tops = [{"token": token, "logprob": math.log(p)} for token, p in likely]
    content = [
        {"token": "Rating:", "logprob": 0.0, "top_logprobs": []},
        {"token": " 4", "logprob": math.log(0.5), "top_logprobs": tops},
        {"token": "/", "logprob": 0.0, "top_logprobs": []},
        {"token": "5", "logprob": 0.0, "top_logprobs": []},
    ]
    choice: dict[str, Any] = {"message": {"content": "Rating: 4/5"}}
    bodies = []

    def server(path: str, body: Any, headers: dict[str, str]) -> Answer:
        bodies.append(body)
        return 200, {}, {"choices": [choice]}

    with json_server(server) as url:
        judge = Judge(f"{url}/v1", "judge", POINTWISE, (1, 5), read="expected")
        with pytest.raises(RemoteError, match="no top_logprobs of its number 4"):
            judge.score(["ab"], ["a"])
        choice["logprobs"] = {"content": content}
        assert judge.score(["ab"], ["a"]) == [pytest.approx((4 * 0.5 + 5 * 0.2) / 0.7)]
        judge.close()
    assert bodies[0]["logprobs"] is True
    assert bodies[0]["top_logprobs"] > 5


@pytest.mark.parametrize("read", ["text", "expected"])
def test_our_own_server_as_judge(read: Any) -> None:
    for package in ("fastapi", "uvicorn", "prometheus_client", "openai", "llguidance"):
        pytest.importorskip(package, reason=f"needs {package}, of the extras server and test")
    from helpers.gate import Gate
    from helpers.serving import serving

    from stars_fast.server import ServerSettings

    model = Engine(small_model(), tokenizer=bpe_tokenizer(chat="chatml"), num_pages=200)
    settings = ServerSettings("chat", StarsParams(method="vanilla", max_tokens=4))
    body = {"structured_outputs": {"regex": "Rating: [1-9]"}, "max_tokens": 40}
    with serving(model, Gate(), settings) as served:
        judge = Judge(
            f"{served.url}/v1", "chat", POINTWISE, (1, 9), read=read, extra_body=body, retries=0
        )
        ratings = judge.score(["ab", "ab", "ca"], ["a", "bb", ""])
        assert judge.score(["ab"], ["a"]) == ratings[:1]
        judge.close()
    assert all(1 <= rating <= 9 for rating in ratings)
    assert read == "expected" or all(rating == round(rating) for rating in ratings)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("8", "8"),
        ("Rating: **9**", "9"),
        ("[[6]]", "6"),
        ("Score: 7.5.", "7.5"),
        ("8/10", "8"),
        ("10 / 10", "10"),
        ("3 out of 10.", "3"),
        ("I'd give 7 on a scale of 1 to 10.", "7"),
        ("On a scale of 1-10: 4", "4"),
        ("5 (as in 2024)", "5"),
        ("First 2, then 3", "3"),
    ],
)
def test_the_last_number_on_the_scale(answer: str, number: str) -> None:
    assert number_on(answer, 1, 10) == number


@pytest.mark.parametrize("answer", ["", "eight", "-8", "75%", "7.5%", "v8", "11", "0.5"])
def test_no_number_on_the_scale(answer: str) -> None:
    with pytest.raises(RemoteError, match="the judge gave no number"):
        number_on(answer, 1, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost"}, "url must be an address such as"),
        ({"model": ""}, "model must be the name of a model"),
        ({"prompt": "{prompt}"}, "prompt must be text with {response} in it"),
        ({"scale": 10}, "scale must be two numbers"),
        ({"scale": (5, 1)}, "scale must be two numbers, the lower one first"),
        ({"scale": (0, math.inf)}, "scale must be two numbers"),
        ({"read": "mean"}, "read must be 'text' or 'expected'"),
        ({"read": "expected"}, r"scale must lie in 0 to 9 where read is 'expected', got \(1, 10\)"),
        ({"cache_size": -1}, "cache_size must be at least 0"),
        ({"max_concurrency": 0}, "max_concurrency must be at least 1"),
    ],
)
def test_bad_parameters(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Judge(**({"url": "http://127.0.0.1/v1", "model": "judge"} | options))
