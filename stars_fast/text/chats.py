"""Chats, as clients write them and as chat templates read them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: A chat: its messages, or an object with ``messages`` and some of `CHAT_OPTIONS`.
ChatLike: TypeAlias = "Sequence[Mapping[str, Any]] | Mapping[str, Any]"

#: What an object with ``messages`` may have beside.
CHAT_OPTIONS = (
    "tools",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
)

#: Parts of a content, and where each has its text.
PART_TYPES = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
#: Parts that are images, where the model sees such; each has its image under this name.
IMAGE_TYPES = ("image", "image_url")
#: Of an assistant's message: what is said of its text, which no template reads.
_ABOUT_THE_TEXT = frozenset({"annotations", "stars"})
#: Nothing here can hear or make these.
_UNSUPPORTED = frozenset({"audio", "function_call"})
#: Set by this engine, not by whoever writes the chat.
_RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "processor_kwargs",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    }
)
#: Stands for a message's text, to see whether the template shows it.
_PROBE = "stars0fast1probe"


@dataclass(frozen=True)
class Chat:
    """A chat that was read and found well-formed.

    Attributes
    ----------
    messages
        Each with ``role`` and ``content``, text both, and what else templates may read. A content
        with images is a list of parts: ``{"type": "text", "text": ...}`` and ``{"type": "image"}``.
    images
        Of all messages, in order, as they were given: paths, data URLs or PIL images.
    template_kwargs
        Variables of the template, such as ``{"enable_thinking": False}``.
    tools
        Functions that the model may call, in OpenAI's form.
    add_generation_prompt
        The template opens the assistant's message that is to be written.
    continue_final_message
        The last message, the assistant's, is left open and continued.
    """

    messages: list[dict[str, Any]]
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] = field(default_factory=list)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    images: tuple[object, ...] = ()

    @property
    def plain_messages(self) -> list[dict[str, Any]]:
        """The messages for templates that may not know of developers."""
        return [
            {**message, "role": "system"} if message["role"] == "developer" else message
            for message in self.messages
        ]

    @property
    def text_messages(self) -> list[dict[str, Any]]:
        """The plain messages, their contents as text; images are left out."""
        return [
            {**message, "content": content_text(message["content"])}
            for message in self.plain_messages
        ]


def content_text(content: str | list[dict[str, Any]]) -> str:
    """Return the text of a content."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def is_chat(value: object) -> bool:
    """Whether a value that is no list of prompts is meant as a chat."""
    return isinstance(value, Mapping) or (
        isinstance(value, Sequence) and bool(value) and isinstance(value[0], Mapping)
    )


def chat_of(value: ChatLike, name: str = "messages", *, images: bool = False) -> Chat:
    """Read a chat; in errors its messages have this name.

    Message fields that are null or empty ask for nothing; parts of a content are joined; the
    arguments of tool calls, JSON text with OpenAI, become the objects that templates read. With
    `images` there may be parts ``{"type": "image", "image": ...}`` and OpenAI's ``image_url``.

    Raises
    ------
    ValueError
        What is not as it must be, by its place, such as ``messages[1].content``.
    """
    options: Mapping[str, Any] = {}
    messages: object = value
    if isinstance(value, Mapping):
        options = {name: given for name, given in value.items() if given is not None}
        messages = options.get("messages")
        for key in options:
            if key not in ("messages", *CHAT_OPTIONS):
                raise ValueError(
                    f"unknown key {key!r} of a chat; the keys are messages, "
                    f"{', '.join(CHAT_OPTIONS)}"
                )
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"{name} must be a list that is not empty, got {_short(messages)}")
    found: list[object] | None = [] if images else None
    plain = [_message(f"{name}[{i}]", message, found) for i, message in enumerate(messages)]
    continues = _flag(options, "continue_final_message", default=False)
    opens = _flag(options, "add_generation_prompt", default=not continues)
    if continues and opens:
        raise ValueError("continue_final_message and add_generation_prompt must not both be true")
    if continues and plain[-1]["role"] != "assistant":
        raise ValueError(
            "continue_final_message needs a last message of role 'assistant', "
            f"got {plain[-1]['role']!r}"
        )
    variables = checked_kwargs(options.get("chat_template_kwargs", {}))
    tools = _tools(options.get("tools", []))
    if tools and "tools" in variables:
        raise ValueError("tools is given twice: in the chat and in its chat_template_kwargs")
    return Chat(plain, variables, tools, opens, continues, tuple(found or ()))


