"""``/v1/chat/completions``."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stars_fast.server.answers import Head, StarsAnswer, StarsDelta, Usage
from stars_fast.server.generation import Generation
from stars_fast.server.logprobs import TokenScore
from stars_fast.server.openapi import RANGES
from stars_fast.server.protocol import GenerationRequest
from stars_fast.server.transcript import Delta, Transcript
from stars_fast.server.writer import ChoiceWriter
from stars_fast.text.chats import CHAT_OPTIONS, PART_TYPES
from stars_fast.text.tool_calls import TOOL_CALL_PARSERS, HermesToolCalls, ToolCallText

#: Why a choice ended; ``"tool_calls"`` only where calls are parsed.
ChatFinishReason = Literal["stop", "length", "tool_calls"]


def _has_text(name: str) -> dict[str, Any]:
    kinds = [kind for kind, field in PART_TYPES.items() if field == name]
    return {
        "required": [name],
        "properties": {"type": {"enum": kinds}, name: {"type": "string"}},
    }


class ImageUrl(BaseModel):
    """A picture for a model that sees such; further fields, such as `detail`, are of no effect."""

    model_config = ConfigDict(extra="ignore", strict=True)

    url: str = Field(
        description="`data:image/png;base64,...`, or a link to a host of `--allow-image-host`.",
        json_schema_extra={"pattern": "^(data:image/|https?://)"},
    )


class ContentPart(BaseModel):
    """A part of a message; further fields, such as `cache_control`, are of no effect."""

    model_config = ConfigDict(
        extra="ignore",
        strict=True,
        json_schema_extra={
            "anyOf": [
                _has_text("text"),
                _has_text("refusal"),
                {
                    "required": ["image_url"],
                    "properties": {
                        "type": {"const": "image_url"},
                        "image_url": {"$ref": "#/components/schemas/ImageUrl"},
                    },
                },
            ]
        },
    )

    type: str = Field(json_schema_extra={"enum": [*PART_TYPES, "image_url"]})
    text: str | None = None
    refusal: str | None = None
    image_url: ImageUrl | None = None


class FunctionCall(BaseModel):
    """A function that the assistant has called."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str = Field(min_length=1)
    arguments: str | dict[str, Any] | None = Field(default=None, description="JSON, or an object.")


class ToolCall(BaseModel):
    """A tool that the assistant has called."""

    model_config = ConfigDict(extra="allow", strict=True)

    function: FunctionCall


class ChatMessage(BaseModel):
    """A message of a chat; the chat template reads further fields, such as `name`."""

    model_config = ConfigDict(
        extra="allow",
        strict=True,
        json_schema_extra={
            "anyOf": [
                {"properties": {"role": {"const": "assistant"}}},
                {"required": ["content"], "properties": {"content": {"type": ["string", "array"]}}},
            ]
        },
    )

    role: str = Field(
        min_length=1, description="One that the template writes; `developer` may be `system`."
    )
    content: str | list[ContentPart] | None = Field(
        default=None, description="Null for the assistant's only."
    )
    tool_calls: list[ToolCall] | None = None


class ChatRequest(GenerationRequest):
    """Body of ``/v1/chat/completions``."""

    asks_for_nothing: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **GenerationRequest.asks_for_nothing,
        "add_special_tokens": (False,),
    }

    messages: list[ChatMessage] = Field(json_schema_extra={"minItems": 1})
    max_completion_tokens: int | None = Field(
        default=None, description="As `max_tokens`.", json_schema_extra=RANGES["max_tokens"]
    )
    logprobs: bool | None = Field(
        default=None, description="With the log-probability of each token."
    )
    top_logprobs: int | None = Field(
        default=None,
        description="With so many of the likeliest tokens at each place; needs `logprobs`.",
        json_schema_extra=RANGES["top_logprobs"],
    )
    reasoning_effort: str | None = Field(
        default=None, description="A variable of the chat template, too."
    )

    tools: list[dict[str, Any]] | None = Field(
        default=None, description="Functions that the model may call; the chat template reads them."
    )
    tool_choice: str | dict[str, Any] | None = Field(
        default=None,
        description="`auto`, or `none`: the model is not told of the tools.",
        json_schema_extra={"enum": ["auto", "none", None]},
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="False: of the calls in an answer only the first is one."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None,
        description='Variables of the chat template, such as `{"enable_thinking": false}`.',
    )
    add_generation_prompt: bool | None = Field(
        default=None, description="Open the assistant's message, as is usual."
    )
    continue_final_message: bool | None = Field(
        default=None, description="Continue the last message, the assistant's."
    )

    @property
    def wants_logprobs(self) -> bool:
        """Whether each token's log-probability is asked for."""
        return bool(self.logprobs)

    def stars_values(self) -> dict[str, Any]:
        """Return the fields of `StarsParams` that the body's own stand for."""
        values = super().stars_values()
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ValueError("max_tokens and max_completion_tokens must not differ")
            values["max_tokens"] = self.max_completion_tokens
        if self.top_logprobs:
            if not self.logprobs:
                raise ValueError(f"top_logprobs needs logprobs: true, got {self.logprobs}")
            values["top_logprobs"] = self.top_logprobs
        return values

    @model_validator(mode="after")
    def _no_call_is_forced(self) -> ChatRequest:
        if self.tool_choice not in (None, "none", "auto"):
            raise ValueError(
                "tool_choice must be 'auto' or 'none', for no call is forced here, got "
                f"{self.tool_choice!r}"
            )
        return self

    @property
    def calls_tools(self) -> bool:
        """Whether the model is told of tools that it may call."""
        return bool(self.tools) and self.tool_choice != "none"

    def prompts(self) -> list[dict[str, Any]]:
        """Return the one prompt."""
        chat = self.model_dump(include={"messages", *CHAT_OPTIONS}, exclude_unset=True)
        if not self.calls_tools:
            chat.pop("tools", None)
        if self.reasoning_effort is not None:
            variables = {"reasoning_effort": self.reasoning_effort}
            chat["chat_template_kwargs"] = variables | (self.chat_template_kwargs or {})
        return [chat]


