"""The value model in small: its loss, that it learns, and that the engine takes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import train_value_reward
from loading import load_classifier
from position_rewards import rewards_of_rows
from prompt_sets import training_prompts
from sampling import Sample, sample_responses
from train_value_reward import ValueSettings, mean_loss, train, value_loss

from stars_fast import Engine, StarsParams, demo

TINY = ValueSettings(batch_size=8, epochs=4)
SAMPLES = [
    Sample("", "", (1, 300, 301), (302, 40)),
    Sample("", "", (1, 7), (9, 12, 13, 14, 2)),
]


@torch.no_grad()
def test_loss_is_the_squared_error_of_prompt_end_and_response() -> None:
    model, _ = load_classifier(demo.reward_model_dir())
    rows = rewards_of_rows(model, [sample.ids for sample in SAMPLES])
    finals = [0.5, -1.0]
    errors = [(value - 0.5) ** 2 for value in rows[0][2:]]
    errors += [(value + 1.0) ** 2 for value in rows[1][1:]]
    assert len(errors) == 3 + 6
    expected = sum(errors) / len(errors)
    assert value_loss(model, SAMPLES, finals).item() == pytest.approx(expected, rel=1e-4)
    ends = (rows[0][-1] - 0.5) ** 2 + (rows[1][-1] + 1.0) ** 2
    weighted = (sum(errors) + 3 * ends) / (len(errors) + 6)
    assert value_loss(model, SAMPLES, finals, 4.0).item() == pytest.approx(weighted, rel=1e-4)
    assert mean_loss(model, SAMPLES, finals) == pytest.approx(expected, rel=1e-4)


def test_training_learns_and_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, params = training_prompts()[:8], StarsParams(max_tokens=24)
    drawn = sample_responses(demo.model_dir(), prompts, 4, params=params, use_tqdm=False)
    monkeypatch.setattr(train_value_reward, "sample_responses", lambda *_, **__: drawn)
    figures = train(TINY, tmp_path / "a")  # checked on what it has seen
    assert figures["squared error after"] < 0.85 * figures["squared error before"]
    assert train(TINY, tmp_path / "b") == figures
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]

    engine = Engine.demo()
    valued = Engine(demo.model_dir(), tmp_path / "a")
    prompts, responses = ["Review of the film:"], [" The plot is superb."]
    assert valued.score(prompts, responses) != engine.score(prompts, responses)
