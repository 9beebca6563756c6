"""How the response to a request is written: whole, or as server-sent events."""

from __future__ import annotations

import functools
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import BaseModel

from stars_fast.engine.detokenize import token_text
from stars_fast.outputs import Segment
from stars_fast.server.answers import (
    SegmentAnswer,
    StarsAnswer,
    StarsDelta,
    Usage,
    segment_answers,
    to_json,
)
from stars_fast.server.errors import ApiError
from stars_fast.server.generation import Generation
from stars_fast.server.logprobs import Scores, TokenScore
from stars_fast.server.protocol import GenerationRequest
from stars_fast.server.transcript import Delta, Transcript

#: The last event of a stream.
DONE = b"data: [DONE]\n\n"


def event(answer: BaseModel) -> bytes:
    """Return an answer as a server-sent event."""
    return b"data: " + to_json(answer) + b"\n\n"


class Writer(ABC):
    """Writes the response of one generation.

    Parameters
    ----------
    generation
        Whose responses these are.
    """

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.created = int(time.time())

    @abstractmethod
    def whole(self) -> BaseModel:
        """Return the whole response; every delta has been read."""

    def begin(self) -> bytes:
        """Return the events before the first delta's."""
        return b""

    @abstractmethod
    def delta(self, transcript: Transcript, delta: Delta) -> bytes:
        """Return the events of a delta."""

    @abstractmethod
    def end(self) -> bytes:
        """Return the events behind the last delta's."""

    def failed(self, error: ApiError) -> bytes:
        """Return the events of a stream that ends with an error."""
        return event(error.answer()) + DONE

    def segments(self, segments: Sequence[Segment]) -> list[SegmentAnswer]:
        """Return segments with the texts of their rejected attempts."""
        text_of = functools.partial(token_text, self.generation.tokenizer)
        return segment_answers(segments, text_of)

    def stars(self, transcript: Transcript) -> StarsAnswer:
        """Return what STARS adds to a whole response."""
        output = transcript.latest
        stars = StarsAnswer(reward=output.reward, segments=self.segments(output.segments))
        if output.rewards:
            stars.rewards = dict(output.rewards)
        self._add_target(stars, transcript)
        return stars

    def _add_target(self, stars: StarsAnswer | StarsDelta, transcript: Transcript) -> None:
        target = self.generation.target_of(transcript)
        if target is not None:  # what is not set is not sent
            stars.target_reward = target

    def stars_delta(self, transcript: Transcript, delta: Delta) -> StarsDelta:
        """Return what STARS adds to a delta; the last one has the reward."""
        stars = StarsDelta(segments=self.segments(delta.segments))
        if delta.finish_reason is not None:
            stars.reward = delta.reward
            if delta.rewards:
                stars.rewards = dict(delta.rewards)
            self._add_target(stars, transcript)
        return stars


class ChoiceWriter(Writer):
    """Writes choices, as completions and chat completions have them.

    Parameters
    ----------
    generation
        Whose responses these are.
    body
        What asked for them.

    Attributes
    ----------
    prefix
        Of ids.
    answer, chunk
        The whole response, and an event.
    object, chunk_object
        Their names.
    """

    prefix: ClassVar[str]
    answer: ClassVar[type[BaseModel]]
    chunk: ClassVar[type[BaseModel]]
    object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, generation: Generation, body: GenerationRequest) -> None:
        super().__init__(generation)
        options = body.stream_options
        self._body = body
        self._continuous = options is not None and bool(options.continuous_usage_stats)
        self._with_usage = options is not None and bool(options.include_usage)
        self._scores = Scores(generation.tokenizer)
        self._head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": self.created,
            "model": generation.model,
        }
        self._begun: set[int] = set()

    @abstractmethod
    def choice(self, transcript: Transcript, fields: dict[str, Any]) -> BaseModel:
        """Return a whole response; `fields` are those that all choices have."""

    @abstractmethod
    def piece(
        self, transcript: Transcript, delta: Delta, fields: dict[str, Any], *, first: bool
    ) -> BaseModel:
        """Return what a delta adds to a choice; `first` of its choice."""

    def whole(self) -> BaseModel:
        """Return the whole response; every delta has been read."""
        choices = [self._choice(transcript) for transcript in self.generation.transcripts]
        usage = self.generation.usage()
        return self.answer(**self._head, object=self.object, choices=choices, usage=usage)

    def delta(self, transcript: Transcript, delta: Delta) -> bytes:
        """Return a chunk."""
        first = transcript.index not in self._begun
        self._begun.add(transcript.index)
        fields = {
            "index": transcript.index,
            "finish_reason": delta.finish_reason,
            "stars": self.stars_delta(transcript, delta),
        }
        choice = self.piece(transcript, delta, fields, first=first)
        usage: dict[str, Usage | None] = {"usage": None} if self._with_usage else {}
        if self._continuous:
            usage = {"usage": self.generation.usage()}
        return event(self.chunk(**self._head, object=self.chunk_object, choices=[choice], **usage))

    def end(self) -> bytes:
        """Return the usage, if it was asked for, and the last event."""
        if not (self._with_usage or self._continuous):
            return DONE
        usage = self.generation.usage()
        chunk = self.chunk(**self._head, object=self.chunk_object, choices=[], usage=usage)
        return event(chunk) + DONE

    def scores(self, transcript: Transcript, delta: Delta | None) -> list[TokenScore] | None:
        """Return the tokens of a response, or those of a delta; None unless asked for."""
        if not self._body.wants_logprobs:
            return None
        output = transcript.latest
        part = output if delta is None else delta
        return self._scores.of_response(
            self.generation.prompt_of(transcript),
            output.token_ids,
            part.logprobs,
            part.top_logprobs,
            0 if delta is None else delta.begin,
        )

    def _choice(self, transcript: Transcript) -> BaseModel:
        output = transcript.latest
        fields = {
            "index": transcript.index,
            "finish_reason": output.finish_reason,
            "stars": self.stars(transcript),
        }
        return self.choice(transcript, fields)
