"""A step that is run again and again, as a CUDA graph where there are CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_log = logging.getLogger(__name__)


class GraphMemory:
    """The stream and the memory of graphs that never run at the same time.

    Parameters
    ----------
    device
        A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        #: For warm-ups and captures: what a library makes for a stream is made before the capture.
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._pool: Any = None  # torch has no public type for it

    def pool(self) -> Any:  # noqa: ANN401
        """Return the pool to capture into; torch gives one up with the last graph in it."""
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def hold(self, graph: torch.cuda.CUDAGraph) -> None:
        """Note a graph that was captured into the pool."""
        self._graphs.add(graph)


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
    memory
        Shared with other graphs; None on a CPU.
    """

    def __init__(self, step: Callable[[], None], memory: GraphMemory | None) -> None:
        self._step = step
        self._graph = None if memory is None else _captured(step, memory)

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


class NoWaiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises RuntimeError at an operator that waits for the device, on this thread alone."""

    _WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive")

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - an operator overload
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run an operator that does not wait."""
        name = func._schema.name
        if name.removeprefix("aten::") in self._WAITS:
            raise RuntimeError(f"the step waits for the device: {name}")
        result = func(*args, **(kwargs or {}))
        source = {"aten::_to_copy": 0, "aten::copy_": 1}.get(name)
        if source is not None and result.device != args[source].device:
            raise RuntimeError(f"the step copies from {args[source].device} to {result.device}")
        return result


def _captured(step: Callable[[], None], memory: GraphMemory) -> torch.cuda.CUDAGraph | None:
    stream = memory.stream
    with torch.cuda.device(memory.device):
        current = torch.cuda.current_stream()
        # Twice before the capture, in which nothing may be compiled or made: and a capture that
        # fails leaves the allocator in it, so that one that would fail is not begun.
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                step()
                with NoWaiting():  # type: ignore[no-untyped-call]
                    step()
            graph = torch.cuda.CUDAGraph()
            # Another thread may be scoring meanwhile: what it does is no fault of this capture.
            with torch.cuda.graph(
                graph, pool=memory.pool(), stream=stream, capture_error_mode="thread_local"
            ):
                step()
        except RuntimeError as error:
            torch.cuda.synchronize()
            _log.warning("decode steps run without a CUDA graph: %s", error)
            return None
        finally:
            torch.cuda.set_stream(current)  # a capture that fails at its end leaves its own
            current.wait_stream(stream)
    memory.hold(graph)
    return graph
