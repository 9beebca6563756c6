"""Rewards at every token, and of many candidates in one pass, against a classifier's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from candidate_tokens import candidate_outputs, draw_positions, likely_tokens
from loading import load_classifier, load_lm
from make_demo_models import padded, rewards_of
from position_rewards import position_rewards, rewards_of_rows
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from stars_fast import demo

ROWS = [[1, 300, 301, 302, 40], [1, 7, 9], [1, 500, 501, 502, 503, 504, 505, 2]]


@pytest.fixture(scope="module")
def classifier() -> LlamaForSequenceClassification:
    return load_classifier(demo.reward_model_dir())[0]


@pytest.fixture(scope="module")
def lm() -> LlamaForCausalLM:
    return load_lm(demo.model_dir())[0]


@torch.no_grad()
def test_each_position_is_the_reward_of_the_cut_text(
    classifier: LlamaForSequenceClassification,
) -> None:
    found = rewards_of_rows(classifier, ROWS, batch_size=2)
    together = position_rewards(classifier, padded(ROWS))
    for row, rewards, padded_rewards in zip(ROWS, found, together, strict=True):
        alone = [
            rewards_of(classifier, torch.tensor([row[: t + 1]])).item() for t in range(len(row))
        ]
        assert rewards == pytest.approx(alone, abs=1e-5)
        assert padded_rewards[: len(row)].tolist() == pytest.approx(alone, abs=1e-5)


@torch.no_grad()
def test_each_candidate_is_the_reward_of_the_text_with_it(
    classifier: LlamaForSequenceClassification,
) -> None:
    positions = torch.tensor([[4, 1, 2], [2, 2, 1], [7, 3, 7]])
    candidates = torch.arange(100, 118).view(3, 3, 2)
    outputs = candidate_outputs(classifier, padded(ROWS), positions, candidates)
    for row, at, tokens, found in zip(ROWS, positions, candidates, outputs, strict=True):
        for place, pair, values in zip(at.tolist(), tokens.tolist(), found.tolist(), strict=True):
            alone = [
                rewards_of(classifier, torch.tensor([[*row[:place], token]])).item()
                for token in pair
            ]
            assert values == pytest.approx(alone, abs=1e-5)


@torch.no_grad()
def test_likely_tokens_follow_the_text_before_the_position(lm: LlamaForCausalLM) -> None:
    positions = torch.tensor([[4, 1], [2, 1], [7, 3]])
    tokens, probabilities = likely_tokens(lm, padded(ROWS), positions, 5, temperature=0.8)
    for i, row in enumerate(ROWS):
        for j, place in enumerate(positions[i].tolist()):
            logits = lm(input_ids=torch.tensor([row[:place]])).logits[0, -1] / 0.8
            top = logits.topk(5)
            assert tokens[i, j].tolist() == top.indices.tolist()
            assert torch.allclose(probabilities[i, j], top.values.softmax(-1), atol=1e-5)


def test_positions_lie_in_the_response() -> None:
    rng = np.random.default_rng(0)
    positions = draw_positions([2, 5], [4, 6], 200, rng)
    assert set(positions[0].tolist()) == {2, 3}
    assert set(positions[1].tolist()) == {5}
