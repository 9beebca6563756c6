"""Chats as clients write them, through templates that know more or less."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.tiny_tokenizers import bpe_tokenizer

from stars_fast.prompts import PromptReader, as_prompt_list, prompt_of
from stars_fast.text.chats import chat_of, checked_kwargs, render

USER = {"role": "user", "content": "Hi"}
CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"at": "Ulm"}'},
}

#: The shape of templates that know tools and thinking.
TOOLS = (
    "{% for m in messages %}[{{ m.role }}:{% if m.name %}{{ m.name }}:{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<{{ call.function.name }} "
    "{{ call.function.arguments.at }}>{% endfor %}]{% endfor %}"
    "{% if add_generation_prompt %}[assistant:"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% endif %}{% endif %}"
)
#: The shape of Zephyr's: other roles vanish.
THREE_ROLES = (
    "{% for m in messages %}{% if m.role == 'user' %}U{{ m.content }}{% elif m.role == 'system' %}"
    "S{{ m.content }}{% elif m.role == 'assistant' %}A{{ m.content }}{% endif %}{% endfor %}"
)


def written(value: Any, template: str = TOOLS, **variables: Any) -> str:
    tokenizer = bpe_tokenizer(chat="chatml")
    tokenizer.chat_template = template
    return render(chat_of(value), tokenizer, variables)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": "A", "refusal": None, "annotations": [], "audio": None}, "A"),
        ({"content": "A", "function_call": None, "tool_calls": None, "stars": {"x": 1}}, "A"),
        ({"content": None, "refusal": "No."}, "No."),
        ({"content": None}, ""),
        ({}, ""),
        ({"content": [{"type": "text", "text": "A", "cache_control": {"type": "e"}}, "B"]}, "AB"),
        ({"content": [{"type": "output_text", "text": "A", "annotations": []},
                      {"type": "refusal", "refusal": "B"}]}, "AB"),
    ],
)  # fmt: skip
def test_an_answer_can_be_sent_back(message: dict[str, Any], expected: str) -> None:
    chat = chat_of([USER, {"role": "assistant", **message}, USER])
    assert chat.messages[1] == {"role": "assistant", "content": expected}


def test_names_and_tools_reach_the_template() -> None:
    chat = [
        {**USER, "name": "bob"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    assert written(chat) == "[user:bob:Hi][assistant:<weather Ulm>][tool:rain][assistant:"
    # What the client has sent is left as it was.
    assert CALL["function"]["arguments"] == '{"at": "Ulm"}'  # type: ignore[index]


def test_variables_of_the_template() -> None:
    quiet = {"enable_thinking": False}
    assert written([USER]).endswith("[assistant:")
    assert written({"messages": [USER], "chat_template_kwargs": quiet}).endswith("<think></think>")
    assert written([USER], **quiet).endswith("<think></think>")
    loud = {"messages": [USER], "chat_template_kwargs": {"enable_thinking": True}}
    assert written(loud, **quiet).endswith("[assistant:")


def test_the_last_message_can_be_continued() -> None:
    messages = [USER, {"role": "assistant", "content": "Well,"}]
    asked = {"messages": messages, "continue_final_message": True}
    assert written(asked) == "[user:Hi][assistant:Well,"
    closed = {"messages": messages, "add_generation_prompt": False}
    assert written(closed) == "[user:Hi][assistant:Well,]"
    for bad in ({**asked, "messages": [USER]}, {**asked, "add_generation_prompt": True}):
        with pytest.raises(ValueError, match="continue_final_message"):
            chat_of(bad)


def test_a_developer_is_the_system_where_the_template_knows_none() -> None:
    chat = [{"role": "developer", "content": "Be kind."}, USER]
    assert written(chat).startswith("[system:Be kind.]")
    knowing = "{# developer #}" + TOOLS
    assert written(chat, knowing).startswith("[developer:Be kind.]")
    assert chat_of(chat).plain_messages[0]["role"] == "system"


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def test_functions_that_may_be_called_reach_the_template() -> None:
    template = "{{ tools | tojson }}" + TOOLS
    asked = {"messages": [USER], "tools": [WEATHER]}
    assert written(asked, template).startswith('[{"type": "function", "function": {"name": "wea')
    assert written({"messages": [USER], "tools": []}, template).startswith("null[user")
    with pytest.raises(ValueError, match="tools has no place in the model's chat template"):
        written(asked)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("f", "tools must be a list, got 'f'"),
        ([{"type": "web_search"}], r"tools\[0\] must be .*got .*web_search"),
        ([{"type": "function"}], r"tools\[0\].function must be an object, got null"),
        ([{"function": {}}], r"tools\[0\].function.name must be text, got null"),
    ],
)
def test_tools_that_are_none(tools: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat_of({"messages": [USER], "tools": tools})


class TestNothingIsLostSilently:
    def test_roles(self) -> None:
        chat = [USER, {"role": "tool", "content": "rain"}]
        with pytest.raises(ValueError, match=r"^messages\[1\] has role 'tool', which the model's"):
            written(chat, THREE_ROLES)
        with pytest.raises(ValueError, match=r"role 'tool'"):  # though "Hi" stands there
            written([USER, {"role": "tool", "content": "Hi"}], THREE_ROLES)
        assert written([{"role": "system", "content": " x\n"}, USER], THREE_ROLES) == "S x\nUHi"

    def test_a_text_that_is_escaped_is_there(self) -> None:
        escaped = "{% for m in messages %}{{ m.content | tojson }}{% endfor %}"
        assert written([{"role": "tool", "content": 'a"b'}], escaped) == '"a\\"b"'

    def test_tool_calls(self) -> None:
        chat = [USER, {"role": "assistant", "content": "A", "tool_calls": [CALL]}]
        with pytest.raises(ValueError, match=r"messages\[1\] has tool_calls, which the model's"):
            written(chat, THREE_ROLES)


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        ([], "messages must be a list that is not empty"),
        ([USER, 5], r"messages\[1\] must be \{"),
        ([{"content": "x"}], r"messages\[0\].role must be text that is not empty, got null"),
        ([{"role": "user", "content": None}], r"messages\[0\].content must be text or a list"),
        ([{"role": "tool"}], r"messages\[0\].content must be text or a list .* got null"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "content.0. has type 'image_url'"),
        ([{"role": "user", "content": [{"text": "x"}]}], r"content\[0\] must be"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].text must be text"),
        ([{"role": "assistant", "content": "x", "audio": {"id": "1"}}], "audio is not supported"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], r"tool_calls\[0\].function must be"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
         r"messages\[0\].tool_calls\[0\].function.arguments must be JSON, got '\{'"),
        ({"messages": [USER], "chat_template_kwargs": {"tokenize": True}}, "not set 'tokenize'"),
        ({"messages": [USER], "chat_template_kwargs": {"chat_template": "x"}}, "must not set"),
        ({"messages": [USER], "chat_template_kwargs": 3}, "chat_template_kwargs must be an object"),
        ({"messages": [USER], "template": 3}, "unknown key 'template' of a chat"),
        ({"messages": [USER], "add_generation_prompt": 1}, "add_generation_prompt must be true or"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(chat: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        chat_of(chat)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ raise_exception('no') }}", "messages of roles user are refused .*: no$"),
        ("{{ messages[9].content.x }}", "has no element 9"),
        ("{% if %}", "refused by the chat template"),
    ],
)
def test_whatever_a_template_raises_is_this_prompts_error(template: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        written([USER], template)


def test_every_reserved_name_is_refused() -> None:
    import inspect

    from transformers import PreTrainedTokenizerBase

    own = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    for name in own.keys() - {"self", "tools", "documents", "kwargs"}:
        with pytest.raises(ValueError, match="must not set"):
            checked_kwargs({name: None})


def test_python_and_records_take_the_same() -> None:
    tokenizer = bpe_tokenizer(chat="chatml")
    tokenizer.chat_template = TOOLS
    reader = PromptReader(tokenizer, len(tokenizer), None)
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    record = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}
    prompt = prompt_of({**record, **options, "add_generation_prompt": None})
    assert prompt == {**record, **options}
    read = reader.read(prompt, 4)
    assert read.text == "[user:Hi][assistant:<think></think>"
    assert read.messages == [USER]
    assert prompt_of(record) == record["messages"]
    with pytest.raises(ValueError, match="chat_template_kwargs needs messages, got prompt"):
        prompt_of({"prompt": "x", **options})
    with pytest.raises(ValueError, match="must not set 'tokenize'"):
        prompt_of({**record, "chat_template_kwargs": {"tokenize": True}})
    assert as_prompt_list(prompt) == [prompt]
    assert as_prompt_list([prompt, prompt]) == [prompt, prompt]
    assert as_prompt_list([USER, USER]) == [[USER, USER]]
