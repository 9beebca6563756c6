"""The acceptor in small: labels by hand, that it learns, and that the engine takes it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import train_acceptor
from loading import load_classifier, load_lm
from sampling import Sample
from train_acceptor import (
    AcceptorSettings,
    Comparison,
    accept_loss,
    average_labels,
    compare,
    figures,
    ranked_labels,
    train,
)

from stars_fast import Engine, demo

TINY = AcceptorSettings(
    prompts=8, samples_per_prompt=4, max_tokens=24, batch_size=8, positions=3, alternatives=4
)


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def test_average_labels_by_hand() -> None:
    values = torch.tensor([[1.0, 0.0, -2.0], [0.3, 0.3, 0.3]])
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]])
    # The mean of the first position is 0.5 * 1 + 0.25 * 0 - 0.25 * 2 = 0.
    expected = [[sigmoid(2.0), 0.5, sigmoid(-4.0)], [0.5, 0.5, 0.5]]
    labels, weights = average_labels(values, probabilities, 0.5)
    assert torch.allclose(labels, torch.tensor(expected))
    assert weights is probabilities


def test_ranked_labels_by_hand() -> None:
    # q is in proportion 0.5 : 0.3 e^2 : 0.2, with e^2 set to 3 by the scale.
    values = torch.tensor([[0.0, 1.0, 0.0], [0.4, 0.4, 0.4]])
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
    labels, weights = ranked_labels(values, probabilities, 1.0 / math.log(3.0))
    assert torch.allclose(labels[0], torch.tensor([0.5 / 1.6, 0.9 / 1.1, 1.0]))
    assert torch.allclose(weights[0], torch.tensor([1.0, 1.1 / 1.6, 0.2 / 1.6]))
    assert labels[1].tolist() == [1.0, 0.0, 0.0]  # no alternative: always taken
    assert weights[1].tolist() == [1.0, 0.0, 0.0]


def test_trying_in_turn_draws_from_the_tilted_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 6, generator=generator)
    probabilities = torch.rand(5, 6, generator=generator).softmax(-1)
    labels, _ = ranked_labels(values, probabilities, 0.7)
    rejected = torch.cat((torch.ones(5, 1), (1 - labels[:, :-1]).cumprod(-1)), dim=1)
    tilted = probabilities * (values / 0.7).exp()
    assert torch.allclose(rejected * labels, tilted / tilted.sum(-1, keepdim=True), atol=1e-6)


@torch.no_grad()
def test_a_comparison_holds_what_the_models_say() -> None:
    lm, _ = load_lm(demo.model_dir())
    value, _ = load_classifier(demo.reward_model_dir())
    samples = [Sample("", "", (1, 300, 301), (302,)), Sample("", "", (1, 7), (9,))]
    settings = replace(TINY, labels="average")
    data = compare(lm, value, samples, settings, np.random.default_rng(0))
    assert data.positions.tolist() == [[3] * 3, [2] * 3]
    for sample, tokens, probabilities, labels in zip(
        samples, data.tokens, data.weights, data.labels, strict=True
    ):
        rows = [[*sample.prompt_ids, token] for token in tokens[0].tolist()]
        values = value(input_ids=torch.tensor(rows)).logits[:, 0]
        expected = average_labels(values, probabilities[0], TINY.scale)[0]
        assert torch.allclose(labels[0], expected, atol=1e-4)


@torch.no_grad()
def test_loss_is_a_weighted_mean() -> None:
    model, _ = load_classifier(demo.reward_model_dir())
    torch.nn.init.zeros_(model.score.weight)
    data = Comparison(
        ids=torch.tensor([[1, 5, 6]]),
        positions=torch.tensor([[2]]),
        tokens=torch.tensor([[[6, 7]]]),
        labels=torch.tensor([[[0.9, 0.2]]]),
        weights=torch.tensor([[[0.75, 0.25]]]),
    )
    assert accept_loss(model, data).item() == pytest.approx(math.log(2.0))
    found = figures(model, [data])
    assert found["loss"] == pytest.approx(math.log(2.0))
    entropies = [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in (0.9, 0.2)]
    assert found["least loss"] == pytest.approx(0.75 * entropies[0] + 0.25 * entropies[1], rel=1e-4)


def test_training_learns_and_the_engine_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_acceptor, "tuning_prompts", lambda: ["Review of the film:"] * 4)
    found = train(TINY, tmp_path / "acceptor")
    assert found["least loss"] < found["loss"] < math.log(2.0)
    with pytest.raises(ValueError, match="labels must be one of average, ranked, got 'best'"):
        train(replace(TINY, labels="best"), tmp_path / "other")
    engine = Engine(demo.model_dir(), tmp_path / "acceptor")
    (logit,) = engine.score(["Review of the film:"], [" The"])
    assert math.isfinite(logit)
