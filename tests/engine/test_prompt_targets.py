"""Targets of single prompts: the estimates by hand, which one is chosen, and what requests get."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.tiny_lm import letter_model, letter_tokenizer

from stars_fast import Engine, StarsParams
from stars_fast.engine.prompt_targets import SampledPrompt, prompt_targets_of


def test_the_pooled_mean_by_hand() -> None:
    """Two prompts, means 1 and 5: s^2 = 2, t^2 = 8 - 1 = 7, w(2) = 7/8, w(1) = 7/9."""
    prompts = [SampledPrompt((1,), None, (0.0, 2.0)), SampledPrompt((2,), None, (4.0, 6.0))]
    found = prompt_targets_of(prompts, 0.5, "prompt")
    w = 7 / 9
    missed = [0 - 3 - w * (2 - 3), 2 - 3 - w * (0 - 3), 4 - 3 - w * (6 - 3), 6 - 3 - w * (4 - 3)]
    shift = float(np.median(missed))
    assert found.own[1,] == pytest.approx(3 - 7 / 8 * 2 + shift)
    assert found.own[2,] == pytest.approx(3 + 7 / 8 * 2 + shift)
    assert found.losses["prompt"] == pytest.approx(np.mean(np.abs(np.array(missed) - shift)) / 2)
    assert found.of([9], None) == found.pooled == 3.0  # a prompt that was not sampled
    with pytest.raises(ValueError, match="two samples of a prompt"):
        prompt_targets_of([SampledPrompt((1,), None, (0.0,))], 0.5, "prompt")
    with pytest.raises(ValueError, match="three prompts whose own rewards differ"):
        prompt_targets_of(prompts, 0.5, "relative")


@pytest.mark.parametrize(
    ("spread", "slope", "kind", "unseen"),
    [
        (0.0, 0.0, "pooled", "pooled"),  # prompts do not differ
        (3.0, 0.0, "prompt", "pooled"),  # they do, and r(x) does not tell
        (0.1, 1.0, "relative", "relative"),  # r(x) tells nearly all
    ],
)
def test_the_best_predictor_is_chosen(spread: float, slope: float, kind: str, unseen: str) -> None:
    rng = np.random.default_rng(0)
    alone = rng.normal(0, 3, 60)
    means = slope * alone + rng.normal(0, spread, 60) if spread else np.zeros(60)
    prompts = [
        SampledPrompt((i,), float(x), rng.normal(mean, 1, 4).tolist())
        for i, (x, mean) in enumerate(zip(alone, means, strict=True))
    ]
    found = prompt_targets_of(prompts, 0.75, "best")
    assert (found.kind, found.unseen) == (kind, unseen)
    # On new samples of these prompts the share below the target is the quantile.
    targets = [found.of((i,), float(x)) for i, x in enumerate(alone)]
    new = rng.normal(means[:, None], 1, (60, 500))
    assert float((new < np.array(targets)[:, None]).mean()) == pytest.approx(0.75, abs=0.06)
    if kind == "relative":
        assert found.slope == pytest.approx(1.0, abs=0.1)
        assert found.of((99,), 2.0) == pytest.approx(found.intercept + 2 * found.slope)


def grouped(prompts: list[str], responses: list[str]) -> list[float]:
    """Prompts with a "b" are worth less, whatever is answered."""
    return [
        r.count("a") / 4 - (5.0 if "b" in p else 0.0)
        for p, r in zip(prompts, responses, strict=True)
    ]


def test_fallbacks_of_mixed_prompts_fall() -> None:
    """With one target nothing that a poor prompt can have passes."""
    prompts = ["ab", "ba", "bab", "abb", "aa", "ac", "ca", "cac"]
    params = StarsParams(
        segment_length=4, max_tokens=4, acceptance="hard", alpha=1.0, max_attempts=6,
        target_reward="auto", ignore_eos=True, top_k=0,
    )  # fmt: skip

    def fallbacks(targets: Any) -> tuple[float, float]:
        engine = Engine(letter_model(), reward_model=grouped, tokenizer=letter_tokenizer(), seed=1)
        engine.calibrate(prompts, 0.5, 8, params, use_tqdm=False, targets=targets)
        outputs = engine.generate(prompts, params, use_tqdm=False)
        shares = []
        for group in (outputs[:4], outputs[4:]):
            segments = [s for output in group for s in output.outputs[0].segments]
            shares.append(sum(s.accepted == "fallback" for s in segments) / len(segments))
        assert engine.calibration is not None
        if engine.calibration.targets is not None:
            poor, good = engine.target_of("ab"), engine.target_of("aa")
            assert outputs[0].outputs[0].segments[-1].threshold == pytest.approx(poor)
            assert good - poor == pytest.approx(5.0, abs=1.0)
            # A prompt that was not sampled.
            expected = poor if targets != "prompt" else engine.calibration.target_reward
            assert engine.target_of("bb") == pytest.approx(expected, abs=1.0)
        return shares[0], shares[1]

    assert fallbacks("pooled")[0] > 0.9
    for targets in ("prompt", "relative", "best"):
        assert max(fallbacks(targets)) < 0.5
    with pytest.raises(ValueError, match="targets must be one of pooled, prompt, relative, best"):
        fallbacks("mine")