class LikelyToken(BaseModel):
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[LikelyToken]


class ChatLogprobs(BaseModel):
    """One object for each token."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunction(BaseModel):
    """The function of a call."""

    name: str
    arguments: str = Field(description="JSON of an object.")


class AnsweredCall(BaseModel):
    """A call of a tool that the answer makes."""

    index: int | None = Field(default=None, description="Of the call; in chunks only.")
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(BaseModel):
    """The model's answer."""

    role: Literal["assistant"]
    content: str | None = Field(description="Null where all of it is calls of tools.")
    refusal: None
    tool_calls: list[AnsweredCall] = Field(
        default=[], description="With `--tool-call-parser`, where there are any."
    )


class MessageDelta(BaseModel):
    """What a chunk adds to the model's answer."""

    role: Literal["assistant"] | None = Field(
        default=None, description="With the first chunk only."
    )
    content: str
    tool_calls: list[AnsweredCall] = Field(
        default=[], description="Those that this chunk completes, each as a whole."
    )


class ChatChoice(BaseModel):
    """An answer to a chat."""

    index: int = Field(ge=0)
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    stars: StarsAnswer


class ChatDelta(BaseModel):
    """What a chunk adds to an answer."""

    index: int = Field(ge=0)
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    stars: StarsDelta


class ChatAnswer(Head):
    """Answers to a chat."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(Head):
    """An event of a streamed chat completion."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatDelta]
    usage: Usage | None = None


class ChatWriter(ChoiceWriter):
    """Writes chat completions."""

    prefix = "chatcmpl"
    answer, chunk = ChatAnswer, ChatChunk
    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, generation: Generation, body: ChatRequest) -> None:
        super().__init__(generation, body)
        self._new_parser: Callable[[], HermesToolCalls] | None = None
        if body.calls_tools and generation.tool_call_parser is not None:
            kind = TOOL_CALL_PARSERS[generation.tool_call_parser]
            self._new_parser = partial(kind, single=body.parallel_tool_calls is False)
        self._parsers: dict[int, HermesToolCalls] = {}

    def choice(self, transcript: Transcript, fields: dict[str, Any]) -> ChatChoice:
        """Return a whole answer."""
        output = transcript.latest
        message = AssistantMessage(role="assistant", content=output.text, refusal=None)
        if self._new_parser is not None:
            content, calls = self._new_parser().push(output.text, finished=True)
            if calls:
                message.content = content or None
                message.tool_calls = [_answered(call, None) for call in calls]
                fields = _ended_by_calls(fields)
        scores = self.scores(transcript, None)
        return ChatChoice(message=message, logprobs=_objects(scores), **fields)

    def piece(
        self, transcript: Transcript, delta: Delta, fields: dict[str, Any], *, first: bool
    ) -> ChatDelta:
        """Return what the message gets; the role comes first."""
        message = MessageDelta(content=delta.text)
        if self._new_parser is not None:
            parser = self._parsers.setdefault(transcript.index, self._new_parser())
            begun = parser.count
            message.content, calls = parser.push(
                delta.text, finished=delta.finish_reason is not None
            )
            if calls:
                message.tool_calls = [_answered(*call) for call in zip(calls, count(begun))]
            if parser.count:
                fields = _ended_by_calls(fields)
        if first:
            message.role = "assistant"
        scores = self.scores(transcript, delta)
        return ChatDelta(delta=message, logprobs=_objects(scores), **fields)


def _answered(call: ToolCallText, index: int | None) -> AnsweredCall:
    place = {} if index is None else {"index": index}
    return AnsweredCall(
        **place,
        id=f"call_{uuid.uuid4().hex}",
        type="function",
        function=CalledFunction(name=call.name, arguments=call.arguments),
    )


def _ended_by_calls(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields of a choice that has calls; one that was cut is so nonetheless."""
    return fields | {"finish_reason": "tool_calls"} if fields["finish_reason"] == "stop" else fields


def _objects(scores: Sequence[TokenScore] | None) -> ChatLogprobs | None:
    if scores is None:
        return None
    return ChatLogprobs(content=[_object(score) for score in scores], refusal=None)


def _object(score: TokenScore) -> TokenLogprob:
    assert score.logprob is not None  # there is a prompt before it
    return TokenLogprob(
        token=score.text,
        logprob=score.logprob,
        bytes=_bytes(score.text),
        top_logprobs=[
            LikelyToken(token=text, logprob=value, bytes=_bytes(text)) for text, value in score.top
        ],
    )


def _bytes(text: str) -> list[int] | None:
    """Return a token's bytes; of half a character they are not known here."""
    return None if "\ufffd" in text else list(text.encode())
