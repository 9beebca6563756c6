"""Confidence intervals."""

from __future__ import annotations

import numpy as np
import pytest

from stars_fast.eval.bootstrap import RESAMPLES, Resamples, mean_interval


def test_it_is_that_of_the_normal_approximation_for_many_values() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = mean_interval(values.tolist(), 0.95, seed=1)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)


def test_it_follows_the_level_and_the_seed() -> None:
    values = [0.0, 1.0, 1.0, 5.0, 2.0]
    low, high = mean_interval(values, 0.5, seed=0)
    wide_low, wide_high = mean_interval(values, 0.99, seed=0)
    assert wide_low < low < high < wide_high
    assert mean_interval(values, 0.5, seed=0) == (low, high)


def test_a_constant_has_no_spread() -> None:
    assert mean_interval([0.5] * 8, 0.95, seed=0) == (0.5, 0.5)


def test_it_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    intervals = [mean_interval(rng.exponential(1.0, 40).tolist(), 0.9, seed=i) for i in range(60)]
    covered = sum(low <= 1.0 <= high for low, high in intervals)
    assert 46 <= covered <= 60  # binomial(60, 0.9): below 46 with probability 0.001


@pytest.mark.parametrize(("values", "level"), [([1.0], 0.95), ([1.0, 2.0], 0.0), ([1.0, 2.0], 1.0)])
def test_bad_arguments_are_named(values: list[float], level: float) -> None:
    with pytest.raises(ValueError, match=r"^(values|level) must"):
        mean_interval(values, level, seed=0)


def test_a_small_case_by_hand() -> None:
    """Two values: the resamples' means are 0, 1/2, 1/2 and 1, each equally likely."""
    means = Resamples(2, seed=3).means(np.array([0.0, 1.0]))
    assert len(means) == RESAMPLES
    shares = [float((means == value).mean()) for value in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.02)  # 4 standard errors


def test_missing_values_are_left_out() -> None:
    values = np.array([0.0, 1.0, np.nan])
    means = Resamples(3, seed=3).means(values)
    assert len(means) == pytest.approx(RESAMPLES * (1 - 1 / 27), abs=70)  # some have nothing else
    assert means.mean() == pytest.approx(0.5, abs=0.02)


def test_means_over_the_same_units_are_paired() -> None:
    resamples = Resamples(20, seed=0)
    values = np.random.default_rng(1).normal(size=20)
    low, high = resamples.interval(values + 1.0 - values, 0.95)
    assert (low, high) == (1.0, 1.0)
    assert np.allclose(resamples.means(values + 1.0) - resamples.means(values), 1.0)
