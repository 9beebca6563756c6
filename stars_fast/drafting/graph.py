"""A step that is run again and again, as a CUDA graph where there are CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_log = logging.getLogger(__name__)

_WAITS = {
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "allclose",
    "equal",
    "masked_select",
    "nonzero",
    "repeat_interleave",  # unless it is told the size of its result
    "unique_consecutive",
    "unique_dim",
}
_INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}
_COPIES = {"_to_copy": 0, "copy_": 1}  # and which argument is copied


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

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - an operator overload
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run an operator that does not wait."""
        kwargs = kwargs or {}
        if func.namespace == "aten":
            with self:  # what is made of other operators comes whole in inference mode
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        name = func._schema.name.removeprefix("aten::")
        if name in _WAITS and kwargs.get("output_size") is None:
            raise RuntimeError(f"the step waits for the device: {name}")
        if name in _INDEXES:
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    raise RuntimeError(f"the step waits for the device: {name} by a mask")
                if index is not None and index.device != args[0].device:
                    raise RuntimeError(f"the step copies from {index.device} to {args[0].device}")
        result = func(*args, **kwargs)
        source = _COPIES.get(name)
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
