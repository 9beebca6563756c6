"""The reward model by itself: ``/classify``, ``/score`` and ``/pooling``, in vLLM's shapes."""

from __future__ import annotations

import functools
import math
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from stars_fast.prompts import Prompt, Reader
from stars_fast.server.answers import Head
from stars_fast.server.chat import ChatMessage
from stars_fast.server.engines import ServedEngine
from stars_fast.server.openapi import NOT_EMPTY
from stars_fast.server.protocol import Lenient
from stars_fast.server.settings import ServerSettings

if TYPE_CHECKING:
    from stars_fast.engine.batches import BatchEngine


class PoolingRequest(Lenient):
    """Body of ``/classify`` and ``/pooling``: texts as the reward model reads them, or a chat."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["input"], "properties": {"input": {"type": ["string", "array"]}}},
                {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
            ]
        }
    )

    model: str | None = None
    input: str | list[str] | None = Field(
        default=None,
        description="Texts, read as they are: no template is put around them.",
        json_schema_extra=NOT_EMPTY,
    )
    messages: list[ChatMessage] | None = Field(
        default=None,
        description="A chat whose last message, the assistant's, is scored.",
        json_schema_extra={"minItems": 2},
    )
    use_activation: bool | None = Field(
        default=None,
        description="The sigmoid of a score in its place; by default at `/classify` alone.",
    )
    user: str | None = None


class ScoreRequest(Lenient):
    """Body of ``/score``: pairs of a prompt and its response."""

    model: str | None = None
    text_1: str | list[str] = Field(
        description="Prompts; one is that of all responses.", json_schema_extra=NOT_EMPTY
    )
    text_2: str | list[str] = Field(description="Responses.", json_schema_extra={"minItems": 1})
    use_activation: bool | None = Field(
        default=None, description="The sigmoid of a score in its place."
    )
    user: str | None = None


class ScoringUsage(BaseModel):
    """Tokens of the request."""

    prompt_tokens: int = Field(ge=0, description="Run through the reward model.")
    total_tokens: int = Field(ge=0)
    completion_tokens: Literal[0]


class ClassScore(BaseModel):
    """The score of a text as a probability of the one class."""

    index: int = Field(ge=0)
    label: Literal["LABEL_0"]
    probs: list[float]
    num_classes: Literal[1]


class PooledScore(BaseModel):
    """The score of a text."""

    index: int = Field(ge=0)
    object: Literal["pooling"]
    data: list[float]


class PairScore(BaseModel):
    """The score of a pair."""

    index: int = Field(ge=0)
    object: Literal["score"]
    score: float


class ClassifyAnswer(Head):
    """Answer of ``/classify``."""

    object: Literal["list"]
    data: list[ClassScore]
    usage: ScoringUsage


class PoolingAnswer(Head):
    """Answer of ``/pooling``."""

    object: Literal["list"]
    data: list[PooledScore]
    usage: ScoringUsage


class ScoreAnswer(Head):
    """Answer of ``/score``."""

    object: Literal["list"]
    data: list[PairScore]
    usage: ScoringUsage


#: What is scored: a prompt, as the engine reads it, and its response; None: a text by itself.
Pair = tuple[Any, str | None]


class Scoring:
    """Answers the three endpoints.

    Parameters
    ----------
    engine, settings
        Of the server.
    """

    def __init__(self, engine: ServedEngine, settings: ServerSettings) -> None:
        self._engine = engine
        self._settings = settings

    async def classify(self, body: PoolingRequest, created: int) -> ClassifyAnswer:
        """Return probabilities, or scores in their place."""
        activate = body.use_activation is not False
        scores, usage = await self._scores(_pairs(body), activate=activate)
        data = [
            ClassScore(index=i, label="LABEL_0", probs=[score], num_classes=1)
            for i, score in enumerate(scores)
        ]
        head = self._head("classify", body.model, created)
        return ClassifyAnswer(**head, object="list", data=data, usage=usage)

    async def pooling(self, body: PoolingRequest, created: int) -> PoolingAnswer:
        """Return scores."""
        scores, usage = await self._scores(_pairs(body), activate=bool(body.use_activation))
        data = [
            PooledScore(index=i, object="pooling", data=[score]) for i, score in enumerate(scores)
        ]
        head = self._head("pool", body.model, created)
        return PoolingAnswer(**head, object="list", data=data, usage=usage)

    async def score(self, body: ScoreRequest, created: int) -> ScoreAnswer:
        """Return the scores of pairs."""
        prompts, responses = _list("text_1", body.text_1), _list("text_2", body.text_2)
        if len(prompts) == 1:
            prompts *= len(responses)
        if len(prompts) != len(responses):
            raise ValueError(
                f"text_1 must be one text or as many as text_2, {len(responses)}, "
                f"got {len(prompts)}"
            )
        pairs: list[Pair] = list(zip(prompts, responses, strict=True))
        scores, usage = await self._scores(pairs, activate=bool(body.use_activation))
        data = [PairScore(index=i, object="score", score=score) for i, score in enumerate(scores)]
        head = self._head("score", body.model, created)
        return ScoreAnswer(**head, object="list", data=data, usage=usage)

    async def _scores(
        self, pairs: Sequence[Pair], *, activate: bool
    ) -> tuple[list[float], ScoringUsage]:
        most = self._settings.max_choices
        if len(pairs) > most:
            raise ValueError(f"input must have at most {most} texts, got {len(pairs)}")
        timeout = self._settings.request_timeout
        read = await self._engine.read(functools.partial(_read, pairs), pairs, timeout)
        scores, tokens = await self._engine.call(functools.partial(_score, read), timeout)
        if activate:
            scores = [_sigmoid(score) for score in scores]
        return scores, ScoringUsage(prompt_tokens=tokens, total_tokens=tokens, completion_tokens=0)

    def _head(self, prefix: str, model: str | None, created: int) -> dict[str, Any]:
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": created,
            "model": model or self._settings.model_name,
        }


#: What is scored, as it was read: a prompt, and its response as token ids and as text.
ReadPair = tuple[Prompt, list[int], str]


def _read(pairs: Sequence[Pair], reader: Reader) -> list[ReadPair]:
    return [
        (replace(reader.read(prompt, 0), whole=True), [], "")
        if response is None
        else (reader.read(prompt, 0), reader.response_ids(response), response)
        for prompt, response in pairs
    ]


def _score(pairs: Sequence[ReadPair], engine: BatchEngine) -> tuple[list[float], int]:
    """Return the scores and the tokens run for them; on the engine's thread."""
    before = engine.stats().get("rm_tokens", 0)
    scores = engine.score_read(pairs)
    return scores, int(engine.stats().get("rm_tokens", 0) - before)


def _pairs(body: PoolingRequest) -> list[Pair]:
    if (body.input is None) == (body.messages is None):
        raise ValueError("input or messages must be given, and not both")
    if body.input is not None:
        return [(text, None) for text in _list("input", body.input)]
    assert body.messages is not None
    messages = [message.model_dump(exclude_unset=True) for message in body.messages]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("messages must have a prompt, and a last message of role 'assistant'")
    content = messages[-1].get("content")
    if not isinstance(content, str):
        raise ValueError(f"messages[{len(messages) - 1}].content must be text")
    return [(messages[:-1], content)]


def _list(name: str, value: str | list[str]) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value)
    if not texts:
        raise ValueError(f"{name} must have at least one text")
    for number, text in enumerate(texts):
        if not text and name != "text_2":
            raise ValueError(f"{name}[{number}] must be text that is not empty")
    return texts


def _sigmoid(value: float) -> float:
    small = math.exp(-abs(value))
    return 1 / (1 + small) if value >= 0 else small / (1 + small)
