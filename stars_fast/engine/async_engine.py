"""The engine for asyncio: requests come from many tasks, rounds run on one thread."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent import futures
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import Literal, TypeVar

from stars_fast.engine.batches import BatchEngine
from stars_fast.engine.readers import ReaderThreads
from stars_fast.engine.streams import Outbox, RequestStream
from stars_fast.errors import DeadlineError, EngineStoppedError, QueueFullError
from stars_fast.outputs import CompletionOutput, RequestOutput
from stars_fast.params import StarsParams
from stars_fast.prompts import PromptLike
from stars_fast.rewards.base import Prompt

__all__ = ["STUCK_AFTER", "AsyncEngine"]

_log = logging.getLogger(__name__)

#: Seconds of one round after which an engine is not healthy, unless it is told otherwise.
STUCK_AFTER = 300.0

T = TypeVar("T")

#: How old the counters of `stats` may be while rounds run.
_STATS_SECONDS = 0.5
#: A round that raises was undone and is run again, so often in a row, before its requests fail.
_ROUND_RETRIES = 1
#: Rounds that raised in a row, after which the engine is not healthy.
_SICK_AFTER = 3
#: How long `drain`, and the end of the process, wait for a round under way that was not waited for.
_LAST_ROUND_SECONDS = 10.0


class AsyncEngine:
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
        if max_running is None:
            max_running = engine.max_rows
        for name, value, low in (
            ("max_running", max_running, 1),
            ("max_waiting", max_waiting, 0),
            ("max_prompt_tokens", 1 if max_prompt_tokens is None else max_prompt_tokens, 1),
        ):
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        if stuck_after is not None and not stuck_after > 0:
            raise ValueError(f"stuck_after must be above 0 or None, got {stuck_after}")
        self.tokenizer = engine.tokenizer
        #: The language model's context in tokens; None where it has no limit, or is not here.
        self.max_length = engine.max_length
        #: Whether outputs have the log-probabilities of their tokens.
        self.has_logprobs = engine.has_logprobs
        self._engine = engine
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._max_prompt_tokens = max_prompt_tokens
        self._stuck_after = stuck_after
        self._process = os.getpid()
        self._numbers = itertools.count()
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # A fast tokenizer may be called by several threads at once.
        self._readers = ReaderThreads(together=bool(getattr(engine.tokenizer, "is_fast", True)))
        # Ids of requests that are unfinished, as the callers see them.
        self._open: set[str] = set()
        # Of those, the ones that a round under way was asked to stop.
        self._interrupted: set[str] = set()
        self._lock = threading.Lock()
        self._refuses = False
        # Whose prompts are being read: the engine's thread takes out what `submit` puts in.
        self._reading: dict[str, RequestStream] = {}
        # Of the engine's thread.
        self._waiting: OrderedDict[str, tuple[RequestStream, Prompt]] = OrderedDict()
        self._running: dict[str, RequestStream] = {}
        self._outbox = Outbox()
        self._ends_when_idle = False
        self._failures = 0
        self._work_began: float | None = None
        self._failure: BaseException | None = None
        self._stats: dict[str, float] = engine.stats()
        self._stats_at = time.monotonic()
        self._ended: futures.Future[None] = futures.Future()
        self._thread = threading.Thread(target=self._run, name="stars-fast-engine", daemon=True)
        self._thread.start()
        # A thread in the middle of a round when the interpreter ends would abort the process.
        atexit.register(self._close_at_exit)

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
        name = request_id if request_id is not None else f"request-{number}"
        with self._lock:
            if name in self._open:
                raise ValueError(f"request_id {name!r} is in use")
            self._check_room()
            stream = RequestStream(
                name,
                prompt,
                params or StarsParams(),
                lambda: self._ask_abort(name, partial(self._abort_stream, stream)),
                timeout,
            )
            self._open.add(name)
            # Inside, so that none comes behind those that a stopping thread still answers.
            self._reading[name] = stream
            self._readers.put(partial(self._read, stream), prompt)
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
        return await self._call(work, timeout, self._commands.put)

    async def read(
        self, work: Callable[[BatchEngine], T], prompt: object, timeout: float | None = None
    ) -> T:
        """Do something with the engine's tokenizer beside the rounds, and return what that gives.

        Parameters
        ----------
        work
            Called where prompts are read; may only read prompts. What it raises is raised.
        prompt
            What is read, of any form: long ones do not hold up short ones.
        timeout
            Seconds from now; None: as many as it takes.

        Raises
        ------
        QueueFullError, EngineStoppedError, DeadlineError
            As `call`.
        """
        return await self._call(work, timeout, lambda run: self._readers.put(run, prompt))

    async def _call(
        self,
        work: Callable[[BatchEngine], T],
        timeout: float | None,
        put: Callable[[Callable[[], None]], None],
    ) -> T:
        name = f"call-{next(self._numbers)}"
        done: futures.Future[T] = futures.Future()

        def run() -> None:
            with self._lock:
                self._open.discard(name)
            if not done.set_running_or_notify_cancel():
                return
            try:
                if self._ended.done():
                    raise EngineStoppedError("the engine has stopped")  # noqa: TRY301 - as it fails
                done.set_result(work(self._engine))
            except BaseException as error:  # noqa: BLE001 - it is the caller's
                done.set_exception(_harmless(error))

        with self._lock:
            self._check_room()
            self._open.add(name)
            put(run)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(done), timeout)
        except asyncio.TimeoutError:
            raise DeadlineError(f"the request was not finished within {timeout:g} s") from None

    def abort(self, request_id: str) -> None:
        """Stop a request; its stream ends with what it had and finish reason ``"abort"``.

        May be called from any thread. The pages are free after the round under way; an unknown id
        is ignored.
        """
        self._ask_abort(request_id, partial(self._abort, request_id))

    async def drain(self, timeout: float | None = None) -> None:
        """Refuse further requests, wait for the others, then end the thread.

        Requests unfinished after `timeout` seconds are aborted; None waits for all.
        """
        if self._forked:
            return
        self._refuse()
        self._commands.put(self._end_when_idle)
        ended = asyncio.wrap_future(self._ended)
        done, _ = await asyncio.wait([ended], timeout=timeout)
        if not done:
            self._ask_abort_all()
            await asyncio.wait([ended], timeout=_LAST_ROUND_SECONDS)

    def close(self, timeout: float | None = None) -> None:
        """Abort every request and end the thread after the round under way.

        Waits at most `timeout` seconds; None: as long as it takes. Do not call this on an event
        loop; use `drain` there.
        """
        if self._forked:
            return
        self._refuse()
        self._ask_abort_all()
        self._commands.put(self._end_when_idle)
        self._thread.join(timeout)

    def call_when_ended(self, callback: Callable[[], None]) -> None:
        """Have a function called when the thread has ended, on any thread; now, if it has."""
        self._ended.add_done_callback(lambda _: callback())

    @property
    def accepting(self) -> bool:
        """Whether new requests are accepted if the queue has room."""
        return not self._refuses and not self._forked

    @property
    def healthy(self) -> bool:
        """Whether the thread runs, rounds have not kept failing, and none is stuck."""
        return self._thread.is_alive() and self._failures < _SICK_AFTER and not self.stuck

    @property
    def stuck(self) -> bool:
        """Whether a round, or reading a prompt, has taken more than `stuck_after` so far."""
        if self._stuck_after is None:
            return False
        began = self._work_began
        in_work = 0.0 if began is None else time.monotonic() - began
        return max(in_work, self._readers.seconds()) > self._stuck_after

    @property
    def failure(self) -> BaseException | None:
        """What has ended the thread though nobody asked for it; None: nothing has."""
        return self._failure

    @property
    def num_running(self) -> int:
        """Requests in the engine."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return max(0, len(self._open) - len(self._running))

    def stats(self) -> dict[str, float]:
        """Return the counters of `Engine.stats`, at most about a round and half a second old."""
        return dict(self._stats)

    @property
    def _forked(self) -> bool:
        return os.getpid() != self._process

    def _check_room(self) -> None:
        if self._forked:
            raise EngineStoppedError(
                f"this AsyncEngine belongs to process {self._process}, and process {os.getpid()} "
                "was forked from that, without the engine's thread: make one here"
            )
        if self._refuses:
            raise EngineStoppedError("the engine is stopping and takes no requests")
        if len(self._open) >= self._max_running + self._max_waiting:
            raise QueueFullError(
                f"queue full: {self._max_running} requests run and {self._max_waiting} wait; "
                "try again later"
            )

    def _refuse(self) -> None:
        with self._lock:
            self._refuses = True

    def _close_at_exit(self) -> None:
        self.close(_LAST_ROUND_SECONDS)

    # Where prompts are read

    def _read(self, stream: RequestStream) -> None:
        if self._reading.get(stream.request_id) is not stream:
            return  # it has left
        read: Prompt | Exception
        try:
            read = self.check_request(stream.prompt, stream.params)
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            read = _harmless(error)
        self._commands.put(partial(self._take, stream, read))

    # On the engine's thread

    def _run(self) -> None:
        try:
            while not (self._ends_when_idle and self._idle):
                self._obey(wait=not self._running)
                self._hand_over()
                if self._running:
                    self._do(self._round)
                    self._hand_over()
                self._refresh_stats(idle=not self._running)
        except BaseException as error:  # noqa: BLE001 - logged, and told to all who wait
            self._failure = error
            _log.critical(
                "the engine has stopped: %s: %s", type(error).__name__, error, exc_info=error
            )
        finally:
            # Also if the above has a fault: no caller may wait forever.
            self._refuse()
            why = self._failure
            stopped = EngineStoppedError(
                "the engine has stopped" + (f": {type(why).__name__}: {why}" if why else "")
            )
            waiting = (stream for stream, _ in self._waiting.values())
            for stream in [*self._running.values(), *waiting, *self._reading.values()]:
                self._fail(stream, stopped)
            self._running.clear()
            self._waiting.clear()
            self._reading.clear()
            self._outbox.send()
            self._ended.set_result(None)
            while not self._commands.empty():
                self._commands.get()()
            self._outbox.send()
            self._readers.close(_LAST_ROUND_SECONDS)
            atexit.unregister(self._close_at_exit)

    @property
    def _idle(self) -> bool:
        return not (self._running or self._waiting or self._reading)

    def _obey(self, *, wait: bool) -> None:
        """Carry out what was asked for since the last round; `wait` for something to do."""
        if wait:
            self._do(self._commands.get())
        while not self._commands.empty():
            self._do(self._commands.get())

    def _do(self, work: Callable[[], None]) -> None:
        """Do what must not take for ever."""
        self._work_began = time.monotonic()
        work()
        self._work_began = None

    def check_request(self, prompt: PromptLike | Prompt, params: StarsParams) -> Prompt:
        """Return a prompt that may be run, as `Engine.check_request`; for `read`."""
        read = self._engine.check_request(prompt, params)
        tokens = len(read.token_ids)
        if self._max_prompt_tokens is not None and tokens > self._max_prompt_tokens:
            raise ValueError(
                f"prompt has {tokens} tokens, more than the {self._max_prompt_tokens} allowed"
            )
        return read

    def _take(self, stream: RequestStream, read: Prompt | Exception) -> None:
        """Put a request whose prompt was read into the queue."""
        name = stream.request_id
        if self._reading.get(name) is not stream:
            return  # it has left, and its id may be another's
        del self._reading[name]
        if isinstance(read, Exception):
            self._fail(stream, read)
            return
        self._waiting[name] = stream, read
        self._admit()
        self._outbox.put(stream, partial(stream.admit, len(read.token_ids)))

    def _admit(self) -> None:
        """Put requests into the engine while there is room."""
        while self._waiting and len(self._running) < self._max_running:
            name, (stream, prompt) = self._waiting.popitem(last=False)
            try:
                self._engine.add_request(name, prompt, stream.params)
            except Exception as error:  # noqa: BLE001 - it is the caller's
                self._fail(stream, error)
            else:
                self._running[name] = stream

    def _ask_abort(self, request_id: str, abort: Callable[[], None]) -> None:
        """Abort a request after the round under way, which need draw no more for it."""
        self._commands.put(abort)
        self._interrupt(request_id)

    def _ask_abort_all(self) -> None:
        self._commands.put(self._abort_all)
        with self._lock:
            names = [*self._open]
        for name in names:
            self._interrupt(name)

    def _interrupt(self, request_id: str) -> None:
        with self._lock:
            if request_id not in self._open:
                return
            self._interrupted.add(request_id)
        self._engine.interrupt(request_id)

    def _abort_stream(self, stream: RequestStream) -> None:
        # Its id may be another request's by now.
        name = stream.request_id
        waiting, _ = self._waiting.get(name, (None, None))
        if stream in (waiting, self._running.get(name), self._reading.get(name)):
            self._abort(name)

    def _abort(self, request_id: str) -> None:
        nothing = [CompletionOutput(0, finish_reason="abort")]
        if request_id in self._reading:
            stream = self._reading.pop(request_id)
            given = stream.prompt if isinstance(stream.prompt, str) else None
            self._outbox.put(stream, partial(stream.admit, 0))
            self._pass_on(stream, RequestOutput(request_id, given, [], nothing, finished=True))
        elif request_id in self._waiting:
            stream, prompt = self._waiting.pop(request_id)
            read = prompt.text or None, list(prompt.token_ids)
            self._pass_on(stream, RequestOutput(request_id, *read, nothing, finished=True))
        elif request_id in self._running:
            output = self._engine.abort(request_id)
            if output is not None:
                self._pass_on(self._running[request_id], output)
        self._admit()

    def _abort_all(self) -> None:
        for name in [*self._reading, *self._waiting, *self._running]:
            self._abort(name)

    def _end_when_idle(self) -> None:
        self._ends_when_idle = True

    def _round(self) -> None:
        try:
            outputs = self._engine.step()
        except Exception as error:  # noqa: BLE001 - other requests must be served
            self._failures += 1
            if self._failures > _ROUND_RETRIES:
                self._fail_running(f"the round failed: {type(error).__name__}: {error}")
            return
        self._failures = 0
        for output in outputs:
            stream = self._running.get(output.request_id)
            if stream is not None:
                stopped = output.error is not None and output.request_id in self._interrupted
                self._pass_on(stream, _ended(output, "abort") if stopped else output)
        self._admit()

    def _pass_on(self, stream: RequestStream, output: RequestOutput) -> None:
        if output.finished:
            self._running.pop(stream.request_id, None)
            self._forget(stream)
        self._outbox.put(stream, partial(stream.deliver, output))

    def _hand_over(self) -> None:
        for stream in self._outbox.send():
            self._abort_stream(stream)  # its event loop is gone

    def _fail_running(self, reason: str) -> None:
        for name, stream in list(self._running.items()):
            output = self._engine.abort(name)
            if output is not None:
                self._pass_on(stream, _ended(output, "error", reason))
        self._admit()

    def _fail(self, stream: RequestStream, error: Exception) -> None:
        self._forget(stream)
        self._outbox.put(stream, partial(stream.fail, error))

    def _forget(self, stream: RequestStream) -> None:
        with self._lock:
            self._open.discard(stream.request_id)
            self._interrupted.discard(stream.request_id)

    def _refresh_stats(self, *, idle: bool) -> None:
        now = time.monotonic()
        if idle or now - self._stats_at >= _STATS_SECONDS:
            self._stats, self._stats_at = self._engine.stats(), now


def _harmless(error: BaseException) -> Exception:
    """Return an error that ends the request it came from, and nothing else."""
    if isinstance(error, Exception):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def _ended(
    output: RequestOutput, how: Literal["abort", "error"], reason: str | None = None
) -> RequestOutput:
    """Return the output of a request that was stopped halfway; responses that are whole stay so."""
    outputs = [
        one if one.finish_reason in ("stop", "length") else replace(one, finish_reason=how)
        for one in output.outputs
    ]
    return replace(output, outputs=outputs, finished=True, error=reason)
