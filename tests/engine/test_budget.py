"""``budget``: the target and the attempts that a cost allows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from helpers.letter_law import PROMPT, letter_engine

from stars_fast import Engine, StarsParams, demo
from stars_fast.errors import NotCalibratedError

BLOCKS = StarsParams(segment_length=16, beta=0.3, max_tokens=64, budget=4.0)
SMALL = StarsParams(segment_length=2, max_tokens=6, beta=0.3, top_k=0, budget=2.0, ignore_eos=True)


def test_the_cost_is_the_budget() -> None:
    """In operations on the demo's models, of other draws than those of the calibration."""
    engine = Engine(demo.model_dir(), demo.reward_model_dir(), num_pages=4000)
    prompts: list[Any] = list(demo.prompts(96))
    calibration = engine.calibrate(prompts, params=BLOCKS, samples_per_prompt=3, use_tqdm=False)
    walks, sizes = calibration.walks, engine.num_parameters()
    assert walks is not None
    plain = sum(ends[-1] for ends in walks.ends) / len(walks.ends) + walks.prompt_tokens
    each = [replace(BLOCKS, seed=i) for i in range(len(prompts))]
    found = engine.within_budget(each[0])
    assert isinstance(found.target_reward, float)
    assert (found.budget, found.candidates) == (None, 1)
    outputs = engine.generate(prompts, each, use_tqdm=False)
    assert all(output.error is None for output in outputs)
    drawn = sum(len(one.prompt_token_ids) + one.drafted_tokens for one in outputs)
    read = sum(one.rm_tokens for one in outputs)
    spent = sizes["lm"] * drawn + sizes["rm"] * read
    assert spent / (sizes["lm"] * plain * len(prompts)) == pytest.approx(4.0, rel=0.15)


def test_a_budget_is_its_target_and_attempts() -> None:
    engine = letter_engine()
    (first,) = engine.generate([PROMPT], replace(SMALL, seed=3), use_tqdm=False)  # calibrates
    found = engine.within_budget(SMALL)
    (second,) = engine.generate([PROMPT], replace(found, seed=3), use_tqdm=False)
    assert first.error is None
    assert first.outputs == second.outputs
    more = engine.within_budget(replace(SMALL, budget=3.0))
    assert isinstance(found.target_reward, float)
    assert isinstance(more.target_reward, float)
    assert more.target_reward > found.target_reward
    assert found.max_attempts == 5  # 2 (2 (2 + 6) - 2) / 6, rounded up: scoring is free
    assert more.max_attempts == 8
    mine = engine.within_budget(replace(SMALL, budget=3.0, max_attempts=9, candidates=3))
    assert (mine.max_attempts, mine.candidates) == (9, 3)
    assert isinstance(mine.target_reward, float)
    assert mine.target_reward < more.target_reward  # of three at a time some are in vain


def test_what_cannot_be_kept_to_is_refused() -> None:
    engine = letter_engine()
    with pytest.raises(NotCalibratedError, match=r"budget=2.0 needs Engine.calibrate first"):
        engine.within_budget(SMALL)
    engine.calibrate([PROMPT], params=replace(SMALL, budget=None), use_tqdm=False)
    with pytest.raises(NotCalibratedError, match="with params that have one"):
        engine.add_request("a", PROMPT, SMALL)
    engine.calibrate([PROMPT], params=replace(SMALL, alpha=1.0), use_tqdm=False)
    bad = {
        r"budget must be in \[1, 1.75\], the cost of .* of 2, got 5.0": {
            "budget": 5.0, "max_attempts": 2, "alpha": 1.0,
        },
        r"budget was calibrated with segment_length=2, got 3: call": {"segment_length": 3},
        r"budget was calibrated with method='stars', got 'cards'": {"method": "cards"},
        r"budget was calibrated for flat thresholds, got alpha=0.5": {},
    }  # fmt: skip
    for message, changes in bad.items():
        params = replace(SMALL, **changes)
        with pytest.raises(ValueError, match=message):
            engine.add_request("a", PROMPT, params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0.5}, "budget must be at least 1 or None, got 0.5"),
        ({"target_reward": 1.0}, r'target_reward must be None or "auto" with budget=2.0, got 1.0'),
        ({"attempts_schedule": "decay"}, 'attempts_schedule must be "uniform" with budget=2.0'),
        ({"calibrate_prefixes": True}, "calibrate_prefixes must be False with budget=2.0"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)
