"""What the host does in a round between the models' forward passes, by requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from stars_fast import Engine, StarsParams
from stars_fast.benchmarks.acceptance import target_for
from stars_fast.benchmarks.measure import percentiles, synchronize
from stars_fast.benchmarks.models import Shape, id_engine, language_model, prompts, reward_model
from stars_fast.benchmarks.roofline import pages_needed, seeded
from stars_fast.benchmarks.stand_in_device import Speed, StandInDevice

#: So small that most of a round is the host's.
SHAPE = Shape(2000, 32, 32, 1, 2, 2)
PAGE_SIZE = 16
CANDIDATES = 2


class Watch:
    """Seconds spent in an engine's models: drafting, prefill, scoring's passes, copies of pages."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device

    @contextmanager
    def on(self, engine: Engine) -> Iterator[None]:
        """Watch for as long as the context lasts."""
        loop: Any = engine.loop
        watched = [
            (loop.drafter, "draft"),
            (loop.model, "prefill"),
            (loop.model, "copy_pages"),
            (loop.scorer.model, "extend_all"),
            (loop.scorer.model, "copy_pages"),
        ]
        for owner, name in watched:
            setattr(owner, name, self._timed(getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name in watched:
                delattr(owner, name)

    def _timed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:  # noqa: ANN401 - what it runs gives
            begun = time.perf_counter()
            try:
                return run(*args, **options)
            finally:
                synchronize(self._device)
                self.seconds += time.perf_counter() - begun

        return timed


#: Of models of some billion weights, so that the host is done before the device is.
SPEED = Speed(step=2e-3, score=10e-3)


@pytest.mark.sizes("requests", full=[1, 8, 64, 256], small=[3])
def test_device_waits(benchmark: BenchmarkFixture, full: bool, requests: int) -> None:
    """What the device waits for in a round of so many requests, the next draft launched early.

    Against outputs that are made first. Half of the attempts pass, of two candidates.
    """
    waits = benchmark.pedantic(
        lambda: {ahead: _waits(requests, ahead=ahead, full=full) for ahead in (True, False)}
    )
    mine, other = percentiles(waits[True]), percentiles(waits[False])
    benchmark.extra_info.update(
        work={"requests": requests, "rows": CANDIDATES * requests},
        ours=mine,
        others={"outputs first": other},
        ratio={"outputs first": other["p50"] / mine["p50"]},
        rounds=len(waits[True]),
    )


def _waits(requests: int, *, ahead: bool, full: bool) -> list[float]:
    """Return the seconds of the device without work in each round of all the requests."""
    tokens, segment, length = (128, 15, 128) if full else (8, 4, 8)
    rows = CANDIDATES * requests
    pages = pages_needed(requests, rows, length, tokens, segment, PAGE_SIZE)
    engine = id_engine(
        language_model(SHAPE), reward_model(SHAPE), SHAPE, device="cpu", page_size=PAGE_SIZE,
        num_pages=pages, reward_num_pages=pages, max_rows=rows, prefix_caching=False,
        max_prefill_tokens=requests * length, draft_ahead=ahead,
    )  # fmt: skip
    device = StandInDevice(engine, SPEED if full else Speed(step=1e-4, score=1e-4))
    params = StarsParams(
        segment_length=segment, max_tokens=tokens, candidates=CANDIDATES, acceptance="hard",
        target_reward=0.0, alpha=1.0, ignore_eos=True,
    )  # fmt: skip
    asked = prompts(SHAPE, requests, length, length)
    taken: list[float] = []
    for repeat in range(4 if full else 1):
        for number, (prompt, one) in enumerate(zip(asked, seeded(params, requests), strict=True)):
            engine.add_request(str(number), prompt, one)
        engine.step()  # the requests come in it
        while engine.stats()["requests_running"] == requests:
            before = device.idle
            engine.step()
            if repeat or not full:
                taken.append(device.idle - before)
        while engine.has_unfinished():
            engine.step()
    return taken


@pytest.mark.sizes("requests", full=[1, 8, 64, 256], small=[3])
def test_host(benchmark: BenchmarkFixture, device: torch.device, full: bool, requests: int) -> None:
    """`ours` is a round without the time of its models; half of the attempts pass."""
    tokens, segment, length = (128, 15, 128) if full else (8, 4, 8)
    rows = 4 * requests
    pages = pages_needed(requests, rows, length, tokens, segment, PAGE_SIZE)
    engine = id_engine(
        language_model(SHAPE, device=device), reward_model(SHAPE, device=device), SHAPE,
        page_size=PAGE_SIZE, num_pages=pages, reward_num_pages=pages, max_rows=rows,
        prefix_caching=False,
    )  # fmt: skip
    plain = StarsParams(
        segment_length=segment, max_tokens=tokens, candidates=CANDIDATES, alpha=1.0, ignore_eos=True
    )
    asked = prompts(SHAPE, requests, length, length)
    target = target_for(engine, asked, plain, 0.5, tolerance=0.2)
    params = seeded(replace(plain, target_reward=target), requests)
    watch = Watch(device)
    taken: list[float] = []

    def run() -> None:
        for number, (prompt, one) in enumerate(zip(asked, params, strict=True)):
            engine.add_request(str(number), prompt, one)
        while engine.has_unfinished():
            before, begun = watch.seconds, time.perf_counter()
            engine.step()
            seconds = time.perf_counter() - begun
            taken.append(seconds - (watch.seconds - before))

    with watch.on(engine):
        run()
        taken.clear()
        before = engine.stats()
        benchmark.pedantic(run, rounds=5 if full else 1)
    after = engine.stats()
    rounds = after["rounds"] - before["rounds"]
    benchmark.extra_info.update(
        work={
            "requests": requests,
            "rows": round((after["attempts"] - before["attempts"]) / rounds),
        },
        ours=percentiles(taken),
        rounds=rounds,
    )
