"""Errors that stars_fast raises on purpose.

Bad values of parameters are plain ``ValueError`` / ``TypeError``; the classes here are for what a
caller may want to tell apart.
"""

from __future__ import annotations

from stars_fast._core import OutOfPagesError

__all__ = [
    "ConcurrentCallError",
    "DeadlineError",
    "EngineStoppedError",
    "ModelLoadError",
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
    """A request that failed, where all of a batch is wanted or nothing."""


class ConcurrentCallError(StarsFastError, RuntimeError):
    """A call of an engine while another thread was inside of one; nothing was done."""


class QueueFullError(StarsFastError, RuntimeError):
    """An `AsyncEngine` that has as many requests as it may; trying again later can help."""


class DeadlineError(StarsFastError, TimeoutError):
    """A request that was not finished within its timeout; it has been aborted."""


class EngineStoppedError(StarsFastError, RuntimeError):
    """An `AsyncEngine` that takes no requests any more: it drains, was closed, or has failed."""
