"""What an accepted token costs by the rate at which attempts pass, against plain sampling.

The rate is that of the run: the target is a quantile of what plain samples get.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stars_fast.benchmarks.compare import Compare
from stars_fast.benchmarks.setting import Setting


@pytest.fixture(scope="module")
def setting(device: torch.device, full: bool) -> Setting:
    """The models, once for this file."""
    return Setting.of_size(device, full=full)


@pytest.mark.sizes("quantile", full=[0.05, 0.35, 0.6, 0.8, 0.95], small=[0.5])
def test_rate(compare: Compare, setting: Setting, quantile: float) -> None:
    """STARS on the prompts of the end-to-end comparison; `vanilla` draws as many tokens."""
    found = setting.engine.calibrate(setting.prompts, quantile, 2, setting.params, use_tqdm=False)
    params = replace(setting.params, target_reward=found.target_reward)
    ours = setting.run_engine(params)
    plain = setting.params.with_method("vanilla")
    assert ours.tokens == setting.run_engine(plain).tokens
    compare(
        lambda: setting.run_engine(params),
        {"vanilla": lambda: setting.run_engine(plain)},
        repeats=3,
        work={"acceptance": 100 * ours.acceptance},
        tokens=ours.tokens,
        quantile=quantile,
        drafted_per_accepted=ours.drafted / ours.tokens,
    )
