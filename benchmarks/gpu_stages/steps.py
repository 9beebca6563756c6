"""Decode steps of a model as the engine runs them: their time, and what it goes into."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch

from stars_fast import Engine, StarsParams
from stars_fast.benchmarks.interpreter import ON_GPU
from stars_fast.benchmarks.least import ModelCost
from stars_fast.benchmarks.measure import ceilings
from stars_fast.benchmarks.models import (
    LLAMA_2_7B,
    ONE_BILLION,
    TINY,
    Shape,
    language_model,
    prompts,
)
from stars_fast.benchmarks.prediction import step_milliseconds

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
_TOP = 20  # kernels of a profile that are recorded


def time_large_steps() -> dict[str, Any]:
    """Time decode steps of a 7B model in a bucket of 192 rows, and profile some."""
    shape = LLAMA_2_7B if ON_GPU else TINY
    rows, steps = (192, 60) if ON_GPU else (2, 2)
    engine = _engine(shape, rows, pages=4096 if ON_GPU else 64, backend="triton")
    found = _time(engine, shape, rows, steps)
    print(found if ON_GPU else "ran")
    if ON_GPU:
        found["kernels"] = _profile(engine, shape, rows)
    return found


def time_sides() -> list[dict[str, Any]]:
    """Time decode steps of a 1.2B model, 64 rows: with the kernels, compiled, and without."""
    shape = ONE_BILLION if ON_GPU else TINY
    rows, steps = (64, 128) if ON_GPU else (2, 2)
    found = []
    sides: dict[str, dict[str, Any]] = {
        "kernels": {"backend": "triton"},
        "PyTorch's operators": {"backend": "pytorch"},
    }
    if ON_GPU:  # on a CPU the compiler takes longer than all else together
        sides["kernels, compiled"] = {"backend": "triton", "compile_model": True}
        sides["kernels, outputs first"] = {"backend": "triton", "draft_ahead": False}
    for name, options in sides.items():
        engine = _engine(shape, rows, pages=4096 if ON_GPU else 64, **options)
        found.append({"name": name, **_time(engine, shape, rows, steps)})
        print(found[-1] if ON_GPU else f"{name}: ran")
        del engine
        gc.collect()
    return found


def _engine(shape: Shape, rows: int, *, pages: int, **options: Any) -> Engine:
    model = language_model(shape, device=DEVICE, dtype=DTYPE)
    return Engine(model, max_rows=rows, num_pages=pages, prefix_caching=False, **options)


def _time(engine: Engine, shape: Shape, rows: int, steps: int) -> dict[str, Any]:
    """Milliseconds of a step, prefill and host among them, beside those predicted of it alone.

    The least is to read the weights.
    """
    _generate(engine, shape, rows, steps)  # captures and compiles
    begun = time.perf_counter()
    _generate(engine, shape, rows, steps)
    found: dict[str, Any] = {
        "rows": rows,
        "milliseconds_per_step": (time.perf_counter() - begun) / steps * 1e3,
        "captured": [bool(x) for x in getattr(engine.loop.drafter, "captures", {}).values()],
    }
    if ON_GPU:
        machine = ceilings(DEVICE, DTYPE)
        weights = ModelCost.of(language_model(shape, device="meta"), DTYPE).weight_bytes
        found["least_milliseconds"] = weights / machine.bytes_per_second * 1e3
        keys = sum(map(len, prompts(shape, rows))) + rows * (steps - 1) / 2
        found["predicted_milliseconds"] = step_milliseconds(machine, shape, rows, keys)
    return found


def _generate(engine: Engine, shape: Shape, rows: int, steps: int) -> None:
    params = StarsParams(
        method="vanilla", max_tokens=steps, segment_length=min(60, steps), seed=0, ignore_eos=True
    )
    outputs = engine.generate(prompts(shape, rows), params, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * rows


def _profile(engine: Engine, shape: Shape, rows: int) -> list[dict[str, Any]]:
    """The kernels that take most of the device's time, prefill among them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        _generate(engine, shape, rows, 8)
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda x: -x.self_device_time_total)[:_TOP]
    for event in events:
        print(f"{event.self_device_time_total:>10.0f} us {event.count:>6} {event.key[:90]}")
    return [
        {"name": x.key[:200], "calls": x.count, "microseconds": x.self_device_time_total}
        for x in events
    ]
