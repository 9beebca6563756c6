"""A step that is run again and again, as a CUDA graph where there are CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

_log = logging.getLogger(__name__)


class StepGraph:
    """Runs a function of no arguments that works on tensors with a fixed place.

    On a CUDA device the function is captured once and replayed: one launch a step. A model whose
    forward cannot be captured (it waits for the device, say) runs eagerly, and a line in the log
    says so. On a CPU it runs eagerly.

    Parameters
    ----------
    step
        Runs one step. Is called a few times while the graph is made, so the tensors it works on
        must hold something harmless then, and be rewritten before `run`.
    device
        Where its tensors are.
    pool
        Memory shared with other graphs that never run at the same time, from
        ``torch.cuda.graph_pool_handle()``; None for none.
    """

    def __init__(
        self,
        step: Callable[[], None],
        device: torch.device,
        pool: Any = None,  # noqa: ANN401 - torch has no public type for it
    ) -> None:
        self._step = step
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._graph = _captured(step, pool)

    @property
    def captured(self) -> bool:
        """Whether `run` replays a graph."""
        return self._graph is not None

    def run(self, times: int) -> None:
        """Run the step so many times, without waiting for the device."""
        for _ in range(times):
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()


def _captured(step: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph | None:  # noqa: ANN401
    # On a stream of its own, twice: kernels are compiled, handles and buffers made, before the
    # capture, in which none of that is allowed.
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        # Another thread may be scoring meanwhile: what it does is no fault of this capture.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:
        torch.cuda.synchronize()
        _log.warning("decode steps run without a CUDA graph: %s", error)
        return None
    return graph
