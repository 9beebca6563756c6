"""One HTTP request on its way: its prompts in the engine, and what goes back."""

from __future__ import annotations

import asyncio
import functools
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from stars_fast.engine.async_engine import AsyncEngine
from stars_fast.engine.detokenize import token_offsets, token_text
from stars_fast.engine.requests import samples_per_response
from stars_fast.engine.streams import RequestStream
from stars_fast.errors import EngineStoppedError
from stars_fast.outputs import RequestOutput, Segment
from stars_fast.params import StarsParams
from stars_fast.prompts import Prompt
from stars_fast.records import segment_record
from stars_fast.server.errors import ApiError, request_failed
from stars_fast.server.protocol import ChatRequest, CompletionRequest, params_of
from stars_fast.server.settings import ServerSettings
from stars_fast.server.shapes import Shape
from stars_fast.server.transcript import Delta, Transcript


class Generation:
    """Runs the prompts of one body and writes the response, whole or in chunks.

    Parameters
    ----------
    engine
        Runs them.
    body
        The request.
    shape
        Of the response.
    settings
        Of the server.

    Attributes
    ----------
    prompts
        As they were given.
    first_token_at
        When the first accepted segment came, by `time.monotonic`; None before that.

    Raises
    ------
    ApiError, ValueError, TypeError
        If the body asks for what cannot be done; nothing is queued then.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        body: CompletionRequest | ChatRequest,
        shape: Shape,
        settings: ServerSettings,
    ) -> None:
        if body.model not in (None, settings.model_name):
            raise ApiError(
                404,
                f"the model {body.model!r} does not exist; this server has {settings.model_name!r}",
                param="model",
                code="model_not_found",
            )
        self._engine = engine
        self._body = body
        self._shape = shape
        self._settings = settings
        self.params: StarsParams = params_of(body, settings.params)
        self.prompts: Sequence[Any] = body.prompts()
        drawn = len(self.prompts) * self.params.n * samples_per_response(self.params)
        if drawn > settings.max_choices:
            raise ValueError(
                f"n asks for {drawn} responses in one request, prompts and candidates counted; "
                f"{settings.max_choices} are allowed"
            )
        self._id = f"{shape.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._streams: list[RequestStream] = []
        self._latest: dict[int, RequestOutput] = {}
        self._prompt_tokens = 0
        self.transcripts = [
            Transcript(i, self.params.stop_texts) for i in range(len(self.prompts) * self.params.n)
        ]
        self._sent: set[int] = set()
        self.first_token_at: float | None = None

    async def start(self) -> None:
        """Queue the prompts, all or none, and wait until the engine has looked at them.

        Raises
        ------
        QueueFullError, EngineStoppedError, DeadlineError, ValueError, TypeError
            Those of `AsyncEngine.submit` and `RequestStream.admitted`.
        """
        try:
            for prompt in self.prompts:
                stream = self._engine.submit(
                    prompt, self.params, timeout=self._settings.request_timeout
                )
                self._streams.append(stream)
            counts = [await stream.admitted() for stream in self._streams]
        except BaseException:
            self.abort()
            raise
        self._prompt_tokens = sum(counts)

    def abort(self) -> None:
        """Stop what is unfinished."""
        for stream in self._streams:
            stream.abort()

    async def deltas(self) -> AsyncIterator[tuple[Transcript, Delta]]:
        """Yield what each newly accepted segment adds to a response, to the end of all.

        Raises
        ------
        ApiError, DeadlineError, EngineStoppedError
            If one of the prompts fails; the others are aborted.
        """
        try:
            async for number, output in merged(self._streams):
                self._latest[number] = output
                if output.error is not None:
                    raise request_failed(output.error)
                for completion in output.outputs:
                    transcript = self.transcripts[number * self.params.n + completion.index]
                    delta = transcript.advance(completion)
                    if delta is None:
                        continue
                    if delta.finish_reason == "abort":
                        raise EngineStoppedError("aborted: the server stops")
                    if self.first_token_at is None:
                        self.first_token_at = time.monotonic()
                    yield transcript, delta
        finally:
            self.abort()

    def response(self) -> dict[str, Any]:
        """Return the whole response; every delta has been read."""
        return {
            **self._head(self._shape.whole),
            "choices": [self._choice(transcript) for transcript in self.transcripts],
            "usage": self.usage(),
        }

    def chunk(self, transcript: Transcript, delta: Delta) -> dict[str, Any]:
        """Return the chunk of a stream for a delta."""
        first = transcript.index not in self._sent
        self._sent.add(transcript.index)
        stars: dict[str, Any] = {"segments": self._segments(delta.segments)}
        if delta.finish_reason is not None:
            stars["reward"] = delta.reward
        choice = {
            "index": transcript.index,
            **self._shape.delta(delta.text, first=first),
            "logprobs": self._logprobs(transcript, delta.logprobs, delta.begin),
            **self._token_ids(delta.token_ids),
            "finish_reason": delta.finish_reason,
            "stars": stars,
        }
        return {**self._head(self._shape.chunk), "choices": [choice], **self._no_usage()}

    def usage_chunk(self) -> dict[str, Any] | None:
        """Return the chunk with the usage, None if it was not asked for."""
        if not self._with_usage:
            return None
        return {**self._head(self._shape.chunk), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Return the tokens so far: prompt and accepted ones, then what they cost beside."""
        accepted = sum(len(transcript.latest.token_ids) for transcript in self.transcripts)
        drafted = sum(output.drafted_tokens for output in self._latest.values())
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": accepted,
            "total_tokens": self._prompt_tokens + accepted,
            "discarded_tokens": drafted - accepted,
            "rm_tokens": sum(output.rm_tokens for output in self._latest.values()),
        }

    @property
    def _with_usage(self) -> bool:
        options = self._body.stream_options
        return options is not None and bool(options.include_usage)

    def _no_usage(self) -> dict[str, None]:
        return {"usage": None} if self._with_usage else {}

    def _head(self, name: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": name,
            "created": self._created,
            "model": self._settings.model_name,
        }

    def _choice(self, transcript: Transcript) -> dict[str, Any]:
        output = transcript.latest
        return {
            "index": transcript.index,
            **self._shape.choice(output.text),
            "logprobs": self._logprobs(transcript, output.logprobs),
            **self._token_ids(output.token_ids),
            "finish_reason": output.finish_reason,
            "stars": {
                "reward": output.reward,
                "segments": self._segments(output.segments),
            },
        }

    def _segments(self, segments: Sequence[Segment]) -> list[dict[str, Any]]:
        text_of = functools.partial(token_text, self._engine.tokenizer)
        return [segment_record(segment, text_of) for segment in segments]

    def _token_ids(self, token_ids: Sequence[int]) -> dict[str, list[int]]:
        return {"token_ids": list(token_ids)} if self._body.wants_token_ids else {}

    def _logprobs(
        self, transcript: Transcript, logprobs: Sequence[float], begin: int = 0
    ) -> dict[str, Any] | None:
        """Return those of the last tokens, as many as there are log-probabilities.

        `begin`: where the first of them begins in the text.
        """
        if not self._body.wants_logprobs:
            return None
        tokenizer = self._engine.tokenizer
        token_ids = transcript.latest.token_ids
        first = len(token_ids) - len(logprobs)
        texts = [token_text(tokenizer, [token]) for token in token_ids[first:]]
        read = self._latest[transcript.index // self.params.n]
        prompt = Prompt(read.prompt or "", read.prompt_token_ids)
        offsets = token_offsets(tokenizer, prompt, token_ids, first, begin)
        return self._shape.logprobs(list(zip(texts, logprobs, strict=True)), offsets)


async def merged(
    streams: Sequence[RequestStream],
) -> AsyncIterator[tuple[int, RequestOutput]]:
    """Yield the outputs of several streams, with the stream's number, as they come.

    The first error of a stream is raised; the others are then read no further.
    """
    arrived: asyncio.Queue[tuple[int, RequestOutput | Exception | None]] = asyncio.Queue(1)

    async def read(number: int, stream: RequestStream) -> None:
        try:
            async for output in stream:
                await arrived.put((number, output))
        except Exception as error:  # noqa: BLE001 - raised where it is read
            await arrived.put((number, error))
        else:
            await arrived.put((number, None))

    tasks = [asyncio.create_task(read(i, stream)) for i, stream in enumerate(streams)]
    unread = len(tasks)
    try:
        while unread:
            number, item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                unread -= 1
            else:
                yield number, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
