"""Greedy vanilla decoding equals transformers' own on every architecture."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_architectures import CONFIGS, tiny_lm

from stars_fast import Engine, StarsParams

PROMPTS = [[5, 9, 4, 17, 30, 8, 11, 40, 22], [7], [33, 3], [12, 50, 6], [20, 21, 22], [44] * 10]
LENGTH = 16


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_greedy_vanilla_equals_generate(name: str) -> None:
    model = tiny_lm(name)
    engine = Engine(model, num_pages=100, page_size=4)
    params = StarsParams(
        method="vanilla", temperature=0.0, segment_length=5, max_tokens=LENGTH, ignore_eos=True
    )
    outputs = engine.generate(PROMPTS, params, use_tqdm=False)
    # Enough different tokens to tell a wrong context from a right one.
    assert len({token for output in outputs for token in output.outputs[0].token_ids}) > 3
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            expected = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=LENGTH,
                min_new_tokens=LENGTH,
                do_sample=False,
                eos_token_id=[],
                pad_token_id=0,
            )
        assert output.outputs[0].token_ids == expected[0, len(prompt) :].tolist()
