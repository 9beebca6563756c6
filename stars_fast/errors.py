"""Errors that stars_fast raises on purpose.

Bad values of parameters are plain ``ValueError`` / ``TypeError``; the classes here are for what a
caller may want to tell apart.
"""

from __future__ import annotations

from stars_fast._core import OutOfPagesError

__all__ = [
    "ModelLoadError",
    "OutOfPagesError",
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
