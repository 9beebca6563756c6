"""A sequence classifier read at every token: all prefix rewards of a text in one pass.

A causal backbone sees no token to the right, so the head at position t gives what the classifier
gives for the text cut behind t.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from make_demo_models import padded
from transformers import LlamaForSequenceClassification


def position_rewards(model: LlamaForSequenceClassification, ids: torch.Tensor) -> torch.Tensor:
    """Rewards [rows, width] of right-padded token ids [rows, width]; noise at padding."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    rewards: torch.Tensor = model.score(hidden)[..., 0]
    return rewards


@torch.no_grad()
def rewards_of_rows(
    model: LlamaForSequenceClassification, rows: Sequence[list[int]], batch_size: int = 64
) -> list[list[float]]:
    """Rewards at every token of each row."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # little padding
    result: list[list[float]] = [[] for _ in rows]
    for start in range(0, len(rows), batch_size):
        group = order[start : start + batch_size]
        rewards = position_rewards(model, padded([rows[i] for i in group]))
        for i, values in zip(group, rewards.tolist(), strict=True):
            result[i] = values[: len(rows[i])]
    return result
