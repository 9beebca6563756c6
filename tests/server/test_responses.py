"""``/v1/responses``, with OpenAI's own client and without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from helpers.tiny_lm import small_model
from helpers.tiny_tokenizers import bpe_tokenizer

from stars_fast import Engine, StarsParams

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx", "openai"):
    pytest.importorskip(package, reason=f"needs {package}, of the extras server and test")

from helpers.serving import PARAMS, Gate, Served, serving  # noqa: E402

from stars_fast.server import ServerSettings  # noqa: E402
from stars_fast.server.responses import ResponsesAnswer, ResponsesEvent  # noqa: E402

PATH = "/v1/responses"
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"


def engine() -> Engine:
    tokenizer = bpe_tokenizer(chat="chatml")
    tokenizer.chat_template = TEMPLATE
    return Engine(small_model(), Gate(""), tokenizer=tokenizer, num_pages=200)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    params = StarsParams(
        segment_length=4, max_tokens=8, seed=1, target_reward=0.0, ignore_eos=True, max_attempts=2
    )
    with serving(engine(), Gate(), ServerSettings("chat", params)) as running:
        yield running


def text_of(served: Served, chat: list[dict[str, Any]], **fields: Any) -> Any:
    response = served.post({"messages": chat, **fields}, "/v1/chat/completions")
    return response.json()["choices"][0]["message"]["content"]


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("body", "chat"),
    [
        ({"input": "Hi"}, [USER]),
        ({"input": "Hi", "instructions": "Be kind."},
         [{"role": "system", "content": "Be kind."}, USER]),
        ({"input": [{**USER, "type": "message"}]}, [USER]),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]}, [USER]),
        ({"input": [USER, {"type": "message", "id": "msg_1", "role": "assistant",
                           "status": "completed", "content": [
                               {"type": "output_text", "text": "Ho", "annotations": [],
                                "logprobs": []}]}, USER]},
         [USER, {"role": "assistant", "content": "Ho"}, USER]),
        ({"input": [USER, {"type": "function_call_output", "call_id": "1", "output": "42"}]},
         [USER, {"role": "tool", "content": "42"}]),
    ],
)  # fmt: skip
def test_whole(served: Served, body: dict[str, Any], chat: list[dict[str, Any]]) -> None:
    response = served.post({"model": "chat", **body}, PATH)
    assert response.status_code == 200, response.text
    answer = ResponsesAnswer.model_validate_json(response.content, extra="forbid", strict=True)
    (item,) = answer.output
    assert item.content[0].text == text_of(served, chat)
    assert answer.status == "incomplete"  # it came to max_output_tokens
    assert answer.incomplete_details is not None
    assert answer.stars is not None
    assert [segment.end for segment in answer.stars.segments] == [4, 8]
    assert answer.usage is not None
    assert answer.usage.output_tokens == 8


def test_openais_client(served: Served) -> None:
    create = served.client().responses.create
    first = create(model="chat", input="Hi", max_output_tokens=4, temperature=0.5)
    assert first.output_text == text_of(served, [USER], max_tokens=4, temperature=0.5)
    assert first.max_output_tokens == 4
    again: Any = [USER, *[item.model_dump() for item in first.output], USER]
    second = create(model="chat", input=again, instructions="Be kind.", store=True)
    history = [{"role": "system", "content": "Be kind."}, USER,
               {"role": "assistant", "content": first.output_text}, USER]  # fmt: skip
    assert second.output_text == text_of(served, history)


def test_streamed(served: Served) -> None:
    text = text_of(served, [USER])
    client = served.client()
    events: list[Any] = list(client.responses.create(model="chat", input="Hi", stream=True))
    kinds = [event.type for event in events]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(10))
    texts = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(texts) == events[-1].response.output_text == text
    assert events[-1].response.usage.output_tokens == 8
    # The client's helper wants a response that ended by itself.
    ending: Any = {"stop": text[-3:]}
    with client.responses.stream(model="chat", input="Hi", extra_body=ending) as stream:
        assert (
            "".join(e.delta for e in stream if e.type == "response.output_text.delta")
            == (text[: text.index(text[-3:])])
        )
        assert stream.get_final_response().status == "completed"
    raw = served.post({"input": "Hi", "stream": True}, PATH).text
    for block in raw.strip().split("\n\n"):
        name, data = block.split("\n")
        event = ResponsesEvent.model_validate_json(
            data.removeprefix("data: "), extra="forbid", strict=True
        )
        assert name == f"event: {event.type}"


def test_a_response_that_ends_is_completed(served: Served) -> None:
    text = text_of(served, [USER])
    stop = text[len(text) // 2]
    body = {"input": "Hi", "stop": stop, "ignore_eos": True, "top_k": 40}
    answer = served.post(body, PATH).json()
    assert answer["status"] == "completed"
    assert answer["incomplete_details"] is None
    assert answer["output"][0]["content"][0]["text"] == text[: text.index(stop)]
    assert "response.completed" in served.post({**body, "stream": True}, PATH).text


def test_what_asks_for_nothing_is_accepted(served: Served) -> None:
    nothing = {
        "include": [], "background": False, "previous_response_id": None, "store": True,
        "text": {"format": {"type": "text"}, "verbosity": "low"}, "tool_choice": "auto",
        "tools": [], "truncation": "disabled", "reasoning": {"effort": "low"}, "metadata": {},
        "parallel_tool_calls": True, "top_logprobs": 0, "stop": None, "service_tier": "auto",
    }  # fmt: skip
    assert served.post({"input": "Hi", **nothing}, PATH).status_code == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "input is missing"),
        ({"input": []}, "input must be a list that is not empty"),
        ({"input": [{"role": "user"}]}, "input[0].content must be text"),
        ({"input": [{"type": "item_reference", "id": "1"}]}, "input[0] has type 'item_reference'"),
        ({"input": "Hi", "previous_response_id": "resp_1"}, "previous_response_id is not support"),
        ({"input": "Hi", "text": {"format": {"type": "json_schema"}}}, "json_schema is missing"),
        ({"input": "Hi", "text": {"format": {"type": "xml"}}}, "must be text, json_object or"),
        ({"input": "Hi", "stars": {"n": 2}}, "n must be 1 at /v1/responses"),
        ({"input": "Hi", "max_output_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_errors(served: Served, body: dict[str, Any], message: str) -> None:
    response = served.post(body, PATH)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_a_stream_that_fails_says_so() -> None:
    gate = Gate("u")  # every prompt here begins with "user"
    broken = Engine(small_model(), gate, tokenizer=engine().tokenizer, num_pages=100)
    with serving(broken, gate, ServerSettings("chat", PARAMS)) as served:
        raw = served.post({"input": "Hi", "stream": True}, PATH).text
        last = ResponsesEvent.model_validate_json(raw.strip().split("data: ")[-1])
        assert last.type == "response.failed"
        assert last.response is not None
        assert last.response.error is not None
        assert "no reward for c" in last.response.error.message
