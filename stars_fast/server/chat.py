"""``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from stars_fast.server.answers import FinishReason, Head, StarsAnswer, StarsDelta, Usage
from stars_fast.server.logprobs import TokenScore
from stars_fast.server.openapi import RANGES
from stars_fast.server.protocol import GenerationRequest
from stars_fast.server.transcript import Delta, Transcript
from stars_fast.server.writer import ChoiceWriter
from stars_fast.text.chats import CHAT_OPTIONS, PART_TYPES


def _has_text(name: str) -> dict[str, Any]:
    kinds = [kind for kind, field in PART_TYPES.items() if field == name]
    return {
        "required": [name],
        "properties": {"type": {"enum": kinds}, name: {"type": "string"}},
    }


class ContentPart(BaseModel):
    """A part of a message; further fields, such as `cache_control`, are of no effect."""

    model_config = ConfigDict(
        extra="ignore",
        strict=True,
        json_schema_extra={"anyOf": [_has_text("text"), _has_text("refusal")]},
    )

    type: str = Field(json_schema_extra={"enum": [*PART_TYPES]})
    text: str | None = None
    refusal: str | None = None


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

    def prompts(self) -> list[dict[str, Any]]:
        """Return the one prompt."""
        chat = self.model_dump(include={"messages", *CHAT_OPTIONS}, exclude_unset=True)
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


class AssistantMessage(BaseModel):
    """The model's answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class MessageDelta(BaseModel):
    """What a chunk adds to the model's answer."""

    role: Literal["assistant"] | None = Field(
        default=None, description="With the first chunk only."
    )
    content: str


class ChatChoice(BaseModel):
    """An answer to a chat."""

    index: int = Field(ge=0)
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stars: StarsAnswer


class ChatDelta(BaseModel):
    """What a chunk adds to an answer."""

    index: int = Field(ge=0)
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
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

    def choice(self, transcript: Transcript, fields: dict[str, Any]) -> ChatChoice:
        """Return a whole answer."""
        output = transcript.latest
        message = AssistantMessage(role="assistant", content=output.text, refusal=None)
        scores = self.scores(transcript, None)
        return ChatChoice(message=message, logprobs=_objects(scores), **fields)

    def piece(
        self, transcript: Transcript, delta: Delta, fields: dict[str, Any], *, first: bool
    ) -> ChatDelta:
        """Return what the message gets; the role comes first."""
        message = MessageDelta(content=delta.text)
        if first:
            message.role = "assistant"
        scores = self.scores(transcript, delta)
        return ChatDelta(delta=message, logprobs=_objects(scores), **fields)


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
