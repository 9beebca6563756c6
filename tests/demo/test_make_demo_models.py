"""The training script, in small: two runs write the same bytes; the shipped files fit it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from types import ModuleType

SCRIPT = Path(__file__).parents[2] / "scripts" / "training" / "make_demo_models.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_demo_models", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_demo_models"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


TINY = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 32,
    "layers": 1,
    "heads": 2,
    "kv_heads": 1,
    "tokenizer_reviews": 50,
    "lm_reviews": 32,
    "rm_reviews": 64,
    "check_reviews": 16,
    "comparisons": 2,
    "batch_size": 8,
}


def contents(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_two_runs_write_the_same_bytes(script: ModuleType, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    figures = script.make_models(script.Settings(**TINY), tmp_path / "a")
    torch.manual_seed(123)  # what happened before does not matter
    assert script.make_models(script.Settings(**TINY), tmp_path / "b") == figures
    first = contents(tmp_path / "a")
    assert first == contents(tmp_path / "b")
    assert {"lm/model.safetensors", "rm/model.safetensors"} < set(first)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()

    script.make_models(script.Settings(**TINY, seed=1), tmp_path / "c")
    other = contents(tmp_path / "c")
    assert other["lm/model.safetensors"] != first["lm/model.safetensors"]
    assert other["rm/model.safetensors"] != first["rm/model.safetensors"]


def test_report_measures_perplexity_and_correlation(script: ModuleType, tmp_path: Path) -> None:
    figures = script.make_models(script.Settings(**TINY), tmp_path)
    assert 1.0 < figures["held-out perplexity per response token"] < 1000.0
    assert -1.0 <= figures["correlation of reward and gold"] <= 1.0
    assert 0.0 <= figures["share of pairs ranked as gold ranks them"] <= 1.0
