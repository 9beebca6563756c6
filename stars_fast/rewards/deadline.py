"""Calls of a user's function, plain or async, each within a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
import weakref
from collections.abc import Awaitable, Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch

__all__ = ["MAX_HANGING", "HungError", "TimedCalls"]

_T = TypeVar("_T")

#: Threads that may hang in a function at once; more calls fail at once until one of them ends.
MAX_HANGING = 4


class HungError(TimeoutError):
    """A call that did not return in time, or was not made as too many before it still hang."""


class TimedCalls:
    """Makes calls, on a thread of its own where they have a deadline or are async.

    Python cannot end a thread: one whose call is over time is left to its call, and the next call
    has another. No more than `MAX_HANGING` are left so at once. What an async function awaits is
    cancelled, which frees its thread as a rule.

    Parameters
    ----------
    timeout
        Seconds that a call may take, above 0; None: as many as it takes.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self._timeout = timeout
        self._thread: _Thread | None = None
        self._hanging: list[_Thread] = []

    def run(self, call: Callable[[], Any], read: Callable[[Any], _T]) -> _T:
        """Return what `read` makes of what `call` returns; one call at a time.

        What it returns is awaited if it can be, always by one event loop, so that an async function
        may keep clients that belong to it.

        Raises
        ------
        HungError
            If the time is over, or `MAX_HANGING` calls still hang.
        BaseException
            What the two raise.
        """
        if self._timeout is not None:
            return self._on_thread(call, read)
        returned = call()
        if inspect.isawaitable(returned):
            return self._on_thread(lambda: returned, read)
        return read(returned)

    def _on_thread(self, call: Callable[[], Any], read: Callable[[Any], _T]) -> _T:
        self._hanging = [thread for thread in self._hanging if thread.busy]
        if len(self._hanging) >= MAX_HANGING:
            raise HungError(
                f"was not called: {MAX_HANGING} calls before have been going on for more than "
                f"{self._timeout:g} s each"
            )
        if self._thread is None:
            self._thread = _Thread()
            weakref.finalize(self, self._thread.leave)
        thread = self._thread
        answers = thread.begin(call, read)
        try:
            succeeded, value = answers.get(timeout=self._timeout)
        except BaseException as error:  # over time, or interrupted
            self._thread = None
            self._hanging.append(thread)
            thread.leave()
            if isinstance(error, Empty):
                raise HungError(f"did not return within {self._timeout:g} s") from None
            raise
        if not succeeded:
            raise value
        result: _T = value
        return result


#: (True, what was returned) or (False, what was raised).
_Answers = SimpleQueue[tuple[bool, Any]]
_Job = tuple[Callable[[], Any], Callable[[Any], Any], _Answers]


class _Thread:
    """Makes calls one after the other, and awaits what they return."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[Any] | None = None
        self._left = False
        #: Whether a call is under way.
        self.busy = False
        # A daemon: a call that hangs must not keep the process from ending.
        threading.Thread(target=self._run, name="stars-fast-reward", daemon=True).start()

    def begin(self, call: Callable[[], Any], read: Callable[[Any], Any]) -> _Answers:
        """Begin a call; how it ends will be in the queue."""
        answers: _Answers = SimpleQueue()
        self.busy = True
        self._jobs.put((call, read, answers))
        return answers

    def leave(self) -> None:
        """Cancel what is awaited, and end when the call does."""
        self._left = True
        self._jobs.put(None)
        with contextlib.suppress(RuntimeError):  # it has just ended
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _run(self) -> None:
        while self._do_next():
            pass
        self._loop.close()

    def _do_next(self) -> bool:
        # Not in the loop above: a thread that waits must not keep what it was called with.
        job = self._jobs.get()
        if job is None:
            return False
        call, read, answers = job
        try:
            with torch.inference_mode():  # as on the engine's own thread
                value = call()
                if inspect.isawaitable(value):
                    value = self._loop.run_until_complete(self._awaited(value))
                answers.put((True, read(value)))
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            answers.put((False, error))
        self.busy = False
        return True

    async def _awaited(self, value: Awaitable[Any]) -> Any:  # noqa: ANN401 - whatever it is
        self._task = asyncio.current_task()
        if self._left:  # before there was a task to cancel
            raise asyncio.CancelledError
        return await value
