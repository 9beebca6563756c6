"""Parts of answers that several endpoints have, as they are sent and described."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from stars_fast.outputs import Segment
from stars_fast.records import segment_record

FinishReason = Literal["stop", "length"]


def to_json(answer: BaseModel) -> bytes:
    """Return an answer as JSON; fields that were not set are left out."""
    return answer.__pydantic_serializer__.to_json(answer, exclude_unset=True)


class ErrorObject(BaseModel):
    """What went wrong."""

    message: str
    type: str = Field(description="Such as `invalid_request_error` or `server_error`.")
    param: str | None = Field(description="The parameter that is at fault.")
    code: str | None


class ErrorAnswer(BaseModel):
    """An error, in OpenAI's shape."""

    error: ErrorObject


# A factory: pydantic would copy a default deeply for each answer.
_REWARDS: Any = Field(
    default_factory=dict,
    description="With several rewards, each by its name; `reward` is made of them.",
    json_schema_extra={"default": {}},
)


_TARGET: Any = Field(
    default=None,
    description="The target reward, also where it was `auto`, for methods with one; in a stream, "
    "with the last chunk.",
)


class RejectedAttempt(BaseModel):
    """An attempt at a segment that was not kept."""

    number: int = Field(ge=0, description="The attempt's number within its segment.")
    text: str = Field(description="Special tokens included.")
    token_ids: list[int]
    reward: float | None
    rewards: dict[str, float] = _REWARDS


class SegmentAnswer(BaseModel):
    """A segment of a response."""

    start: int = Field(ge=0, description="Its first token.")
    end: int = Field(ge=0, description="The token after its last.")
    reward: float | None = Field(description="Reward of the response up to the segment's end.")
    rewards: dict[str, float] = _REWARDS
    threshold: float | None = Field(description="What the reward was tested against.")
    attempts: int = Field(ge=0, description="Attempts that it took, this one included.")
    accepted: Literal["test", "fallback", "choice"] = Field(
        description="It passed, or was the best of attempts that all failed, or was chosen."
    )
    rejected: list[RejectedAttempt] = Field(
        default_factory=list,
        description="With `trace`, where there are any.",
        json_schema_extra={"default": []},
    )


def segment_answers(
    segments: Sequence[Segment], text_of: Callable[[Sequence[int]], str]
) -> list[SegmentAnswer]:
    """Return segments as they are sent; `text_of` writes the tokens of rejected attempts."""
    return [SegmentAnswer(**segment_record(segment, text_of)) for segment in segments]


class StarsAnswer(BaseModel):
    """What STARS adds to a choice."""

    reward: float | None = Field(description="Reward of the whole response.")
    rewards: dict[str, float] = _REWARDS
    target_reward: float | None = _TARGET
    segments: list[SegmentAnswer]


class StarsDelta(BaseModel):
    """What STARS adds to a chunk."""

    reward: float | None = Field(
        default=None, description="Reward of the whole response; with its last chunk."
    )
    rewards: dict[str, float] = _REWARDS
    target_reward: float | None = _TARGET
    segments: list[SegmentAnswer] = Field(description="Those new with this chunk.")


class Usage(BaseModel):
    """Tokens of the whole request."""

    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0, description="Accepted ones, of all choices.")
    total_tokens: int = Field(ge=0)
    discarded_tokens: int = Field(ge=0, description="Drawn and not returned.")
    rm_tokens: int = Field(ge=0, description="Run through the reward model.")


class Head(BaseModel):
    """What every answer begins with."""

    id: str
    created: int = Field(description="Seconds since 1970.")
    model: str


class ModelObject(BaseModel):
    """A model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str = Field(description="Where it was loaded from.")
    parent: None
    max_model_len: int | None = Field(description="Its context in tokens.")


class ModelList(BaseModel):
    """The models; there is one."""

    object: Literal["list"]
    data: list[ModelObject]


class State(BaseModel):
    """Whether the server takes requests."""

    status: Literal["ok", "unavailable"]


class Version(BaseModel):
    """The version of stars_fast."""

    version: str
