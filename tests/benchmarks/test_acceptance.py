"""The target reward for an acceptance rate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from stars_fast import Engine, StarsParams
from stars_fast.benchmarks.acceptance import EASY_TARGET, target_for
from stars_fast.benchmarks.models import TINY, id_tokenizer, language_model, prompts, reward_model

PARAMS = StarsParams(segment_length=4, max_tokens=16, max_attempts=8, candidates=4, beta=0.2)
PROMPTS = prompts(TINY, 24, 12, 12)


@pytest.fixture(scope="module")
def engine() -> Engine:
    tokenizer = id_tokenizer(TINY)
    return Engine(
        language_model(TINY),
        reward_model(TINY),
        tokenizer=tokenizer,
        reward_tokenizer=tokenizer,
        reward_template="plain",
        num_pages=1024,
        reward_num_pages=1024,
    )


def rate_of(engine: Engine, asked: list[list[int]], params: StarsParams, target: float) -> float:
    """The rate from the segments themselves, where `target_for` takes the engine's counters."""
    each = [replace(params, target_reward=target, seed=i) for i in range(len(asked))]
    outputs = engine.generate(list(asked), each, use_tqdm=False)
    segments = [s for output in outputs for s in output.outputs[0].segments]
    return sum(s.accepted == "test" for s in segments) / sum(s.attempts for s in segments)


@pytest.mark.parametrize(
    ("rate", "changed"),
    [
        (0.3, {}),
        (0.8, {}),
        (0.5, {"acceptance": "hard"}),
        (0.6, {"candidates": "auto", "beta": 1.0}),
    ],
)
def test_rate_is_reached(engine: Engine, rate: float, changed: dict[str, Any]) -> None:
    params = replace(PARAMS, **changed)
    target = target_for(engine, PROMPTS, params, rate, tolerance=0.05)
    constant = replace(params, alpha=1.0)
    assert rate_of(engine, PROMPTS, constant, target) == pytest.approx(rate, abs=0.05)


def test_rising_threshold(engine: Engine) -> None:
    target = target_for(engine, PROMPTS, PARAMS, 0.5, alpha=0.0, tolerance=0.05)
    rising, constant = (replace(PARAMS, alpha=alpha) for alpha in (0.0, 1.0))
    assert rate_of(engine, PROMPTS, rising, target) == pytest.approx(0.5, abs=0.05)
    # It begins at r(x), which is lower, so as a constant threshold it is harder to pass.
    assert rate_of(engine, PROMPTS, constant, target) < 0.45


def test_all_accepted_takes_no_run(engine: Engine) -> None:
    rounds = engine.stats()["rounds"]
    target = target_for(engine, PROMPTS, PARAMS, 1.0)
    assert engine.stats()["rounds"] == rounds
    assert target == EASY_TARGET
    assert rate_of(engine, PROMPTS, PARAMS, target) == 1.0


def test_calibration_and_seeds_are_left_alone(engine: Engine) -> None:
    before = engine.calibration, engine._num_seeded
    target_for(engine, PROMPTS[:4], PARAMS, 0.5, tolerance=0.4)
    assert (engine.calibration, engine._num_seeded) == before


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.01, float("nan")])
def test_rates_out_of_range(engine: Engine, rate: float) -> None:
    with pytest.raises(ValueError, match=r"rate must be in \(0, 1\], got"):
        target_for(engine, PROMPTS, PARAMS, rate)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"tolerance": 0.0}, "tolerance must be above 0, got 0.0"),
        ({"max_runs": 0}, "max_runs must be at least 1, got 0"),
        ({"alpha": 2.0}, "alpha must be"),
        ({"prompts": []}, "prompts must be at least one"),
        (
            {"params": PARAMS.with_method("vanilla")},
            "method must be one with an accept test, got 'vanilla'",
        ),
    ],
)
def test_other_bad_parameters(engine: Engine, options: dict[str, Any], complaint: str) -> None:
    given: dict[str, Any] = {"prompts": PROMPTS, "params": PARAMS, **options}
    with pytest.raises(ValueError, match=complaint):
        target_for(engine, given.pop("prompts"), given.pop("params"), 0.5, **given)


def test_a_rate_between_two_steps_is_an_error(engine: Engine) -> None:
    # One prompt of four segments: rates are 4 / attempts, and 0.9 is none.
    with pytest.raises(
        RuntimeError, match=r"no target within 0.01 of rate 0.9 in 5 runs: the near"
    ):
        target_for(engine, PROMPTS[:1], PARAMS, 0.9, tolerance=0.01, max_runs=5)


def test_a_failed_request_is_named(engine: Engine) -> None:
    with pytest.raises(RuntimeError, match="a request failed: "):
        target_for(engine, [[TINY.vocab_size]], PARAMS, 0.5)