def checked_kwargs(value: object) -> Mapping[str, Any]:
    """Return variables for a chat template.

    Raises
    ------
    ValueError
        It is no object, or sets what is not the chat's to set.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"chat_template_kwargs must be an object, got {_short(value)}")
    for name in value:
        if not isinstance(name, str) or not name.isidentifier() or name in _RESERVED:
            raise ValueError(f"chat_template_kwargs must not set {_short(name)}")
    return dict(value)


def render(
    chat: Chat,
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any],
    *,
    as_parts: bool = False,
) -> str:
    """Return a chat as the tokenizer's template writes it.

    Parameters
    ----------
    chat
        Its own variables go before `template_kwargs`.
    tokenizer
        The language model's.
    template_kwargs
        Variables of the template.
    as_parts
        Contents are lists of parts wherever the template takes such, as those of models that see
        images do.

    Raises
    ------
    ValueError
        There is no template, it refuses the chat or fails on it, or it leaves a message or the
        tools out.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "prompt is a list of chat messages, but the tokenizer has no chat template"
        )
    knows_developers = "developer" in str(tokenizer.chat_template)
    messages = chat.messages if knows_developers else chat.plain_messages

    variables = {**template_kwargs, **chat.template_kwargs}

    def write(messages: list[dict[str, Any]], tools: list[dict[str, Any]] = chat.tools) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=chat.add_generation_prompt,
                continue_final_message=chat.continue_final_message,
                **(variables | ({"tools": tools} if tools else {})),
            )
        )

    if as_parts and _takes_parts(write):
        messages = [{**message, "content": _parts(message["content"])} for message in messages]
    try:
        text = write(messages)
    except Exception as error:
        from jinja2 import TemplateError

        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"messages of roles {roles} are refused by the chat template: {kind}{error}"
        ) from error
    if chat.tools and _leaves_out_tools(write, messages, text):
        raise ValueError("tools has no place in the model's chat template, which leaves them out")
    for number, message in enumerate(messages):
        # Of the assistant's turns templates may leave out what it thought.
        role, content = message["role"], message["content"]
        content = content_text(content)
        known = role in ("user", "assistant") or (role == "system" and content.strip() in text)
        if not known and not _shows(write, messages, number, {"content": _PROBE}):
            raise ValueError(
                f"messages[{number}] has role {role!r}, which the model's chat template leaves out"
            )
        calls = [
            {**call, "function": {**call["function"], "name": _PROBE}}
            for call in message.get("tool_calls", ())
        ]
        if calls and not _shows(write, messages, number, {"tool_calls": calls}):
            raise ValueError(
                f"messages[{number}] has tool_calls, which the model's chat template leaves out"
            )
    return text


def _takes_parts(write: Callable[[list[dict[str, Any]]], str]) -> bool:
    """Whether a template writes the text of parts, and not how Python shows them."""
    try:
        text = write([{"role": "user", "content": _parts(_PROBE)}])
    except Exception:  # noqa: BLE001 - it asks for text
        return False
    return _PROBE in text and "'type'" not in text


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _shows(
    write: Callable[[list[dict[str, Any]]], str],
    messages: list[dict[str, Any]],
    number: int,
    probe: Mapping[str, Any],
) -> bool:
    """Whether the template writes `probe`, put in the place of a part of a message."""
    probed = [*messages]
    probed[number] = {**messages[number], **probe}
    try:
        return _PROBE in write(probed)
    except Exception:  # noqa: BLE001 - it has read that part, at least
        return True


def _leaves_out_tools(
    write: Callable[[list[dict[str, Any]], list[dict[str, Any]]], str],
    messages: list[dict[str, Any]],
    text: str,
) -> bool:
    """Whether a template writes the same with tools and without them."""
    try:
        return write(messages, []) == text
    except Exception:  # noqa: BLE001 - it asks for tools
        return False


