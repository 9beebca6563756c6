"""Threads on which prompts are read: their templates filled in, their text tokenised."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue

from stars_fast.text.chats import IMAGE_TYPES

#: Characters of a prompt that takes so long that others are not to wait for it.
LONG_TEXT = 1 << 15


class ReaderThreads:
    """Two threads beside the engine's: one reads short prompts, the other long ones.

    Each does its work in the order in which it came.

    Parameters
    ----------
    together
        They may run at once; otherwise there is one thread for both.
    """

    def __init__(self, *, together: bool) -> None:
        short = _Worker("stars-fast-reader")
        self._short = short
        self._long = _Worker("stars-fast-long-reader") if together else short
        self._workers = [self._short, self._long] if together else [short]

    def put(self, work: Callable[[], None], prompt: object) -> None:
        """Queue work, which must not raise, on a prompt."""
        (self._long if is_long(prompt) else self._short).queue.put(work)

    def seconds(self) -> float:
        """Return how long the work under way has taken so far; the longer of the two."""
        begun = [at for worker in self._workers if (at := worker.began) is not None]
        return time.monotonic() - min(begun) if begun else 0.0

    def close(self, timeout: float) -> None:
        """End both when they have done what is queued; wait at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        for worker in self._workers:
            worker.queue.put(None)
        for worker in self._workers:
            worker.thread.join(max(0.0, deadline - time.monotonic()))


class _Worker:
    """A thread and its queue; None ends it."""

    def __init__(self, name: str) -> None:
        self.queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.began: float | None = None
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (work := self.queue.get()) is not None:
            self.began = time.monotonic()
            work()
            self.began = None


def is_long(prompt: object) -> bool:
    """Whether a prompt has more than `LONG_TEXT` characters or token ids, or has pictures."""
    size, left = 0, [prompt]
    while left and size <= LONG_TEXT:
        value = left.pop()
        if isinstance(value, str) or (
            isinstance(value, Sequence) and value and isinstance(value[0], int)
        ):
            size += len(value)
            continue
        size += 1
        if isinstance(value, Mapping):
            if value.get("type") in IMAGE_TYPES:
                return True  # a small file may be a large picture
            left += value.values()
        elif isinstance(value, Sequence):
            left += value
    return size > LONG_TEXT
