"""``/v1/completions``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field

from stars_fast.server.answers import FinishReason, Head, StarsAnswer, StarsDelta, Usage
from stars_fast.server.generation import Generation
from stars_fast.server.logprobs import TokenScore
from stars_fast.server.openapi import NOT_EMPTY, RANGES
from stars_fast.server.protocol import GenerationRequest
from stars_fast.server.transcript import Delta, Transcript
from stars_fast.server.writer import ChoiceWriter


class CompletionRequest(GenerationRequest):
    """Body of ``/v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="Text, token ids, or a list of either.", json_schema_extra=NOT_EMPTY
    )
    echo: bool | None = Field(
        default=None,
        description="The prompt's text comes first, with `logprobs` its tokens, too.",
    )
    logprobs: int | None = Field(
        default=None,
        description="With the log-probability of each token, and of so many of the likeliest.",
        json_schema_extra=RANGES["top_logprobs"],
    )
    return_token_ids: bool | None = Field(
        default=None, description="With `token_ids` in each choice, as vLLM has them."
    )
    asks_for_nothing: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **GenerationRequest.asks_for_nothing,
        "add_special_tokens": (True,),
    }

    @property
    def wants_logprobs(self) -> bool:
        """Whether each token's log-probability is asked for."""
        return self.logprobs is not None

    @property
    def only_prompts(self) -> bool:
        """Whether nothing is to be generated."""
        return bool(self.echo) and self.max_tokens == 0

    @property
    def prompt_logprobs(self) -> int | None:
        """How many of the likeliest tokens of the prompt are asked for; None: no scores of it."""
        return self.logprobs if self.echo else None

    def stars_values(self) -> dict[str, Any]:
        """Return the fields of `StarsParams` that the body's own stand for."""
        values = super().stars_values()
        if self.only_prompts:
            values["max_tokens"] = 1  # the least that can be asked for
        if self.logprobs is not None:
            values["top_logprobs"] = self.logprobs
        return values

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, each to be answered `n` times.

        Raises
        ------
        ValueError
            If there is none.
        """
        if not self.prompt:
            raise ValueError("prompt is empty")
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [list(self.prompt)]
        return list(self.prompt)


class CompletionLogprobs(BaseModel):
    """One list for each property of the tokens."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """A response to a prompt."""

    index: int = Field(ge=0)
    text: str
    logprobs: CompletionLogprobs | None
    token_ids: list[int] = Field(default_factory=list, description="With `return_token_ids`.")
    finish_reason: FinishReason
    stars: StarsAnswer


class CompletionDelta(BaseModel):
    """What a chunk adds to a response."""

    index: int = Field(ge=0)
    text: str
    logprobs: CompletionLogprobs | None
    token_ids: list[int] = Field(default_factory=list, description="With `return_token_ids`.")
    finish_reason: FinishReason | None
    stars: StarsDelta


class CompletionAnswer(Head):
    """Responses to prompts, those to the first prompt first."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Head):
    """An event of a streamed completion."""

    object: Literal["text_completion"]
    choices: list[CompletionDelta]
    usage: Usage | None = None


class CompletionWriter(ChoiceWriter):
    """Writes completions."""

    prefix = "cmpl"
    answer, chunk = CompletionAnswer, CompletionChunk
    object = chunk_object = "text_completion"

    def __init__(self, generation: Generation, body: CompletionRequest) -> None:
        super().__init__(generation, body)
        self._with_ids = bool(body.return_token_ids)
        self._echoes = bool(body.echo)

    def choice(self, transcript: Transcript, fields: dict[str, Any]) -> CompletionChoice:
        """Return a whole response."""
        output = transcript.latest
        scores = self.scores(transcript, None)
        text, scores = self._echoed(transcript, output.text, scores)
        ids = self._token_ids(output.token_ids)
        return CompletionChoice(text=text, logprobs=_lists(scores), **ids, **fields)

    def piece(
        self, transcript: Transcript, delta: Delta, fields: dict[str, Any], *, first: bool
    ) -> CompletionDelta:
        """Return the text that a delta adds."""
        text, scores = delta.text, self.scores(transcript, delta)
        text, scores = self._echoed(transcript, text, scores, first=first)
        ids = self._token_ids(delta.token_ids)
        return CompletionDelta(text=text, logprobs=_lists(scores), **ids, **fields)

    def _echoed(
        self,
        transcript: Transcript,
        text: str,
        scores: list[TokenScore] | None,
        *,
        first: bool = True,
    ) -> tuple[str, list[TokenScore] | None]:
        """Return what begins a response with its prompt before it, if that was asked for."""
        if not self._echoes:
            return text, scores
        prompt = self.generation.prompt_of(transcript)
        if scores is not None:
            shift = len(prompt.text)
            scores = [replace(score, offset=score.offset + shift) for score in scores]
        if not first:
            return text, scores
        if scores is not None:
            own = self.generation.prompt_scores_of(transcript)
            scores = self._scores.of_prompt(prompt.token_ids, own) + scores
        return prompt.text + text, scores

    def _token_ids(self, token_ids: Sequence[int]) -> dict[str, Any]:
        return {"token_ids": token_ids} if self._with_ids else {}


def _lists(scores: Sequence[TokenScore] | None) -> CompletionLogprobs | None:
    if scores is None:
        return None
    return CompletionLogprobs(
        tokens=[score.text for score in scores],
        token_logprobs=[score.logprob for score in scores],
        top_logprobs=[score.top_by_text() for score in scores]
        if any(score.top for score in scores)
        else None,
        text_offset=[score.offset for score in scores],
    )
