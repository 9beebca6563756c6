"""Bodies of responses, for the description of the API: what is sent is written by `generation`.

The tests hold what is sent against these.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

FinishReason = Literal["stop", "length"]


class ErrorObject(BaseModel):
    """What went wrong."""

    message: str
    type: str = Field(description="Such as `invalid_request_error` or `server_error`.")
    param: str | None = Field(description="The parameter that is at fault.")
    code: str | None


class ErrorAnswer(BaseModel):
    """An error, in OpenAI's shape."""

    error: ErrorObject


class RejectedAttempt(BaseModel):
    """An attempt at a segment that was not kept."""

    number: int = Field(ge=0, description="The attempt's number within its segment.")
    text: str = Field(description="Special tokens included.")
    token_ids: list[int]
    reward: float | None


class SegmentAnswer(BaseModel):
    """A segment of a response."""

    start: int = Field(ge=0, description="Its first token.")
    end: int = Field(ge=0, description="The token after its last.")
    reward: float | None = Field(description="Reward of the response up to the segment's end.")
    threshold: float | None = Field(description="What the reward was tested against.")
    attempts: int = Field(ge=0, description="Attempts that it took, this one included.")
    accepted: Literal["test", "fallback", "choice"] = Field(
        description="It passed, or was the best of attempts that all failed, or was chosen."
    )
    rejected: list[RejectedAttempt] = Field([], description="With `trace`, where there are any.")


class StarsAnswer(BaseModel):
    """What STARS adds to a choice."""

    reward: float | None = Field(description="Reward of the whole response.")
    segments: list[SegmentAnswer]


class StarsDelta(BaseModel):
    """What STARS adds to a chunk."""

    reward: float | None = Field(
        None, description="Reward of the whole response; with its last chunk."
    )
    segments: list[SegmentAnswer] = Field(description="Those new with this chunk.")


class Usage(BaseModel):
    """Tokens of the whole request."""

    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0, description="Accepted ones, of all choices.")
    total_tokens: int = Field(ge=0)
    discarded_tokens: int = Field(ge=0, description="Drawn and not returned.")
    rm_tokens: int = Field(ge=0, description="Run through the reward model.")


class CompletionLogprobs(BaseModel):
    """One list for each property of the tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """A response to a prompt."""

    index: int = Field(ge=0)
    text: str
    logprobs: CompletionLogprobs | None
    token_ids: list[int] = Field([], description="With `return_token_ids`.")
    finish_reason: FinishReason
    stars: StarsAnswer


class CompletionDelta(BaseModel):
    """What a chunk adds to a response."""

    index: int = Field(ge=0)
    text: str
    logprobs: CompletionLogprobs | None
    token_ids: list[int] = Field([], description="With `return_token_ids`.")
    finish_reason: FinishReason | None
    stars: StarsDelta


class _Head(BaseModel):
    id: str
    created: int = Field(description="Seconds since 1970.")
    model: str


class CompletionAnswer(_Head):
    """Responses to prompts, those to the first prompt first."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(_Head):
    """An event of a streamed completion."""

    object: Literal["text_completion"]
    choices: list[CompletionDelta]
    usage: Usage | None = None


class TokenLogprob(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[None]


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

    role: Literal["assistant"] | None = Field(None, description="With the first chunk only.")
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


class ChatAnswer(_Head):
    """Answers to a chat."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(_Head):
    """An event of a streamed chat completion."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatDelta]
    usage: Usage | None = None


class ModelObject(BaseModel):
    """A model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The models; there is one."""

    object: Literal["list"]
    data: list[ModelObject]


class State(BaseModel):
    """Whether the server takes requests."""

    status: Literal["ok", "unavailable"]
