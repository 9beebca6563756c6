"""An engine on a thread of its own: what is asked of it, and what comes out."""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent import futures
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from stars_fast.engine.readers import ReaderThreads
from stars_fast.engine.streams import Outgoing, S
from stars_fast.errors import EngineStoppedError, QueueFullError
from stars_fast.outputs import CompletionOutput, RequestOutput
from stars_fast.params import StarsParams
from stars_fast.prompts import Prompt, PromptLike, Reader

if TYPE_CHECKING:
    from stars_fast.engine.batches import BatchEngine

_log = logging.getLogger(__name__)

#: Seconds of one round after which an engine is not healthy, unless it is told otherwise.
STUCK_AFTER = 300.0
#: How long a round under way that was not waited for may take when its process ends.
LAST_ROUND_SECONDS = 10.0

T = TypeVar("T")

#: How old the counters of `stats` may be while rounds run.
_STATS_SECONDS = 0.5
#: A round that raises was undone and is run again, so often in a row, before its requests fail.
_ROUND_RETRIES = 1
#: Rounds that raised in a row, after which the engine is not healthy.
_SICK_AFTER = 3


class EngineThread(Generic[S]):
    """Runs an `Engine` on its own thread; requests come from others, their outputs go to an outbox.

    `AsyncEngine` is one for asyncio, and describes the parameters that both have.

    Parameters
    ----------
    engine, max_running, max_waiting, max_prompt_tokens, stuck_after
        As `AsyncEngine`.
    outbox
        Takes what there is for the streams, on the engine's thread.
    """

    def __init__(
        self,
        engine: BatchEngine,
        outbox: Outgoing[S],
        *,
        max_running: int | None,
        max_waiting: int,
        max_prompt_tokens: int | None,
        stuck_after: float | None,
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
        self.max_running = max_running
        self.max_waiting = max_waiting
        self._max_prompt_tokens = max_prompt_tokens
        self._stuck_after = stuck_after
        self._process = os.getpid()
        self._call_numbers = itertools.count()
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
        self._reading: dict[str, S] = {}
        # Of the engine's thread.
        self._waiting: OrderedDict[str, tuple[S, Prompt]] = OrderedDict()
        self._running: dict[str, S] = {}
        self._outbox = outbox
        self._ends_when_idle = False
        self._in_round = False
        self._postponed: deque[Callable[[], None]] = deque()
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

    def add(self, stream: S, *, check_here: bool = False) -> None:
        """Queue a request, whose stream gets what becomes of it; from any thread.

        Parameters
        ----------
        stream
            The request.
        check_here
            Its prompt has been read, and is checked on this thread: that is less than to wake
            another. A grammar is compiled, and goes to the others all the same.

        Raises
        ------
        QueueFullError, EngineStoppedError, ValueError
            As `AsyncEngine.submit`.
        """
        name = stream.request_id
        with self._lock:
            if name in self._open:
                raise ValueError(f"request_id {name!r} is in use")
            self._check_room()
            self._open.add(name)
            # Inside, so that none comes behind those that a stopping thread still answers.
            self._reading[name] = stream
            if not (here := check_here and stream.params.guided is None):
                self._readers.put(partial(self._read, stream), stream.prompt)
        if here:
            self._read(stream)

    def ask(self, work: Callable[[BatchEngine], T]) -> futures.Future[T]:
        """Have something done with the engine between two rounds; from any thread.

        Raises
        ------
        QueueFullError, EngineStoppedError
            As `AsyncEngine.submit`.
        """
        return self._ask(
            lambda: work(self._engine),
            lambda run: self._commands.put(partial(self._do_between_rounds, run)),
        )

    def ask_reader(self, work: Callable[[Reader], T], prompt: object) -> futures.Future[T]:
        """Have something done where prompts are read, as `ask`; long prompts hold up no short ones.

        Raises
        ------
        QueueFullError, EngineStoppedError
            As `AsyncEngine.submit`.
        """
        return self._ask(
            lambda: work(self._engine.reader), lambda run: self._readers.put(run, prompt)
        )

    def _ask(
        self, work: Callable[[], T], put: Callable[[Callable[[], None]], None]
    ) -> futures.Future[T]:
        name = f"call-{next(self._call_numbers)}"
        done: futures.Future[T] = futures.Future()

        def run() -> None:
            with self._lock:
                self._open.discard(name)
            if not done.set_running_or_notify_cancel():
                return
            try:
                if self._ended.done():
                    raise EngineStoppedError("the engine has stopped")  # noqa: TRY301 - as it fails
                done.set_result(work())
            except BaseException as error:  # noqa: BLE001 - it is the caller's
                done.set_exception(_harmless(error))

        with self._lock:
            self._check_room()
            self._open.add(name)
            put(run)
        return done

    def abort(self, request_id: str) -> None:
        """Stop a request; its stream ends with what it had and finish reason ``"abort"``.

        May be called from any thread. The pages are free after the round under way; an unknown id
        is ignored.
        """
        self._ask_abort(request_id, partial(self._abort, request_id))

    def abort_stream(self, stream: S) -> None:
        """Stop a request as `abort`, if this stream is still the one that has its id."""
        self._ask_abort(stream.request_id, partial(self._abort_stream, stream))

    def abort_all(self) -> None:
        """Stop all requests, after the round under way."""
        self._commands.put(self._abort_all)
        with self._lock:
            names = [*self._open]
        for name in names:
            self._interrupt(name)

    def end_when_idle(self) -> None:
        """Refuse further requests, and end the thread when the others have ended; do not wait."""
        with self._lock:
            self._refuses = True
        self._commands.put(self._end_when_idle)

    def close(self, timeout: float | None = None) -> None:
        """Abort every request and end the thread after the round under way.

        Waits at most `timeout` seconds; None: as long as it takes. Do not call this on an event
        loop; use `drain` there.
        """
        if self._forked:
            return
        self.end_when_idle()
        self.abort_all()
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
                f"this {type(self).__name__} belongs to process {self._process}, and process "
                f"{os.getpid()} was forked from that, without the engine's thread: make one here"
            )
        if self._refuses:
            raise EngineStoppedError("the engine is stopping and takes no requests")
        if len(self._open) >= self.max_running + self.max_waiting:
            raise queue_full(self.max_running, self.max_waiting)

    def _close_at_exit(self) -> None:
        self.close(LAST_ROUND_SECONDS)

    # Where prompts are read

    def _read(self, stream: S) -> None:
        if self._reading.get(stream.request_id) is not stream:
            return  # it has left
        read: Prompt | Exception
        try:
            read = self.checked(stream.prompt, stream.params)
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            read = _harmless(error)
        self._commands.put(partial(self._take, stream, read))

    # On the engine's thread

    def _run(self) -> None:
        # What comes while a round runs takes part in the next one, also if that is launched ahead.
        self._engine.loop.before_plan = self._take_in
        try:
            while not (self._ends_when_idle and self._idle):
                self._obey(wait=not self._running and not self._engine.samples_prompts)
                self._hand_over()
                if self._running or self._engine.samples_prompts:
                    self._do(self._round)
                    self._hand_over()
                self._refresh_stats(idle=not self._running)
        except BaseException as error:  # noqa: BLE001 - logged, and told to all who wait
            self._failure = error
            _log.critical(
                "the engine has stopped: %s: %s", type(error).__name__, error, exc_info=error
            )
        finally:
            self._engine.loop.before_plan = None
            # Also if the above has a fault: no caller may wait forever.
            with self._lock:
                self._refuses = True
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
            while self._postponed:
                self._postponed.popleft()()
            self._outbox.send()
            self._readers.close(LAST_ROUND_SECONDS)
            atexit.unregister(self._close_at_exit)

    @property
    def _idle(self) -> bool:
        return not (self._running or self._waiting or self._reading)

    def _obey(self, *, wait: bool) -> None:
        """Carry out what was asked for since the last round; `wait` for something to do."""
        while self._postponed:
            self._do(self._postponed.popleft())
        if wait:
            self._do(self._commands.get())
        while not self._commands.empty():
            self._do(self._commands.get())

    def _take_in(self) -> None:
        """Carry out what was asked for while a round ran, before the next one is planned.

        What is to be done between two rounds waits until this one is over, and requests wait for
        the end of what is done there: its rounds are its own.
        """
        while self._in_round and not self._commands.empty():
            self._do(self._commands.get())

    def _do_between_rounds(self, work: Callable[[], None]) -> None:
        if self._in_round:
            self._postponed.append(work)
        else:
            work()

    def _do(self, work: Callable[[], None]) -> None:
        """Do what must not take for ever."""
        outer, self._work_began = self._work_began, time.monotonic()
        work()
        self._work_began = outer

    def checked(self, prompt: PromptLike | Prompt, params: StarsParams) -> Prompt:
        """Return a prompt that may be run, as `Engine.check_request`; where prompts are read."""
        read = self._engine.check_request(prompt, params)
        tokens = len(read.token_ids)
        if self._max_prompt_tokens is not None and tokens > self._max_prompt_tokens:
            raise ValueError(
                f"prompt has {tokens} tokens, more than the {self._max_prompt_tokens} allowed"
            )
        return read

    def _take(self, stream: S, read: Prompt | Exception) -> None:
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
        while self._waiting and len(self._running) < self.max_running:
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

    def _interrupt(self, request_id: str) -> None:
        with self._lock:
            if request_id not in self._open:
                return
            self._interrupted.add(request_id)
        self._engine.interrupt(request_id)

    def _abort_stream(self, stream: S) -> None:
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
        self._in_round = True
        try:
            outputs = self._engine.step()
        except Exception as error:  # noqa: BLE001 - other requests must be served
            self._failures += 1
            if self._failures > _ROUND_RETRIES:
                self._fail_running(f"the round failed: {type(error).__name__}: {error}")
            return
        finally:
            self._in_round = False
        self._failures = 0
        for output in outputs:
            stream = self._running.get(output.request_id)
            if stream is not None:
                stopped = output.error is not None and output.request_id in self._interrupted
                self._pass_on(stream, _ended(output, "abort") if stopped else output)
        self._admit()

    def _pass_on(self, stream: S, output: RequestOutput) -> None:
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
        self._engine.drop_samples()
        self._admit()

    def _fail(self, stream: S, error: Exception) -> None:
        self._forget(stream)
        self._outbox.put(stream, partial(stream.fail, error))

    def _forget(self, stream: S) -> None:
        with self._lock:
            self._open.discard(stream.request_id)
            self._interrupted.discard(stream.request_id)

    def _refresh_stats(self, *, idle: bool) -> None:
        now = time.monotonic()
        if idle or now - self._stats_at >= _STATS_SECONDS:
            self._stats, self._stats_at = self._engine.stats(), now


def queue_full(max_running: int, max_waiting: int) -> QueueFullError:
    """Return the error of a request for which there is no room."""
    return QueueFullError(
        f"queue full: {max_running} requests run and {max_waiting} wait; try again later"
    )


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
