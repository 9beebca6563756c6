"""Captures of steps that fail, on a stand-in for CUDA that fails as CUDA does."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest
import torch

from stars_fast.drafting import graph as graphs
from stars_fast.drafting.graph import GraphMemory, NoWaiting, StepGraph


class Graph:
    """A graph that replays nothing."""

    def replay(self) -> None:
        pass


class Cuda:
    """Streams by name, and pools that are lost with their last graph."""

    CUDAGraph = Graph

    def __init__(self, fails_at: str = "") -> None:
        self.fails_at = fails_at
        self.current = "default"
        self.capturing = False
        self.pools: list[WeakSet[Graph]] = []
        self.opened: set[int] = set()

    def Stream(self, device: torch.device) -> Any:
        return SimpleNamespace(name="side", wait_stream=lambda other: None)

    def current_stream(self) -> Any:
        return SimpleNamespace(name=self.current, wait_stream=lambda other: None)

    def set_stream(self, stream: Any) -> None:
        self.current = stream.name

    def synchronize(self) -> None:
        assert not self.capturing

    def graph_pool_handle(self) -> int:
        self.pools.append(WeakSet())
        return len(self.pools) - 1

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    @contextmanager
    def graph(self, graph: Graph, *, pool: int, stream: Any, **_: Any) -> Iterator[None]:
        if pool in self.opened and not self.pools[pool]:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
        if self.fails_at == "entry":
            raise RuntimeError("at entry")
        before, self.current = self.current, stream.name
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False
        if self.fails_at == "exit":
            raise RuntimeError("at exit")  # and the stream stays
        self.opened.add(pool)
        self.pools[pool].add(graph)
        self.current = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Cuda]:
    def stand_in(fails_at: str) -> Cuda:
        made = Cuda(fails_at)
        monkeypatch.setattr(graphs, "torch", SimpleNamespace(cuda=made))
        return made

    return stand_in


@pytest.mark.parametrize("fails_at", ["entry", "inside", "exit"])
def test_a_capture_that_fails_leaves_the_stream(
    cuda: Callable[[str], Cuda], fails_at: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And the next one, in the memory that they share, is captured."""
    stand_in, calls = cuda(fails_at), []

    def step() -> None:
        calls.append(stand_in.current)
        if stand_in.capturing and stand_in.fails_at == "inside":
            raise RuntimeError("at inside")

    memory = GraphMemory(torch.device("cuda"))
    graph = StepGraph(step, memory)
    assert not graph.captured
    assert stand_in.current == "default"
    assert f"without a CUDA graph: at {fails_at}" in caplog.text
    calls.clear()
    graph.run(2)
    assert calls == ["default"] * 2
    stand_in.fails_at = ""
    assert StepGraph(step, memory).captured
    assert stand_in.current == "default"


def test_a_capture_that_would_fail_is_not_begun(cuda: Callable[[str], Cuda]) -> None:
    stand_in = cuda("")
    number = torch.ones(1)

    def step() -> None:
        assert not stand_in.capturing
        number.item()

    assert not StepGraph(step, GraphMemory(torch.device("cuda"))).captured
    assert stand_in.current == "default"


def test_warm_up_and_capture_have_one_stream(cuda: Callable[[str], Cuda]) -> None:
    stand_in, calls = cuda(""), []
    assert StepGraph(
        lambda: calls.append((stand_in.current, stand_in.capturing)),
        GraphMemory(torch.device("cuda")),
    ).captured
    assert calls == [("side", False), ("side", False), ("side", True)]


def test_the_only_graph_can_be_replaced(cuda: Callable[[str], Cuda]) -> None:
    stand_in = cuda("")
    memory = GraphMemory(torch.device("cuda"))
    first, second = (StepGraph(lambda: None, memory) for _ in range(2))
    assert len(stand_in.pools) == 1
    del first, second
    gc.collect()
    assert StepGraph(lambda: None, memory).captured
    assert len(stand_in.pools) == 2


@pytest.mark.parametrize("inference", [True, False])  # there, operators come as they were called
@pytest.mark.parametrize(
    ("waits", "step"),
    [
        ("_local_scalar_dense", lambda x: x.sum().item()),
        ("_local_scalar_dense", lambda x: bool((x > 0).all())),
        ("nonzero", lambda x: x.nonzero()),
        ("nonzero", lambda x: torch.where(x > 0)),
        ("masked_select", lambda x: x.masked_select(x > 0)),
        ("index by a mask", lambda x: x[x > 0]),
        ("equal", lambda x: torch.equal(x, x + 1)),
        ("repeat_interleave", lambda x: x.repeat_interleave(x.long())),
        ("from cpu to meta", lambda x: x.to("meta")),
        ("from cpu to meta", lambda x: torch.ones(2, device="meta")[x.long()]),
    ],
)
def test_what_waits_for_the_device_is_named(
    waits: str, step: Callable[[torch.Tensor], object], inference: bool
) -> None:
    x = torch.ones(3)
    with torch.inference_mode(inference):
        with NoWaiting(), pytest.raises(RuntimeError, match=waits):
            step(x)
        with NoWaiting():
            x.add_(1).copy_(x[torch.zeros(3, dtype=torch.int64)])
            x.repeat_interleave(torch.ones(3, dtype=torch.int64), output_size=3)
