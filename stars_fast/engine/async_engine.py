"""The engine for asyncio: requests come from many tasks, rounds run on one thread."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from concurrent import futures
from typing import TYPE_CHECKING, TypeVar

from stars_fast.engine.engine_thread import LAST_ROUND_SECONDS, STUCK_AFTER, EngineThread
from stars_fast.engine.streams import Outbox, RequestStream
from stars_fast.errors import DeadlineError
from stars_fast.outputs import RequestOutput
from stars_fast.params import StarsParams
from stars_fast.prompts import Prompt, PromptLike, Reader

if TYPE_CHECKING:
    from stars_fast.engine.batches import BatchEngine

__all__ = ["STUCK_AFTER", "AsyncEngine"]

T = TypeVar("T")


class AsyncEngine(EngineThread[RequestStream]):
    """Runs an `Engine` on its own thread, for any number of asyncio tasks.

    Nothing here blocks an event loop. Rounds run on that thread, and requests are added and aborted
    between them. Prompts are read beside it, on threads of their own: however long one is, the
    rounds go on. Requests are queued in the order of `submit`; only short prompts do not wait until
    long ones before them have been read.

    Parameters
    ----------
    engine
        The engine to run; nothing else may use it from now on.
    max_running
        Most requests in the engine at once, at least 1; None: its `max_rows`.
    max_waiting
        Most requests that wait in the queue, at least 0.
    max_prompt_tokens
        Longer prompts are refused; None: what the model's context leaves.
    stuck_after
        Seconds of one round after which the engine is not `healthy` until it ends, above 0; None:
        a round may take as long as it likes.

    Notes
    -----
    Of the process that made it: in a fork of that it is dead, and says so. At the end of the
    process it is closed; a round that does not end is waited for some seconds.
    """

    def __init__(
        self,
        engine: BatchEngine,
        *,
        max_running: int | None = None,
        max_waiting: int = 256,
        max_prompt_tokens: int | None = None,
        stuck_after: float | None = STUCK_AFTER,
    ) -> None:
        self._numbers = itertools.count()
        super().__init__(
            engine,
            Outbox(),
            max_running=max_running,
            max_waiting=max_waiting,
            max_prompt_tokens=max_prompt_tokens,
            stuck_after=stuck_after,
        )

    async def generate(
        self,
        prompt: PromptLike | Prompt,
        params: StarsParams | None = None,
        *,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Run a request: ``async for output in engine.generate(prompt, params)``.

        Yields an output for each newly accepted segment, the last one `finished`; see
        `RequestStream`. Leaving the loop or cancelling its task aborts the request. Parameters and
        errors are those of `submit`; errors are raised when iteration begins.
        """
        stream = self.submit(prompt, params, request_id=request_id, timeout=timeout)
        try:
            async for output in stream:
                yield output
        finally:
            stream.abort()

    def submit(
        self,
        prompt: PromptLike | Prompt,
        params: StarsParams | None = None,
        *,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> RequestStream:
        """Queue a request and return at once; the caller must read the stream or abort it.

        Parameters
        ----------
        prompt
            Text, token ids or chat messages.
        params
            None: the defaults.
        request_id
            Unique among unfinished requests; None: a new one.
        timeout
            Seconds from now until the request is aborted with a `DeadlineError`; None: never.

        Raises
        ------
        QueueFullError
            If `max_running` requests run and `max_waiting` wait.
        EngineStoppedError
            If the engine drains, was closed or has failed, or is that of a process forked from.
        ValueError
            If `request_id` is in use.
        RuntimeError
            Without a running event loop.
        """
        number = next(self._numbers)
        stream = RequestStream(
            request_id if request_id is not None else f"request-{number}",
            prompt,
            params or StarsParams(),
            lambda: self.abort_stream(stream),
            timeout,
        )
        try:
            self.add(stream)
        except Exception as error:
            stream.fail(error)
            raise
        return stream

    async def call(self, work: Callable[[BatchEngine], T], timeout: float | None = None) -> T:
        """Do something with the engine between two rounds, and return what that gives.

        Parameters
        ----------
        work
            Called on the engine's thread, where it holds up the rounds; what it raises is raised.
        timeout
            Seconds from now; None: as many as it takes.

        Raises
        ------
        QueueFullError, EngineStoppedError
            As `submit`.
        DeadlineError
            If it was not done in time; if it had not begun, it is not.
        """
        return await in_time(self.ask(work), timeout)

    async def read(
        self, work: Callable[[Reader], T], prompt: object, timeout: float | None = None
    ) -> T:
        """Do something with the engine's reader beside the rounds, and return what that gives.

        Parameters
        ----------
        work
            Called where prompts are read. What it raises is raised.
        prompt
            What is read, of any form: long ones do not hold up short ones.
        timeout
            Seconds from now; None: as many as it takes.

        Raises
        ------
        QueueFullError, EngineStoppedError, DeadlineError
            As `call`.
        """
        return await in_time(self.ask_reader(work, prompt), timeout)

    async def check_request(
        self, prompt: PromptLike | Prompt, params: StarsParams, timeout: float | None = None
    ) -> Prompt:
        """Read a prompt, and return it if it may be run with the parameters; nothing is queued.

        Raises
        ------
        ValueError, TypeError
            If it may not.
        QueueFullError, EngineStoppedError, DeadlineError
            As `call`.
        """
        return await self.read(lambda _: self.checked(prompt, params), prompt, timeout)

    async def refresh(self) -> None:
        """Do nothing: `stats` and the numbers of requests are those of now."""

    async def drain(self, timeout: float | None = None) -> None:
        """Refuse further requests, wait for the others, then end the thread.

        Requests unfinished after `timeout` seconds are aborted; None waits for all.
        """
        if self._forked:
            return
        self.end_when_idle()
        ended = asyncio.wrap_future(self._ended)
        done, _ = await asyncio.wait([ended], timeout=timeout)
        if not done:
            self.abort_all()
            await asyncio.wait([ended], timeout=LAST_ROUND_SECONDS)


async def in_time(done: futures.Future[T], timeout: float | None) -> T:
    """Await what is done on a thread; what has not begun in time, or is not awaited, is not done.

    Raises
    ------
    DeadlineError
        It took longer than `timeout` seconds.
    """
    try:
        return await asyncio.wait_for(asyncio.wrap_future(done), timeout)
    except asyncio.TimeoutError:
        raise DeadlineError(f"the request was not finished within {timeout:g} s") from None
