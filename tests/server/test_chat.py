"""Chats over HTTP, as clients send them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
