"""From a parsed body to bytes on the wire, with what is counted and logged on the way."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from stars_fast.server.answers import to_json
from stars_fast.server.engines import ServedEngine
from stars_fast.server.errors import ApiError, api_error
from stars_fast.server.generation import Generation
from stars_fast.server.logs import log
from stars_fast.server.method_name import HEADER
from stars_fast.server.metrics import Metrics
from stars_fast.server.protocol import Body
from stars_fast.server.settings import ServerSettings
from stars_fast.server.transcript import Delta
from stars_fast.server.writer import Writer

T = TypeVar("T")
B = TypeVar("B", bound=Body)

#: Status that the metrics and the log have where the client has left (nginx's).
CLIENT_LEFT = 499
#: Characters at most of what a client may write into a line of the log.
_LOGGED = 500


class Serving:
    """Answers the endpoints that generate.

    Parameters
    ----------
    engine, settings, metrics
        Of the server.
    """

    def __init__(self, engine: ServedEngine, settings: ServerSettings, metrics: Metrics) -> None:
        self._engine = engine
        self._settings = settings
        self._metrics = metrics

    async def answer(
        self, request: Request, body: B, writer_of: Callable[[Generation, B], Writer]
    ) -> Response:
        """Return the response to a request; if the client leaves, the request is aborted.

        Raises
        ------
        ApiError
            If there is no response, or none that has begun.
        """
        call = Call(request, body, self._settings, self._metrics)
        try:
            generation = Generation(self._engine, body, self._settings, request.headers.get(HEADER))
            call.generation = generation
            writer = writer_of(generation, body)
            if body.stream:
                await unless_left(request.receive, generation.start())
                return EventStream(writer, call)
            await unless_left(request.receive, _whole(generation, call))
            content = to_json(writer.whole())
        except ClientLeftError:
            call.ended(CLIENT_LEFT)
            return Response(status_code=CLIENT_LEFT)
        except Exception as error:
            raise call.failed(error) from error
        except BaseException:
            call.ended(CLIENT_LEFT)  # cancelled, when the server stops
            raise
        call.ended(200)
        return Response(content, media_type="application/json")


class Call:
    """One HTTP request, as the metrics and the log see it.

    Attributes
    ----------
    generation
        None before the body was understood.
    """

    def __init__(
        self,
        request: Request,
        body: Body,
        settings: ServerSettings,
        metrics: Metrics,
    ) -> None:
        self._begun = time.monotonic()
        self._settings = settings
        self._metrics = metrics
        self._fields: dict[str, object] = {
            "request_id": request.state.request_id,
            "path": request.url.path[:_LOGGED],
            "stream": bool(body.stream),
            **({} if body.user is None else {"user": body.user[:_LOGGED]}),
        }
        self._saw_first = False
        self.generation: Generation | None = None

    def saw(self, generation: Generation, delta: Delta) -> None:
        """Count a delta."""
        if not self._saw_first and generation.first_token_at is not None:
            self._saw_first = True
            self._metrics.first_token(generation.first_token_at - self._begun)
        self._metrics.segments(delta.segments)

    def failed(self, error: Exception) -> ApiError:
        """Count and log a request that failed; returns what the client is told."""
        told = api_error(error, self._metrics.retry_after())
        foreseen = told.status != 500 or isinstance(error, ApiError)
        self.ended(told.status, told.message, cause=None if foreseen else error)
        return told

    def ended(
        self, status: int, message: str | None = None, cause: Exception | None = None
    ) -> None:
        """Count and log the end of the request, with the traceback of `cause`."""
        seconds = time.monotonic() - self._begun
        fields = {**self._fields, "status": status, "seconds": round(seconds, 4)}
        if message is not None:
            fields["message"] = message[:_LOGGED]
        generation = self.generation
        usage = {} if generation is None else generation.usage().model_dump()
        self._metrics.ended(status, seconds, usage.get("prompt_tokens", 0))
        if generation is not None:
            fields["method"] = generation.params.method
            fields |= usage
            transcripts = generation.transcripts
            fields["finish_reasons"] = [t.latest.finish_reason for t in transcripts]
            if generation.first_token_at is not None:
                first = generation.first_token_at - self._begun
                fields["seconds_to_first_token"] = round(first, 4)
            if self._settings.log_prompts:
                fields["prompts"] = generation.prompts
                fields["responses"] = [t.latest.text for t in transcripts]
        level = logging.ERROR if status >= 500 else logging.INFO
        log("request", level, cause, **fields)


class EventStream(Response):
    """A response in server-sent events: a chunk whenever a segment was accepted.

    Parameters
    ----------
    writer
        Writes it; its generation has started.
    call
        Is told how it ends.
    """

    media_type = "text/event-stream"

    def __init__(self, writer: Writer, call: Call) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._writer = writer
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; if the client leaves, the request is aborted."""
        try:
            await unless_left(receive, self._send(send))
        except ClientLeftError:
            self._call.ended(CLIENT_LEFT)
        except asyncio.CancelledError:
            self._call.ended(CLIENT_LEFT)
            raise
        finally:
            self._writer.generation.abort()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        writer, generation = self._writer, self._writer.generation
        try:
            await _send_part(send, writer.begin())
            async for transcript, delta in generation.deltas():
                self._call.saw(generation, delta)
                await _send_part(send, writer.delta(transcript, delta))
            last = writer.end()
        except ClientLeftError:
            raise
        except Exception as error:  # noqa: BLE001 - the client is told
            last = writer.failed(self._call.failed(error))
        else:
            self._call.ended(200)
        await send({"type": "http.response.body", "body": last})


async def _whole(generation: Generation, call: Call) -> None:
    await generation.start()
    async for _, delta in generation.deltas():
        call.saw(generation, delta)


async def _send_part(send: Send, events: bytes) -> None:
    if not events:
        return
    try:
        await send({"type": "http.response.body", "body": events, "more_body": True})
    except OSError:
        raise ClientLeftError from None


class ClientLeftError(Exception):
    """The client has closed the connection."""


async def unless_left(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, which is cancelled if the client leaves.

    Raises
    ------
    ClientLeftError
        It left.
    """

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.create_task(work), asyncio.create_task(left())
    try:
        await asyncio.wait([task, watch], return_when=asyncio.FIRST_COMPLETED)
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
    if task.cancelled():
        raise ClientLeftError
    return task.result()
