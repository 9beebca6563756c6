"""Numbers of responses, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stars_fast.eval.cost import cost_of
from stars_fast.eval.metrics import Intervals, compare, distinct, pareto, perplexity

NAN = math.nan


def test_prompts_count_alike_whatever_their_seeds() -> None:
    """Mean over prompts of the mean over seeds: (mean(1, 3) + 5) / 2."""
    found = Intervals(3).of(np.array([[1.0, 3.0], [5.0, NAN], [NAN, NAN]]))
    assert found is not None
    assert (found.mean, found.over) == (3.5, 3)
    assert found.low == 2.0
    assert found.high == 5.0


def test_seeds_of_a_prompt_are_resampled_together() -> None:
    """200 prompts with 50 equal seeds each: as uncertain as 200 values, not as 10,000."""
    values = np.random.default_rng(0).normal(size=200)
    once = Intervals(200).of(values[:, None])
    often = Intervals(200).of(np.repeat(values[:, None], 50, axis=1))
    assert once is not None
    assert often is not None
    assert often.low == pytest.approx(once.low)
    assert often.high == pytest.approx(once.high)


def test_no_values_and_one_prompt() -> None:
    assert Intervals(2).of(np.full((2, 1), NAN)) is None
    found = Intervals(1).of(np.array([[2.0]]))
    assert found is not None
    assert (found.mean, found.low, found.high) == (2.0, None, None)


def test_wins_ties_and_losses() -> None:
    ours = np.array([[1.0, 2.0], [0.5, NAN], [3.0, 0.0], [1.0, 1.0]])
    theirs = np.array([[0.0, 2.0], [0.6, 1.0], [NAN, NAN], [0.5, 0.5]])
    found = compare(ours, theirs, 0.05, Intervals(4))
    assert found is not None
    # Per prompt: one win, one tie; one loss; nothing; two wins.
    assert found.win == pytest.approx((0.5 + 0.0 + 1.0) / 3)
    assert found.loss == pytest.approx(1 / 3)
    assert found.tie == pytest.approx(0.5 / 3)
    assert found.win_rate.mean == pytest.approx((0.75 + 0.0 + 1.0) / 3)
    assert found.gain.mean == pytest.approx((0.5 - 0.1 + 0.5) / 3)
    assert found.win_rate.over == 5
    wide = compare(ours, theirs, 0.2, Intervals(4))
    assert wide is not None
    assert wide.loss == 0.0
    assert compare(ours, np.full_like(ours, NAN), 0.0, Intervals(4)) is None


def test_paired_differences_are_sharper_than_their_sides() -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(0.0, 5.0, (100, 1))
    found = compare(base + 0.1 + rng.normal(0, 0.01, (100, 1)), base, 1e-9, Intervals(100))
    assert found is not None
    assert found.gain.low is not None
    assert found.gain.high is not None
    assert 0.09 < found.gain.low < found.gain.high < 0.11
    assert found.win == 1.0


def test_distinct_n() -> None:
    assert distinct([[1, 1, 2], [1, 2]], 1) == pytest.approx(2 / 5)
    assert distinct([[1, 1, 2], [1, 2]], 2) == pytest.approx(2 / 3)  # 11, 12, 12
    assert distinct([[1], []], 2) is None


def test_perplexity() -> None:
    rows = [
        {"base_logprob": math.log(0.5) * 3, "base_tokens": 3},
        {"base_logprob": math.log(0.25), "base_tokens": 1},
        {"base_logprob": None, "base_tokens": 4},
        {"base_logprob": 0.0, "base_tokens": 0},
    ]
    assert perplexity(rows) == pytest.approx(math.exp(5 * math.log(2) / 4))
    assert perplexity(rows[2:]) is None


def test_pareto_front() -> None:
    points = [(1.0, 0.0), (2.0, 1.0), (2.0, 0.5), (3.0, 1.0), (4.0, 2.0), (4.0, 2.0), (0.5, -1.0)]
    assert pareto(points) == [True, True, False, False, True, True, True]


def test_cost_of_a_run() -> None:
    before = {"drafted_tokens": 10, "accepted_tokens": 10, "prefill_tokens": 5, "rm_tokens": 7}
    after = {
        "drafted_tokens": 110, "accepted_tokens": 70, "prefill_tokens": 8, "rm_tokens": 107,
        "attempts": 30, "segments": 20, "lm_calls": 4.0, "row_steps": 125, "seconds_draft": 3.0,
    }  # fmt: skip
    cost = cost_of(
        before, after, prompt_tokens=50, parameters={"lm": 3, "rm": 2}, seconds=1.5
    )  # fmt: skip
    # 3 tokens were prefilled, the others of the prompts were in the cache of an earlier run.
    assert cost.lm_tokens == 100 + 50
    assert cost.flops == 2 * (3 * 150 + 2 * 100)
    assert cost.discarded_per_rejection == 4.0
    assert cost.unused_share == pytest.approx(0.2)
    assert (cost.lm_calls, cost.rm_calls, cost.seconds) == (4, 0, 1.5)
    again = cost_of(
        before, {**after, "prefill_tokens": 85}, prompt_tokens=50, parameters={"lm": 3, "rm": 2},
        seconds=1.5,
    )  # fmt: skip
    assert again.lm_tokens == 100 + 80  # a preempted request was prefilled twice
