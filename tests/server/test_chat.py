"""Chats over HTTP, as clients send them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from helpers.tiny_lm import small_model
from helpers.tiny_tokenizers import bpe_tokenizer

from stars_fast import Engine, StarsParams

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx", "openai"):
    pytest.importorskip(package, reason=f"needs {package}, of the extras server and test")

from helpers.serving import Gate, Served, serving  # noqa: E402

from stars_fast.server import ServerSettings  # noqa: E402

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}
PARAMS = StarsParams(method="vanilla", max_tokens=6, seed=1)
#: Knows tools, and what it is told of thinking.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.name or '' }}:{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<{{ call.function.name }}>{% endfor %};{% endfor %}"
    "{{ '' if enable_thinking is not defined else enable_thinking }}"
)


def engine(**options: Any) -> Engine:
    tokenizer = bpe_tokenizer(chat="chatml")
    tokenizer.chat_template = TEMPLATE
    return Engine(small_model(), tokenizer=tokenizer, num_pages=200, **options)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(engine(), Gate(), ServerSettings("chat", PARAMS)) as running:
        yield running


def text_of(prompt: str) -> str:
    ids = bpe_tokenizer(chat="chatml")(prompt, add_special_tokens=False)["input_ids"]
    (output,) = engine().generate([ids], PARAMS, use_tqdm=False)
    return output.outputs[0].text


def test_an_answer_is_sent_back_as_it_came(served: Served) -> None:
    create = served.client().chat.completions.create
    first = create(model="chat", messages=[USER])  # type: ignore[list-item]
    answer = first.choices[0].message
    for turn in (answer, answer.model_dump(), {**answer.model_dump(), "audio": None, "name": None}):
        again: Any = [USER, turn, USER]
        second = create(model="chat", messages=again)
        prompt = f"user::Hi;assistant::{answer.content};user::Hi;"
        assert second.choices[0].message.content == text_of(prompt)


@pytest.mark.parametrize(
    ("message", "written"),
    [
        ({**USER, "name": "bob"}, "user:bob:Hi;"),
        ({"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {}}]},
         "user::Hi;"),
        ({"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
         "assistant::<f>;"),
        ({"role": "tool", "content": "rain", "tool_call_id": "1"}, "tool::rain;"),
        ({"role": "developer", "content": "Be kind."}, "system::Be kind.;"),
    ],
)  # fmt: skip
def test_messages_reach_the_template(served: Served, message: dict[str, Any], written: str) -> None:
    response = served.post({"messages": [message]}, PATH)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == text_of(written)


def test_variables_of_the_template(served: Served) -> None:
    def content(**fields: Any) -> Any:
        return served.post({"messages": [USER], **fields}, PATH).json()["choices"][0]["message"]

    asked = content(chat_template_kwargs={"enable_thinking": False})
    assert asked["content"] == text_of("user::Hi;False")
    assert content()["content"] == text_of("user::Hi;")
    told = engine(chat_template_kwargs={"enable_thinking": True})
    (output,) = told.generate([USER], PARAMS, use_tqdm=False)
    assert output.prompt == "user::Hi;True"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"messages": []}, "messages", "messages must be a list that is not empty"),
        ({"messages": [{"role": "user"}]}, "messages", "messages[0].content must be text or"),
        ({"messages": [USER, {"role": 3}]}, "messages", "messages[1].role: Input should be"),
        ({"messages": [USER], "chat_template_kwargs": {"tokenize": True}},
         "chat_template_kwargs", "chat_template_kwargs must not set 'tokenize'"),
        ({"messages": [USER], "continue_final_message": True}, "continue_final_message",
         "needs a last message of role 'assistant'"),
    ],
)  # fmt: skip
def test_errors_name_the_place(
    served: Served, body: dict[str, Any], param: str, message: str
) -> None:
    response = served.post(body, PATH)
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    assert error["param"] == param


@pytest.fixture(scope="module")
def calling() -> Iterator[Served]:
    """Its template knows tools, and calls are parsed."""
    made = engine()
    assert made.tokenizer is not None
    made.tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + TEMPLATE
    params = dataclasses.replace(PARAMS, max_tokens=200)
    settings = ServerSettings("chat", params, tool_call_parser="hermes")
    with serving(made, Gate(), settings) as running:
        yield running


class TestTools:
    """A grammar makes the model say what it is to say."""

    TOOL: ClassVar[dict[str, Any]] = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
    }
    SAID = 'Well. <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'

    def ask(self, served: Served, **options: Any) -> Any:
        regex = {"structured_outputs": {"regex": re.escape(self.SAID)}}
        return served.client().chat.completions.create(
            model="chat", messages=[USER], extra_body=regex, **options
        )

    def test_calls_in_the_answer(self, calling: Served) -> None:
        pytest.importorskip("llguidance", reason="needs llguidance, of the extra guided")
        (choice,) = self.ask(calling, tools=[self.TOOL]).choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Well. "
        (call,) = choice.message.tool_calls
        assert (call.function.name, call.function.arguments) == ("f", '{"x": 1}')
        assert self.ask(calling).choices[0].message.content == self.SAID  # no tools, no calls
        content, calls, ends = "", [], []
        for chunk in self.ask(calling, tools=[self.TOOL], stream=True):
            content += chunk.choices[0].delta.content
            calls += chunk.choices[0].delta.tool_calls or []
            ends.append(chunk.choices[0].finish_reason)
        assert (content, ends[-1], {*ends[:-1]}) == ("Well. ", "tool_calls", {None})
        assert [(c.index, c.function.name, c.function.arguments) for c in calls] == [
            (0, "f", '{"x": 1}')
        ]

    def test_the_model_is_told_of_them_unless_it_may_not_call(self, calling: Served) -> None:
        told = {}
        for choice in ("auto", "none", None):
            body = {"messages": [USER], "tools": [self.TOOL], "tool_choice": choice}
            response = calling.post({**body, "max_tokens": 1}, PATH)
            told[choice] = response.json()["usage"]["prompt_tokens"]
        assert told["auto"] == told[None] > told["none"]

    def test_what_cannot_be_done_is_refused(self, served: Served) -> None:
        body = {"messages": [USER], "tools": [self.TOOL]}
        for changes, words in (
            ({"tool_choice": "required"}, "tool_choice must be 'auto' or 'none'"),
            ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "no call is forced"),
            ({}, "tools has no place in the model's chat template"),
            ({"tools": [{"type": "function"}]}, "tools[0].function must be an object"),
        ):
            response = served.post({**body, **changes}, PATH)
            assert response.status_code == 400
            assert words in response.json()["error"]["message"]
