"""One HTTP request on its way: its prompts in the engine, and the responses as they grow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from operator import methodcaller
from typing import Any

from stars_fast.engine.streams import RequestStream
from stars_fast.errors import EngineStoppedError
from stars_fast.outputs import CompletionOutput, RequestOutput, TokenScore
from stars_fast.params import StarsParams
from stars_fast.prompts import Prompt, PromptLike
from stars_fast.server.answers import Usage
from stars_fast.server.engines import ServedEngine
from stars_fast.server.errors import ApiError, request_failed
from stars_fast.server.images import fetch_images
from stars_fast.server.method_name import method_values, values_in_name
from stars_fast.server.protocol import Body, params_of
from stars_fast.server.settings import ServerSettings
from stars_fast.server.transcript import Delta, Transcript


class Generation:
    """Runs the prompts of one body.

    Parameters
    ----------
    engine
        Runs them.
    body
        The request.
    settings
        Of the server.
    method
        A method and its budget from outside of the body, see `method_name`.

    Attributes
    ----------
    model
        The name that the response gives.
    prompts
        As they were given.
    transcripts
        The responses, `n` for each prompt.
    first_token_at
        When the first accepted segment came, by `time.monotonic`; None before that.

    Raises
    ------
    ApiError, ValueError, TypeError
        If the body asks for what cannot be done; nothing is queued then.
    """

    def __init__(
        self,
        engine: ServedEngine,
        body: Body,
        settings: ServerSettings,
        method: str | None = None,
    ) -> None:
        named = values_in_name(body.model, settings.model_name)
        if named is None:
            raise ApiError(
                404,
                f"the model {body.model!r:.200} does not exist; "
                f"this server has {settings.model_name!r}",
                param="model",
                code="model_not_found",
            )
        asked = {} if method is None else method_values(method)
        self._engine = engine
        self._settings = settings
        self.model = body.model or settings.model_name
        self.tool_call_parser = settings.tool_call_parser
        self.tokenizer = engine.tokenizer
        self.params: StarsParams = params_of(body, settings.params, named, asked)
        if body.wants_logprobs and not engine.has_logprobs:
            raise ValueError("logprobs cannot be had: the engine of this server keeps none")
        self.prompts: Sequence[Any] = body.prompts()
        drawn = len(self.prompts) * self.params.n * self.params.samples_per_response
        if drawn > settings.max_choices:
            raise ValueError(
                f"n asks for {drawn} responses in one request, prompts and candidates counted; "
                f"{settings.max_choices} are allowed"
            )
        self._streams: list[RequestStream] = []
        self._latest: dict[int, RequestOutput] = {}
        self._prompt_tokens = 0
        self.transcripts = [
            Transcript(i, self.params.stop_texts, body.text_options, engine.tokenizer)
            for i in range(len(self.prompts) * self.params.n)
        ]
        self._body = body
        self._read: list[Prompt] = []
        self._prompt_scores: list[list[TokenScore]] = []
        self.first_token_at: float | None = None

    async def start(self) -> None:
        """Queue the prompts, all or none, and wait until the engine has looked at them.

        Raises
        ------
        QueueFullError, EngineStoppedError, DeadlineError, ValueError, TypeError
            Those of `ServedEngine.submit` and `RequestStream.admitted`.
        """
        if self._settings.image_hosts:
            self.prompts = await fetch_images(self.prompts, self._settings.image_hosts)
        if self._body.only_prompts or self._body.prompt_logprobs is not None:
            await self._read_prompts()
        if self._body.only_prompts:
            return
        try:
            for prompt in self._read or self.prompts:
                stream = self._engine.submit(
                    prompt, self.params, timeout=self._settings.request_timeout
                )
                self._streams.append(stream)
            counts = [await stream.admitted() for stream in self._streams]
        except BaseException:
            self.abort()
            raise
        self._prompt_tokens = sum(counts)

    async def _read_prompts(self) -> None:
        for prompt in self.prompts:
            await self._read_prompt(prompt)
        self._prompt_tokens = sum(len(read.token_ids) for read in self._read)

    async def _read_prompt(self, prompt: PromptLike) -> None:
        engine, timeout = self._engine, self._settings.request_timeout
        read = await engine.check_request(prompt, self.params, timeout)
        self._read.append(read)
        top = self._body.prompt_logprobs
        if top is not None:
            scores = await engine.call(methodcaller("prompt_scores", read.token_ids, top), timeout)
            self._prompt_scores.append(scores)

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
        if self._body.only_prompts:
            for transcript in self.transcripts:
                nothing = CompletionOutput(transcript.index, finish_reason="length")
                delta = transcript.advance(nothing)
                assert delta is not None
                yield transcript, delta
        try:
            async for number, output in merged(self._streams):
                self._latest[number] = output
                if output.error is not None:
                    raise request_failed(output.error)
                for completion in output.outputs:
                    transcript = self.transcripts[number * self.params.n + completion.index]
                    delta = transcript.advance(completion, output.prompt_token_ids)
                    if delta is None:
                        continue
                    if delta.finish_reason == "abort":
                        raise EngineStoppedError("aborted: the server stops")
                    if self.first_token_at is None:
                        self.first_token_at = time.monotonic()
                    yield transcript, delta
        finally:
            self.abort()

    def prompt_of(self, transcript: Transcript) -> Prompt:
        """Return the prompt of a response that has begun."""
        number = transcript.index // self.params.n
        if self._read:
            return self._read[number]
        read = self._latest[number]
        return Prompt(read.prompt or "", read.prompt_token_ids)

    def target_of(self, transcript: Transcript) -> float | None:
        """Return the target reward of a response that has begun."""
        latest = self._latest.get(transcript.index // self.params.n)
        return None if latest is None else latest.target_reward

    def prompt_scores_of(self, transcript: Transcript) -> list[TokenScore]:
        """Return the scores of the prompt's own tokens, which were asked for."""
        return self._prompt_scores[transcript.index // self.params.n]

    def usage(self) -> Usage:
        """Return the tokens so far: prompt and accepted ones, then what they cost beside."""
        accepted = sum(len(transcript.latest.token_ids) for transcript in self.transcripts)
        drafted = sum(output.drafted_tokens for output in self._latest.values())
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=accepted,
            total_tokens=self._prompt_tokens + accepted,
            discarded_tokens=drafted - accepted,
            rm_tokens=sum(output.rm_tokens for output in self._latest.values()),
        )


async def merged(
    streams: Sequence[RequestStream],
) -> AsyncIterator[tuple[int, RequestOutput]]:
    """Yield the outputs of several streams, with the stream's number, as they come.

    The first error of a stream is raised; the others are then read no further.
    """
    if len(streams) == 1:  # as most requests have it: no task is needed
        async for output in streams[0]:
            yield 0, output
        return
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
