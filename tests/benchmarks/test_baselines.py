"""The baselines decide as the engine does: same attempts, same fallbacks, same tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stars_fast import Engine, StarsParams
from stars_fast.benchmarks.baseline_continuous import ContinuousBaseline
from stars_fast.benchmarks.baseline_lockstep import LockstepBaseline, PaddedText
from stars_fast.benchmarks.baselines import Baseline, BaselineOutput, BestAttempt
from stars_fast.benchmarks.models import (
    TINY,
    id_tokenizer,
    language_model,
    prompts,
    reward_model,
)
from stars_fast.benchmarks.setting import Tally

MODEL, REWARDS = language_model(TINY), reward_model(TINY)
PROMPTS = prompts(TINY, 5)
SEEDS = list(range(100, 105))
#: Hard to pass, so that segments fall back; the last one is shorter.
PARAMS = StarsParams(
    segment_length=8, max_tokens=20, beta=0.3, max_attempts=4, target_reward=2.2, top_k=40
)


@pytest.fixture(scope="module")
def engine_outputs() -> list[BaselineOutput]:
    tokenizer = id_tokenizer(TINY)
    engine = Engine(
        MODEL,
        REWARDS,
        tokenizer=tokenizer,
        reward_tokenizer=tokenizer,
        reward_template="plain",
        max_rows=16,
        num_pages=256,
    )
    each = [replace(PARAMS, seed=seed) for seed in SEEDS]
    found = []
    for output in engine.generate(PROMPTS, each, use_tqdm=False):
        response = output.outputs[0]
        attempts = sum(s.attempts for s in response.segments)
        fallbacks = sum(s.accepted == "fallback" for s in response.segments)
        found.append(BaselineOutput(response.token_ids, attempts, fallbacks))
    assert sum(o.fallbacks for o in found) >= 3
    assert any(o.attempts < 12 for o in found)  # some pass
    return found


@pytest.mark.parametrize("cached", [False, True])
def test_one_by_one(engine_outputs: list[BaselineOutput], cached: bool) -> None:
    loop = Baseline(MODEL, REWARDS, PARAMS, cached=cached)
    assert [loop.run(p, s) for p, s in zip(PROMPTS, SEEDS, strict=True)] == engine_outputs


def test_lockstep(engine_outputs: list[BaselineOutput]) -> None:
    assert LockstepBaseline(MODEL, REWARDS, PARAMS).run(PROMPTS, SEEDS) == engine_outputs


@pytest.mark.parametrize("candidates", [1, 3])
def test_continuous(engine_outputs: list[BaselineOutput], candidates: int) -> None:
    attention = MODEL.config._attn_implementation
    torch.manual_seed(0)
    loop = ContinuousBaseline(MODEL, REWARDS, PARAMS, candidates=candidates, num_blocks=64)
    found = loop.run(PROMPTS * 4, list(range(20)))
    assert [len(o.token_ids) for o in found] == [20] * 20
    assert MODEL.config._attn_implementation == attention
    both = [
        Tally([o.token_ids for o in side], sum(o.attempts for o in side), 3 * len(side),
              sum(o.fallbacks for o in side))
        for side in (found, engine_outputs)
    ]  # fmt: skip
    assert both[0].same_acceptance(both[1])


def test_continuous_always_passes_or_never() -> None:
    for target, attempts, fallbacks in ((-1e6, 3, 0), (1e6, 12, 3)):
        params = replace(PARAMS, target_reward=target, alpha=1.0, acceptance="hard")
        loop = ContinuousBaseline(MODEL, REWARDS, params, candidates=3, num_blocks=64)
        (output,) = loop.run(PROMPTS[:1], SEEDS[:1])
        assert (output.attempts, output.fallbacks) == (attempts, fallbacks)


def test_padded_text_scores_as_alone() -> None:
    text = PaddedText.of(PROMPTS, MODEL.device)
    with torch.inference_mode():
        together = text.rewards(REWARDS, [0, 3])
        alone = [float(REWARDS(torch.tensor([PROMPTS[i]])).logits[0, 0]) for i in (0, 3)]
    assert together == pytest.approx(alone, abs=1e-4)


def test_best_attempt() -> None:
    best = BestAttempt()
    for tokens, reward, passed in (([1], -2.0, False), ([2], -1.0, False), ([3], -1.0, False)):
        best.offer(tokens, reward, passed=passed)
    assert (best.token_ids, best.passed) == ((2,), False)  # the first of equals
    best.offer([4], -9.0, passed=True)
    assert (best.token_ids, best.reward, best.passed) == ((4,), -9.0, True)


def test_rates_that_differ_by_more_than_chance() -> None:
    half = Tally([], attempts=200, segments=100, fallbacks=0)
    assert half.same_acceptance(Tally([], attempts=180, segments=100, fallbacks=0))
    assert not half.same_acceptance(Tally([], attempts=130, segments=100, fallbacks=0))
