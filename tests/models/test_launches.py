"""The captured step on tensors without data: its launches, and nothing that a graph cannot hold."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_architectures import CONFIGS
from transformers import AutoModelForCausalLM, PreTrainedModel

from stars_fast.benchmarks.prediction import LAYER_LAUNCHES, STEP_LAUNCHES

pytest.importorskip("triton", reason="Triton is for Linux only")
from helpers.launches import DEVICES, captured_step

#: Launches of a decoder layer of a decode step, the most of its layers; DeepSeek's first are dense.
PER_LAYER = {
    "llama": LAYER_LAUNCHES,
    "mistral": 11,
    "qwen2": 11,
    "qwen3": 12,
    "gemma2": 11,
    "gemma3": 12,
    "phi3": 11,
    "olmo2": 12,
    "granite": 11,
    "smollm3": 11,
    "glm4": 11,
    "opt": 12,
    "gpt2": 12,
    "gpt_neox": 12,
    "gpt_oss": 14,
    "cohere2": 11,
    "mixtral": 14,
    "starcoder2": 12,
    "deepseek_v3": 16,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
def test_launches_of_a_layer(name: str, device: str) -> None:
    """Nothing waits for the device or leaves it; see `helpers.launches`."""

    def make() -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.bfloat16)

    launches = captured_step(make, device=device)
    assert max(launches.per_layer()) == PER_LAYER[name]
    if name == "llama":  # what is predicted of a GPU takes them from here
        layers = len(launches.per_layer()) + 1
        assert len(launches.names) == STEP_LAUNCHES + layers * LAYER_LAUNCHES
