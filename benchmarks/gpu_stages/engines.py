"""The engine's CUDA graphs and its tokens: what a GPU does that no CPU shows."""

from __future__ import annotations

from typing import Any

import torch

from stars_fast import Engine, StarsParams
from stars_fast.benchmarks.interpreter import ON_GPU
from stars_fast.benchmarks.models import TINY, language_model, prompts
from stars_fast.drafting.captured import CapturedDrafter
from stars_fast.drafting.graph import GraphMemory, StepGraph

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
_PROMPTS = ("Write a review of a kettle.", "Write a review of a film.")


def compare_captured() -> dict[str, Any]:
    """Compare replayed steps on the kernels with eager ones by PyTorch, on the same device."""
    asked, steps = prompts(TINY, 2, 16, 16), 24 if ON_GPU else 2
    found = {
        name: _unaligned(_engine(backend=name), asked, steps) for name in ("pytorch", "triton")
    }
    assert found["pytorch"] == found["triton"], found
    print(f"{len(asked)} responses of {steps} tokens are the same")
    return {"responses": len(asked), "tokens": steps}


def replace_only_bucket() -> dict[str, Any]:
    """Outgrow the only bucket: its graph goes, and with it the memory that the next one takes."""
    engine = _engine(backend="triton", num_pages=64, max_rows=1)
    asked = prompts(TINY, 1, 8, 8)
    for steps in (4, 96) if ON_GPU else (1,):  # a bucket holds 64
        _unaligned(engine, asked, steps)
    drafter = engine.loop.drafter
    assert isinstance(drafter, CapturedDrafter), drafter
    captured = list(drafter.captures.values())
    assert captured == [ON_GPU], captured
    return {"captured": captured}


def refuse_waiting_step() -> dict[str, Any]:
    """Run a step that waits for the device eagerly, and capture the next one all the same."""
    memory = GraphMemory(DEVICE) if ON_GPU else None
    x = torch.zeros(4, device=DEVICE)

    def waits() -> None:
        x.add_(float(x.sum()))

    def adds() -> None:
        x.add_(1.0)

    eager, graph = StepGraph(waits, memory), StepGraph(adds, memory)
    eager.run(2)
    x.zero_()
    graph.run(3)
    assert (eager.captured, graph.captured) == (False, ON_GPU)
    assert x.tolist() == [3.0] * 4, x
    return {"eager": not eager.captured, "captured_after": graph.captured}


def compare_devices() -> dict[str, Any]:
    """Run the demo's prompts on the GPU and on the CPU, in float32, with the same seeds."""
    asked = [*_PROMPTS] * (8 if ON_GPU else 1)
    tokens = 64 if ON_GPU else 2
    settings = [
        StarsParams(
            segment_length=16 if ON_GPU else 2,
            target_reward=0.5,
            beta=0.3,
            max_tokens=tokens,
            max_attempts=4,
            top_p=1.0 if i % 2 else 0.95,
            seed=i,
        )
        for i in range(len(asked))
    ]
    found = []
    sides: list[dict[str, Any]] = [
        {"device": "cpu", "backend": "pytorch"},
        {"device": DEVICE, "backend": "triton"},
    ]
    if ON_GPU:
        sides.append({"device": DEVICE, "backend": "triton", "draft_ahead": False})
    for options in sides:
        engine = Engine.demo(dtype=torch.float32, max_rows=64, num_pages=1024, **options)
        outputs = engine.generate(asked, settings, use_tqdm=False)
        assert [output.error for output in outputs] == [None] * len(outputs)
        found.append([output.outputs[0].token_ids for output in outputs])
    assert found[-1] == found[1], "draft_ahead changes what is drawn"
    same = sum(a == b for a, b in zip(*found[:2], strict=True))
    print(f"{same} of {len(asked)} responses of {tokens} tokens are the same")
    # A near tie may fall the other way, and what follows it then differs.
    assert same >= 0.9 * len(asked), found
    return {"responses": len(asked), "tokens": tokens, "same": same}


def _engine(**options: Any) -> Engine:
    model = language_model(TINY, device=DEVICE, dtype=torch.float32)
    return Engine(model, **{"max_rows": 8, "num_pages": 32, **options})


def _unaligned(engine: Engine, asked: list[list[int]], steps: int) -> list[list[int]]:
    """Tokens of unaligned responses, each drafted in one round."""
    params = StarsParams(
        method="vanilla", max_tokens=steps, segment_length=steps, seed=0, ignore_eos=True
    )
    outputs = engine.generate(asked, params, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [output.outputs[0].token_ids for output in outputs]
