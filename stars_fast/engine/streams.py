"""The stream that `AsyncEngine` returns: the outputs of one request as they arrive."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol, TypeVar

from stars_fast.errors import DeadlineError
from stars_fast.outputs import RequestOutput
from stars_fast.params import StarsParams
from stars_fast.prompts import Prompt, PromptLike

#: Outputs that wait for a reader at most. An output holds all that those before it do, so a reader
#: that falls further behind misses none of the text.
_UNREAD = 64

_Call = Callable[[], None]


class Stream(Protocol):
    """A request, and where what becomes of it goes."""

    request_id: str
    prompt: PromptLike | Prompt
    params: StarsParams

    def admit(self, prompt_tokens: int) -> None:
        """Note that the engine has taken the request."""

    def deliver(self, output: RequestOutput) -> None:
        """Pass on an output."""

    def fail(self, error: Exception) -> None:
        """End with an error."""


S = TypeVar("S", bound=Stream)


class Outgoing(Protocol[S]):
    """Takes what an engine's thread has for streams, and passes it on in one go."""

    def put(self, stream: S, call: _Call) -> None:
        """Keep a call that this stream is to get."""

    def send(self) -> list[S]:
        """Pass on what was kept, in its order; the streams that nobody reads any more."""


class RequestStream:
    """One request of an `AsyncEngine`: an asynchronous iterator of its outputs.

    Each output has a newly accepted segment; the last one is `finished`, with `error` set if the
    request failed. A reader that is cancelled aborts the request; one that stops reading must call
    `abort`. For the event loop that it was made on, and one reader.

    Parameters
    ----------
    request_id, prompt, params
        The request.
    abort
        Tells the engine's thread to stop it.
    timeout
        Seconds until the request is aborted; None: never.

    Raises
    ------
    ValueError, TypeError
        While iterating, if the engine refuses the prompt or the parameters.
    DeadlineError
        If its time is over.
    EngineStoppedError
        If the engine stops meanwhile.
    """

    def __init__(
        self,
        request_id: str,
        prompt: PromptLike | Prompt,
        params: StarsParams,
        abort: _Call,
        timeout: float | None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.params = params
        self._stop = abort
        self.loop = asyncio.get_running_loop()
        self._unread: deque[RequestOutput] = deque()
        self._news = asyncio.Event()
        self._admission: asyncio.Future[int] = self.loop.create_future()
        self._error: Exception | None = None
        self._ended = False
        self._timer: asyncio.TimerHandle | None = None
        if timeout is not None:
            self._timer = self.loop.call_later(timeout, self._expire, timeout)

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        try:
            while not self._unread and not self._ended:
                self._news.clear()
                await self._news.wait()
        except BaseException:
            self.abort()
            raise
        if self._unread:
            return self._unread.popleft()
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    async def admitted(self) -> int:
        """Wait until the engine has looked at the request; return its number of prompt tokens.

        It may still wait in the queue. Raises the errors of iteration.
        """
        # Shielded: a reader that is cancelled here must not cancel what the engine will set.
        return await asyncio.shield(self._admission)

    def abort(self) -> None:
        """Stop the request if it is unfinished; iteration ends.

        Its pages are free after the round under way.
        """
        self._unread.clear()
        if not self._ended:
            self._end(None)
            self._stop()

    # On the event loop

    def admit(self, prompt_tokens: int) -> None:
        """Note that the engine has taken the request."""
        if not self._admission.done():
            self._admission.set_result(prompt_tokens)

    def deliver(self, output: RequestOutput) -> None:
        """Pass on an output."""
        if self._ended:
            return
        if len(self._unread) == _UNREAD:
            self._unread.pop()
        self._unread.append(output)
        if output.finished:
            self._end(None)
        self._news.set()

    def fail(self, error: Exception) -> None:
        """End with an error, which the reader gets behind the outputs that it has not read."""
        if not self._ended:
            self._end(error)

    def _expire(self, timeout: float) -> None:
        if not self._ended:
            self._end(DeadlineError(f"the request was not finished within {timeout:g} s"))
            self._stop()

    def _end(self, error: Exception | None) -> None:
        self._ended = True
        self._error = error
        if self._timer is not None:
            self._timer.cancel()
        if not self._admission.done():
            if error is None:
                self._admission.cancel()
            else:
                self._admission.set_exception(error)
                self._admission.exception()  # whoever iterates learns of it, too
        self._news.set()


class Outbox:
    """What the engine's thread has for streams, handed to their event loops in one go.

    Waking a loop makes its thread compete with the engine's for the interpreter: once a round will
    do, and not for each request.
    """

    def __init__(self) -> None:
        self._kept: dict[asyncio.AbstractEventLoop, list[tuple[RequestStream, _Call]]] = {}

    def put(self, stream: RequestStream, call: _Call) -> None:
        """Keep a call that the stream's event loop is to make."""
        self._kept.setdefault(stream.loop, []).append((stream, call))

    def send(self) -> list[RequestStream]:
        """Have the loops make the calls, in their order; the streams whose loop is closed."""
        lost: list[RequestStream] = []
        kept, self._kept = self._kept, {}
        for loop, calls in kept.items():
            try:
                loop.call_soon_threadsafe(_make, [call for _, call in calls])
            except RuntimeError:
                lost += [stream for stream, _ in calls]
        return lost


def _make(calls: list[_Call]) -> None:
    loop = asyncio.get_running_loop()
    for call in calls:
        loop.call_soon(call)  # by itself: what one raises is not to keep the others
