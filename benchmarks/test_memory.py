"""The memory of an engine with two models on a CPU, against its weights and the pages in use.

`kept` is the same with models that the user holds, whose weights stay beside the packed ones.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stars_fast.benchmarks import memory
from stars_fast.benchmarks.compare import Compare
from stars_fast.benchmarks.models import (
    SMOLLM2_135M,
    Shape,
    id_tokenizer,
    language_model,
    reward_model,
)

#: 34M is large enough that what each run takes besides does not count.
SHAPES = {"135M": SMOLLM2_135M, "34M": Shape(16_384, 512, 1536, 8, 8, 4)}
#: Of weights and pages in use.
MOST = 1.5


@pytest.mark.sizes("size", full=["135M"], small=["34M"])
def test_two_models(
    compare: Compare, size: str, full: bool, device: torch.device, tmp_path: Path
) -> None:
    """A language model and a reward model of its shape; STARS on 8 requests."""
    if device.type != "cpu" or sys.platform != "linux":
        pytest.skip("for a CPU, on Linux")
    shape = SHAPES[size]
    for name, model in (("lm", language_model(shape)), ("rm", reward_model(shape))):
        model.save_pretrained(tmp_path / name)
        id_tokenizer(shape).save_pretrained(tmp_path / name)
    found: dict[str, dict[str, float]] = {}

    def run(name: str) -> None:
        found[name] = memory.in_a_process(
            tmp_path / "lm", tmp_path / "rm", loaded=name == "kept", tokens=32 if full else 16
        )

    others: dict[str, Callable[[], None]] = {}
    if full:
        others["kept"] = functools.partial(run, "kept")
    compare(functools.partial(run, ""), others, work={}, repeats=2, budget=1.0, memory=found)
    assert found[""]["ratio"] <= MOST, found
