"""``/v1/completions``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from stars_fast.server.answers import FinishReason, Head, StarsAnswer, StarsDelta, Usage
from stars_fast.server.generation import Generation
from stars_fast.server.logprobs import TokenScore
from stars_fast.server.protocol import GenerationRequest
from stars_fast.server.transcript import Delta, Transcript
from stars_fast.server.writer import ChoiceWriter


class CompletionRequest(GenerationRequest):
    """Body of ``/v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="Text, token ids, or a list of either."
    )
    logprobs: Annotated[int, Field(ge=0, le=0)] | None = Field(
        default=None, description="0: with the log-probability of each token. More are not kept."
    )
    return_token_ids: bool | None = Field(
        default=None, description="With `token_ids` in each choice, as vLLM has them."
    )

    @property
    def wants_logprobs(self) -> bool:
        """Whether each token's log-probability is asked for."""
        return self.logprobs is not None

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
    top_logprobs: None
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

    def choice(self, transcript: Transcript, fields: dict[str, Any]) -> CompletionChoice:
        """Return a whole response."""
        output = transcript.latest
        scores = self.scores(transcript, output.logprobs)
        ids = self._token_ids(output.token_ids)
        return CompletionChoice(text=output.text, logprobs=_lists(scores), **ids, **fields)

    def piece(
        self, transcript: Transcript, delta: Delta, fields: dict[str, Any], *, first: bool
    ) -> CompletionDelta:
        """Return the text that a delta adds."""
        scores = self.scores(transcript, delta.logprobs, delta.begin)
        ids = self._token_ids(delta.token_ids)
        return CompletionDelta(text=delta.text, logprobs=_lists(scores), **ids, **fields)

    def _token_ids(self, token_ids: Sequence[int]) -> dict[str, Any]:
        return {"token_ids": token_ids} if self._with_ids else {}


def _lists(scores: Sequence[TokenScore] | None) -> CompletionLogprobs | None:
    if scores is None:
        return None
    return CompletionLogprobs(
        tokens=[score.text for score in scores],
        token_logprobs=[score.logprob for score in scores],
        top_logprobs=None,
        text_offset=[score.offset for score in scores],
    )
