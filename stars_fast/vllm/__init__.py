"""STARS inside vLLM: on an engine of a program, and as routes of ``vllm serve``.

The extra ``vllm`` installs what the routes need beside vLLM itself. Terms:

call
    One request to vLLM's engine, in this process, for one segment.
"""

from stars_fast.vllm.engine import StarsLLM

__all__ = ["StarsLLM"]
