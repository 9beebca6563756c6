"""`Engine.calibrate`: plain samples, their quantiles, and what prefixes predict."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from helpers.bpe_engine import bpe_engine
from helpers.tiny_rewards import reward_model
from helpers.tiny_tokenizers import bpe_tokenizer

from stars_fast import Engine, StarsParams
from stars_fast.engine.calibration import prefix_calibration_of
from stars_fast.outputs import CompletionOutput, PrefixCalibration, Segment

PROMPTS = ["The film was slow at first, but", "A terrible kettle", "Not bad at all. " * 4]
SAMPLES = 6
PARAMS = StarsParams(
    segment_length=8,
    max_tokens=20,
    max_attempts=3,
    temperature=1.0,
    top_k=30,
    beta=0.5,
    stop_token_ids=[i for i in range(20, 400) if i % 31 == 0],
)


def letters_alike(prompts: list[str], responses: list[str]) -> list[float]:
    """Above and below 0, which means nothing to calibration."""
    pairs = zip(prompts, responses, strict=True)
    return [(sum(map(ord, r)) % 97) / 20 + len(p) / 50 - 2.5 for p, r in pairs]


def engine(rewards: Any = letters_alike, **options: Any) -> Engine:
    return bpe_engine(rewards, **options)


@pytest.fixture(scope="module")
def calibrated() -> Engine:
    one = engine(seed=7)
    one.calibrate(PROMPTS, samples_per_prompt=SAMPLES, params=PARAMS, use_tqdm=False)
    return one


def samples_of(one: Engine, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Any]:
    """The requests that `calibrate` makes, with their outputs."""
    seen: list[Any] = []
    generate = one.generate

    def spy(prompts: Any, params: Any, **rest: Any) -> Any:
        outputs = generate(prompts, params, **rest)
        seen.extend(zip(params, outputs, strict=True))
        return outputs

    monkeypatch.setattr(one, "generate", spy)
    one.calibrate(PROMPTS, samples_per_prompt=SAMPLES, use_tqdm=False, **options)
    return list(seen)


@pytest.mark.parametrize(
    "params",
    [
        PARAMS,
        PARAMS.with_method("stars", acceptance="gibbs"),
        PARAMS.with_method("cards", rules="public", calibrate_prefixes=True),
        PARAMS.with_method("smc", ess_threshold=1.0),
        PARAMS.with_method("best_of_n", candidates=3),
    ],
    ids=lambda params: f"{params.method}-{params.acceptance}",
)
def test_samples_are_plain_ones(params: StarsParams, monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine(seed=7)
    seen = samples_of(one, monkeypatch, params=params)
    calibration = one.calibration
    assert calibration is not None
    plain = [p.with_method("vanilla") for p, _ in seen]
    assert {p.n for p in plain} == {SAMPLES}
    outputs = one.generate(PROMPTS, plain, use_tqdm=False)
    drawn = [[o.token_ids for o in output.outputs] for _, output in seen]
    assert drawn == [[o.token_ids for o in output.outputs] for output in outputs]
    rewards = iter(calibration.rewards)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        for response in output.outputs:
            reward = next(rewards)
            assert [reward] == pytest.approx(letters_alike([prompt], [response.text]))
            assert [reward] == pytest.approx(one.score(prompt, [response.text]))
    assert next(rewards, None) is None
    assert calibration.target_reward == pytest.approx(np.quantile(calibration.rewards, 0.9))


def test_prefixes_are_fitted_by_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine(seed=7)
    outputs = [
        o for _, output in samples_of(one, monkeypatch, params=PARAMS) for o in output.outputs
    ]
    assert one.calibration is not None
    prefixes = one.calibration.prefixes
    assert prefixes is not None
    assert prefixes.positions == (8, 16)
    for at, position in enumerate(prefixes.positions):
        longer = [o for o in outputs if len(o.token_ids) > position]
        pairs = [(o.segments[at].reward, o.reward) for o in longer]
        assert len(pairs) == prefixes.samples[at] >= 8
        x, y = np.array(pairs, np.float64).T
        slope, intercept = np.polyfit(x, y, 1)
        assert prefixes.slope[at] == pytest.approx(slope)
        assert prefixes.intercept[at] == pytest.approx(intercept)
        assert prefixes.correlation[at] == pytest.approx(np.corrcoef(x, y)[0, 1])


def sample(*rewards: float, length: int = 4) -> CompletionOutput:
    segments = [
        Segment(i * length, (i + 1) * length, reward, None, 1, "test")
        for i, reward in enumerate(rewards)
    ]
    return CompletionOutput(0, segments=segments)


def test_few_samples_and_equal_rewards_fit_no_line() -> None:
    few = prefix_calibration_of([sample(float(i), 2.0 * i) for i in range(7)])
    assert few == PrefixCalibration((4,), (0.0,), (6.0,), (0.0,), (7,))
    enough = prefix_calibration_of([sample(float(i), 2.0 * i) for i in range(8)])
    assert enough is not None
    assert (*enough.slope, *enough.correlation) == pytest.approx((2.0, 1.0))
    assert enough.intercept == pytest.approx((0.0,), abs=1e-12)
    alike = prefix_calibration_of([sample(1.0, float(i)) for i in range(9)])
    assert alike == PrefixCalibration((4,), (0.0,), (4.0,), (0.0,), (9,))
    assert prefix_calibration_of([sample(1.0), sample(2.0)]) is None
    assert prefix_calibration_of([]) is None


def test_lines_are_interpolated_between_positions() -> None:
    prefixes = PrefixCalibration((8, 16), (1.0, 3.0), (0.5, -0.5), (0.9, 0.9), (20, 20))
    assert prefixes.predict(2.0, 8) == 2.5
    assert prefixes.predict(2.0, 16) == 5.5
    assert prefixes.predict(2.0, 12) == 4.0  # slope 2, intercept 0
    assert prefixes.predict(2.0, 10) == 0.25 + 1.5 * 2.0
    assert prefixes.predict(2.0, 1) == 2.5
    assert prefixes.predict(2.0, 99) == 5.5


@pytest.mark.parametrize(
    "params",
    [
        dataclasses.replace(PARAMS, max_attempts=1),
        PARAMS.with_method("smc", candidates=1),
        PARAMS.with_method("speculative_rejection", candidates=1),
        PARAMS.with_method("stars", acceptance="gibbs", candidates=1),
    ],
    ids=lambda params: f"{params.method}-{params.acceptance}",
)
def test_changes_the_rewards_of_unfinished_responses_only(
    calibrated: Engine, params: StarsParams
) -> None:
    """One attempt of each segment or one path, so that the tokens are the same."""
    assert calibrated.calibration is not None
    prefixes = calibrated.calibration.prefixes
    assert prefixes is not None
    finishes = set()
    raw, shown = (
        calibrated.generate(
            PROMPTS * 3,
            [dataclasses.replace(params, seed=i, calibrate_prefixes=on) for i in range(9)],
            use_tqdm=False,
        )
        for on in (False, True)
    )
    for before, after in zip(raw, shown, strict=True):
        plain, response = before.outputs[0], after.outputs[0]
        assert response.token_ids == plain.token_ids
        finishes.add(response.finish_reason)
        for unfinished, other in zip(plain.segments[:-1], response.segments[:-1], strict=True):
            assert unfinished.reward is not None
            assert other.reward == pytest.approx(prefixes.predict(unfinished.reward, other.end))
            assert other.reward != unfinished.reward
        assert response.segments[-1].reward == plain.segments[-1].reward
        assert response.reward == plain.reward
    assert finishes == {"stop", "length"}


def test_decides_by_the_calibrated_rewards(calibrated: Engine) -> None:
    """The test at a prefix compares what it predicts with the threshold."""
    assert calibrated.calibration is not None
    target = calibrated.calibration.quantiles[0.5]
    params = dataclasses.replace(PARAMS, acceptance="hard", alpha=1.0, seed=3, trace=True)
    on = dataclasses.replace(params, calibrate_prefixes=True, target_reward=target, n=12)
    (output,) = calibrated.generate(PROMPTS[0], on, use_tqdm=False)
    segments = [s for o in output.outputs for s in o.segments]
    assert {s.accepted for s in segments} == {"test", "fallback"}
    for segment in segments:
        assert segment.reward is not None
        assert (segment.accepted == "test") == (segment.reward >= target)
        assert all(attempt.reward < target for attempt in segment.rejected)
    off = dataclasses.replace(on, calibrate_prefixes=False)
    (other,) = calibrated.generate(PROMPTS[0], off, use_tqdm=False)
    assert [o.token_ids for o in output.outputs] != [o.token_ids for o in other.outputs]


def test_with_a_model_that_scores_incrementally() -> None:
    tokenizer = bpe_tokenizer()
    one = engine(
        reward_model("llama", tokenizer), reward_template="plain", reward_tokenizer=tokenizer
    )
    calibration = one.calibrate(PROMPTS, samples_per_prompt=4, params=PARAMS, use_tqdm=False)
    assert calibration.prefixes is not None
    assert all(-1 <= c <= 1 for c in calibration.prefixes.correlation)
    stats = one.stats()
    assert stats["pages_used"] == stats["rm_pages_used"] == 0


def test_needs_calibration_first() -> None:
    params = dataclasses.replace(PARAMS, calibrate_prefixes=True, target_reward=1.0)
    one = engine()
    with pytest.raises(ValueError, match=r"calibrate_prefixes=True needs Engine\.calibrate"):
        one.add_request("a", PROMPTS[0], params)
    # On responses of one segment nothing is learned of prefixes.
    short = dataclasses.replace(PARAMS, max_tokens=8)
    assert one.calibrate(PROMPTS[0], params=short, use_tqdm=False).prefixes is None
    with pytest.raises(ValueError, match="of more than one segment"):
        one.add_request("a", PROMPTS[0], params)
    assert not one.has_unfinished()
