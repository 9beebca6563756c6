"""Best-of-n that stops once another sample is not worth its cost."""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist
from typing import Any

import pytest
from helpers.letter_law import PROMPT, letter_engine, reward_of

from stars_fast import StarsParams
from stars_fast.methods.stopping import expected_gain, more_samples

MOST = 12
PARAMS = StarsParams("best_of_n", candidates=MOST, max_tokens=4, temperature=1.0, top_k=0)


def test_the_gain_is_that_of_a_normal_sample() -> None:
    rewards = [0.2, -1.0, 0.7, 1.1, -0.4]
    spread = NormalDist.from_samples(rewards).stdev * (1 + 1 / 5) ** 0.5
    samples = NormalDist(sum(rewards) / 5, spread).samples(200_000, seed=1)
    found = sum(max(sample - 1.1, 0.0) for sample in samples) / 200_000
    assert expected_gain(rewards) == pytest.approx(found, abs=0.003)
    assert expected_gain([1.0] * 4) == 0.0
    assert [more_samples([0.0] * n, 9, 0.0) for n in (0, 4, 9)] == [9, 5, 0]
    assert [more_samples(range(n), 9, 1e-9) for n in (0, 4, 5, 7, 9)] == [4, 1, 2, 2, 0]


@pytest.mark.parametrize("n", [1, 2])
def test_it_is_the_best_of_the_first_samples(n: int) -> None:
    engine = letter_engine()
    seeds = range(12)

    def run(params: StarsParams) -> list[Any]:
        each = [replace(params, seed=seed) for seed in seeds]
        outputs = engine.generate([PROMPT] * len(each), each, use_tqdm=False)
        assert all(output.error is None for output in outputs)
        return outputs

    plain = PARAMS.with_method("vanilla", n=n * MOST)
    whole = run(replace(PARAMS, n=n))
    stopped = run(replace(PARAMS, n=n, sample_cost=0.1))
    numbers = set()
    for samples, all_of_them, some in zip(run(plain), whole, stopped, strict=True):
        drafted = 0
        for group in range(n):
            drawn = samples.outputs[group * MOST : (group + 1) * MOST]
            rewards = [reward_of(one.text) for one in drawn]
            count = 0
            while more := more_samples(rewards[:count], MOST, 0.1):
                count += more
            numbers.add(count)
            drafted += sum(len(one.token_ids) for one in drawn[:count])
            best = max(range(count), key=rewards.__getitem__)
            assert some.outputs[group].token_ids == drawn[best].token_ids
            best = max(range(MOST), key=rewards.__getitem__)
            assert all_of_them.outputs[group].token_ids == drawn[best].token_ids
        assert some.drafted_tokens == drafted
    assert len(numbers) > 2
    assert min(numbers) == 4
