"""Errors that stars_fast raises on purpose.

Bad values of parameters are plain ``ValueError`` or ``TypeError``; the classes here are for errors
that a caller may want to handle differently.
"""

from __future__ import annotations

from stars_fast._core import OutOfPagesError

__all__ = [
    "ConcurrentCallError",
    "DeadlineError",
    "EngineStoppedError",
    "ModelLoadError",
    "NotCalibratedError",
    "OutOfPagesError",
    "QueueFullError",
    "RequestFailedError",
    "RewardError",
    "StarsFastError",
    "UnsupportedModelError",
]


class StarsFastError(Exception):
    """Base of every error class of this package except `OutOfPagesError`."""


class UnsupportedModelError(StarsFastError, ValueError):
    """A model whose architecture cannot run on paged attention; the message says why."""


class ModelLoadError(StarsFastError, ValueError):
    """A model directory that is missing, half-written or of an unexpected kind."""


class RewardError(StarsFastError, RuntimeError):
    """A reward model that raised, returned the wrong count or a non-finite value."""


class RequestFailedError(StarsFastError, RuntimeError):
    """A failed request, where the caller needs the whole batch or nothing."""


class ConcurrentCallError(StarsFastError, RuntimeError):
    """A call of an engine while another thread was inside of one; nothing was done."""


class NotCalibratedError(StarsFastError, ValueError):
    """A request that leaves its target to `Engine.calibrate`, which has not been called."""


class QueueFullError(StarsFastError, RuntimeError):
    """An `AsyncEngine` whose queue is full; a later attempt can succeed."""


class DeadlineError(StarsFastError, TimeoutError):
    """A request that was not finished within its timeout; it has been aborted."""


class EngineStoppedError(StarsFastError, RuntimeError):
    """An `AsyncEngine` that accepts no more requests: it drains, was closed, or has failed."""
