"""An engine on the small model with a byte-pair tokenizer, and a reward for any text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from helpers.tiny_lm import small_model
from helpers.tiny_tokenizers import bpe_tokenizer

from stars_fast import Engine, StarsParams
from stars_fast.outputs import CompletionOutput


def text_reward(prompts: list[str], responses: list[str]) -> list[float]:
    """In [-1, 1), different for nearly every text."""
    return [((len(r) * 7919 + sum(map(ord, r[-6:]))) % 100) / 50 - 1 for r in responses]


def bpe_engine(rewards: Any = text_reward, *, model: Any = None, **options: Any) -> Engine:
    settings = {"num_pages": 600, "page_size": 8, "max_rows": 64}
    return Engine(
        small_model() if model is None else model,
        rewards,
        tokenizer=bpe_tokenizer(),
        **(settings | options),
    )


def responses_of(
    engine: Engine, prompts: Sequence[str], params: StarsParams, seeds: Sequence[int]
) -> list[CompletionOutput]:
    """The first response to each prompt, with its own seed; nothing fails and no page is kept."""
    each = [dataclasses.replace(params, seed=seed) for seed in seeds]
    outputs = engine.generate(list(prompts), each, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * len(each)
    assert engine.stats()["pages_used"] == 0
    return [output.outputs[0] for output in outputs]
