"""Times of single calls on a GPU, by events: as they are, and inside a CUDA graph."""

from __future__ import annotations

import time

import torch

from stars_fast.benchmarks.interpreter import ON_GPU
from stars_fast.benchmarks.kernel_cases import Job
from stars_fast.benchmarks.measure import percentiles

_REPEATS = 30


def timed(job: Job, sets: int, repeats: int = _REPEATS) -> list[float]:
    """Seconds of single calls, input sets in turn, after a warm-up; without a GPU, of one call."""
    if not ON_GPU:
        begun = time.perf_counter()
        job(0)
        return [time.perf_counter() - begun]
    for number in range(max(3, sets)):
        job(number % sets)
    # Events around each call, all calls queued: the host's time between launches counts where the
    # device waits for it, as it would in a caller's loop.
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for number, (begin, end) in enumerate(events):
        begin.record()
        job(number % sets)
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in events]


def replayed(job: Job, sets: int) -> list[float] | None:
    """Seconds of a call inside a CUDA graph of one call of each set; None if it has none."""
    if not ON_GPU:
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        job(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    calls = max(8, sets)
    try:
        with torch.cuda.graph(graph):
            for number in range(calls):
                job(number % sets)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return [seconds / calls for seconds in timed(lambda _: graph.replay(), 1, repeats=20)]


def microseconds(seconds: list[float] | None) -> dict[str, float] | None:
    """Return microseconds at 20, 50 and 80 %."""
    if seconds is None:
        return None
    return {name: value * 1e6 for name, value in percentiles(seconds).items()}