def _tools(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"tools must be a list, got {_short(value)}")
    for number, tool in enumerate(value):
        where = f"tools[{number}]"
        kind = tool.get("type", "function") if isinstance(tool, Mapping) else None
        if not isinstance(tool, Mapping) or kind != "function":
            raise ValueError(f'{where} must be {{"type": "function", ...}}, got {_short(tool)}')
        function = tool.get("function")
        if not isinstance(function, Mapping):
            raise ValueError(f"{where}.function must be an object, got {_short(function)}")
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where}.function.name must be text, got {_short(name)}")
    return [dict(tool) for tool in value]


def _message(where: str, message: object, images: list[object] | None) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(
            f'{where} must be {{"role": text, "content": text}}, got {_short(message)}'
        )
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{where}.role must be text that is not empty, got {_short(role)}")
    plain: dict[str, Any] = {"role": role, "content": _content(where, role, message, images)}
    for name, value in message.items():
        if name in plain or name == "refusal" or name in _ABOUT_THE_TEXT:
            continue
        if value is None or value in ([], {}, ""):
            continue
        if name in _UNSUPPORTED:
            raise ValueError(f"{where}.{name} is not supported: the models here read text")
        plain[name] = _tool_calls(f"{where}.{name}", value) if name == "tool_calls" else value
    return plain


def _content(
    where: str, role: str, message: Mapping[str, Any], images: list[object] | None
) -> str | list[dict[str, Any]]:
    content = message.get("content")
    if content is None and role == "assistant":
        content = message.get("refusal") or ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(
            f"{where}.content must be text or a list of text parts, got {_short(content)}"
        )
    parts: list[dict[str, Any]] = []
    for number, part in enumerate(content):
        place = f"{where}.content[{number}]"
        if images is not None and _is_image(part):
            images.append(_image(place, part))
            parts.append({"type": "image"})
        else:
            parts.append({"type": "text", "text": _part(place, part)})
    if any(part["type"] == "image" for part in parts):
        return parts
    return content_text(parts)


def _is_image(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") in IMAGE_TYPES


def _image(where: str, part: Mapping[str, Any]) -> object:
    """Return the image of a part, as it was given."""
    kind = part["type"]
    value = part.get(kind)
    if kind == "image_url" and isinstance(value, Mapping):
        value = value.get("url")
    if kind == "image_url" and not (isinstance(value, str) and value.startswith("data:")):
        raise ValueError(f"{where}.image_url.url must be a data URL, got {_short(value)}")
    if value is None:
        raise ValueError(f"{where}.{kind} must be given")
    return value


def _part(where: str, part: object) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(kind, str):
        raise ValueError(f'{where} must be {{"type": "text", "text": text}}, got {_short(part)}')
    if kind not in PART_TYPES:
        raise ValueError(
            f"{where} has type {kind!r}; the models here read text: {', '.join(PART_TYPES)}"
        )
    text = part.get(PART_TYPES[kind])
    if not isinstance(text, str):
        raise ValueError(f"{where}.{PART_TYPES[kind]} must be text, got {_short(text)}")
    return text


def _tool_calls(where: str, calls: object) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ValueError(f"{where} must be a list, got {_short(calls)}")
    return [_tool_call(f"{where}[{i}]", call) for i, call in enumerate(calls)]


def _tool_call(where: str, call: object) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise ValueError(f"{where}.function must be an object, got {_short(function)}")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}.function.name must be text, got {_short(name)}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise ValueError(
                f"{where}.function.arguments must be JSON, got {_short(arguments)}"
            ) from None
    return {**call, "function": {**function, "arguments": {} if arguments is None else arguments}}


def _flag(options: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = options.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {_short(value)}")
    return value


def _short(value: object) -> str:
    """Show a value in at most 60 characters."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def empty_answers(
    tokenizer: PreTrainedTokenizerBase | None, *, bare: int, empty: int
) -> str | None:
    """Return what to tell users whose chat model has nothing to add to bare text; None if it has.

    Parameters
    ----------
    tokenizer
        The language model's.
    bare, empty
        Responses to prompts that were text, and those of them without text.
    """
    if not empty or not getattr(tokenizer, "chat_template", None):
        return None
    return (
        f"{empty} of {bare} responses to prompts of bare text are empty, and the model has a chat "
        "template: --chat sends prompts as chat messages"
    )
