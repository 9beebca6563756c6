"""Seconds by phase of a round, by the host's clock or by CUDA events.

The host's clock is cheap, but a GPU works behind the host's back: a phase is charged for the time
in which the host waited, not for the work it launched. Events are put into the device's own stream
and tell when it reached them; they cost a few microseconds each, so they are off by default.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class PhaseClock:
    """Adds up the time of each phase.

    Parameters
    ----------
    phases
        Their names.
    device
        A CUDA device whose events to time by; None: the host's clock.
    """

    def __init__(self, phases: Sequence[str], device: torch.device | None = None) -> None:
        self._seconds = dict.fromkeys(phases, 0.0)
        self._device = device
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def phase(self, name: str, *, on_host: bool = False) -> Iterator[None]:
        """Charge what happens inside to a phase, with `on_host` by the host's clock always."""
        if self._device is not None and not on_host:
            with self._by_events(name, self._device):
                yield
            return
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - begun

    @contextmanager
    def _by_events(self, name: str, device: torch.device) -> Iterator[None]:
        stream = torch.cuda.current_stream(device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record(stream)
        try:
            yield
        finally:
            end.record(stream)
            self._pending.append((name, begin, end))
            self._settle()

    def _settle(self) -> None:
        """Add up the phases that the device has left behind."""
        while self._pending and self._pending[0][2].query():  # type: ignore[no-untyped-call]
            name, begin, end = self._pending.popleft()
            self._seconds[name] += begin.elapsed_time(end) / 1000

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase; by events, waits for those that the device is in."""
        if self._pending:
            self._pending[-1][2].synchronize()
            self._settle()
        return dict(self._seconds)
