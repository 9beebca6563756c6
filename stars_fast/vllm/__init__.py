"""STARS inside vLLM: on an engine of a program, as routes of ``vllm serve``, in its scheduler.

The extra ``vllm`` installs what the routes need beside vLLM itself. Terms:

call
    One request to vLLM's engine, in this process, for one segment.
"""

from typing import TYPE_CHECKING

from stars_fast.vllm.engine import StarsLLM

if TYPE_CHECKING:
    from stars_fast.vllm.checks import StarsChecks
    from stars_fast.vllm.scheduler import StarsScheduler

__all__ = ["StarsChecks", "StarsLLM", "StarsScheduler"]


def __getattr__(name: str) -> object:
    """Import what is asked for: these files need vLLM, the scheduler's one version of it."""
    if name == "StarsChecks":
        from stars_fast.vllm.checks import StarsChecks

        return StarsChecks
    if name == "StarsScheduler":
        from stars_fast.vllm.scheduler import StarsScheduler

        return StarsScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
