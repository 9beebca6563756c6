"""How many threads a decode step runs on: fewer while other programs keep cores busy.

A step has a hundred parallel regions and more, each far shorter than the time slice of an operating
system. Where another program has a core, every region waits for the thread that does not run, while
the others spin: with one busy neighbour on two cores a step takes three times as long, and on one
thread one and a half times as long as on two with no neighbour. So now and then a few steps of a
round run on fewer or on more threads, and the faster number stays. The operators of `csrc/cpu` and
oneDNN's products give the same bits on any number of threads, and so does PyTorch's sampling of
more than one row.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

_EVERY = 128  # steps between two tries
_SOONEST = 8  # likewise, after a step that took unusually long
_SLOW = 1.5  # what is unusual, over the fastest step of late
_TRIED = 3  # steps of a try; the first makes oneDNN's kernels for a number of threads
_BETTER = 0.9  # what another number has to come down to


class StepThreads:
    """Chooses the number of threads of each step by the time that steps take.

    Parameters
    ----------
    clock
        Seconds; what takes the time of steps.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._most = 0
        self._counts: list[int] = []
        self._chosen = 0  # index of the number that runs
        self._recent: list[float] = []  # of the last steps of this round on the chosen number
        self._tried: list[float] = []  # of a try under way
        self._trying: int | None = None  # index of the number that is tried
        self._since = 0  # steps since the last try
        self._up = False  # where the last try was

    @property
    def count(self) -> int:
        """The number that steps run on, but for tries; 0 before the first."""
        return self._counts[self._chosen] if self._counts else 0

    def begin_round(self) -> None:
        """Start a round: times are compared within rounds, whose steps cost the same."""
        self._recent.clear()
        self._trying = None

    def run(self, step: Callable[[], T]) -> T:
        """Run a step on the number of threads that is due; leave PyTorch's number as it was."""
        most = torch.get_num_threads()
        if most != self._most:
            self._restart(most)
        if most == 1:
            return step()
        count = self._counts[self._chosen if self._trying is None else self._trying]
        began = self._clock()
        if count != most:
            torch.set_num_threads(count)
        try:
            result = step()
        finally:
            if count != most:
                torch.set_num_threads(most)
        self._note(self._clock() - began)
        return result

    def _restart(self, most: int) -> None:
        self._most = most
        shares = {most, -(-most * 3 // 4), -(-most // 2), 1}
        self._counts = sorted(shares, reverse=True)
        self._chosen = 0
        self._trying = None
        self._since = 0
        self._recent.clear()

    def _note(self, seconds: float) -> None:
        if self._trying is not None:
            self._tried.append(seconds)
            if len(self._tried) == _TRIED:
                self._decide(self._trying)
            return
        self._since += 1
        slow = bool(self._recent) and seconds > _SLOW * min(self._recent)
        self._recent = [*self._recent[-3:], seconds]
        due = self._since >= _EVERY or (slow and self._since >= _SOONEST)
        if due and len(self._recent) >= 2:
            self._try()

    def _try(self) -> None:
        """Try the next number in the other direction than last time, where there is one."""
        last = len(self._counts) - 1
        self._up = self._chosen > 0 and (not self._up or self._chosen == last)
        self._trying = self._chosen - 1 if self._up else self._chosen + 1
        self._tried.clear()

    def _decide(self, tried: int) -> None:
        self._since = 0
        if min(self._tried[1:]) < _BETTER * min(self._recent):
            self._chosen = tried
            self._since = _EVERY - _SOONEST  # the next one may be better still
        self._trying = None
        self._recent.clear()
