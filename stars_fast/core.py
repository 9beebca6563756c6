"""The C++ core, for stacks that run the model themselves; needs neither torch nor transformers.

`Scheduler` decides what to draw, accept and reject, and on which pages; `PagePool` counts pages and
finds shared prefixes; `SequenceCache` keeps sequences and their forks on pages. Their docstrings
and types are in ``stars_fast/_core.pyi``.
"""

from __future__ import annotations

from stars_fast._core import (
    EVENT_ACCEPTED,
    EVENT_CHOSEN,
    EVENT_FAILED,
    EVENT_FALLBACK,
    FINISH_LENGTH,
    FINISH_NONE,
    FINISH_STOP,
    ROW_KEPT,
    ROW_PRUNED,
    ROW_WINNER,
    Batch,
    Decision,
    OutOfPagesError,
    PagePool,
    Plan,
    RequestTooLargeError,
    Schedule,
    Scheduler,
    SequenceCache,
    accept_uniform,
    philox4x32,
)

__all__ = [
    "EVENT_ACCEPTED",
    "EVENT_CHOSEN",
    "EVENT_FAILED",
    "EVENT_FALLBACK",
    "FINISH_LENGTH",
    "FINISH_NONE",
    "FINISH_STOP",
    "ROW_KEPT",
    "ROW_PRUNED",
    "ROW_WINNER",
    "Batch",
    "Decision",
    "OutOfPagesError",
    "PagePool",
    "Plan",
    "RequestTooLargeError",
    "Schedule",
    "Scheduler",
    "SequenceCache",
    "accept_uniform",
    "philox4x32",
]
