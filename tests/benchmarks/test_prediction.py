"""The prediction that stands beside measured figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from stars_fast.benchmarks.models import LLAMA_2_7B, TINY
from stars_fast.benchmarks.paper_steps import CENTRE
from stars_fast.benchmarks.prediction import (
    CARDS,
    EXPECTED,
    PERFECT,
    beside,
    kernel_share,
    predict,
    step_milliseconds,
)

H100 = CARDS[0]


def test_the_page_has_what_is_predicted() -> None:
    """And the roofline beside it is that of the cards as they were measured."""
    found = predict(H100, CENTRE, LLAMA_2_7B, LLAMA_2_7B)
    page = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")
    table = page.split("| H100 |")[1]
    rate, share = found.accepted_tokens_per_second, found.share_of_the_least
    assert f"| accepted tokens/s | {rate:,.0f} |" in table
    assert f"| share of the roofline | {100 * share:.0f} % |" in table
    assert rate / share == pytest.approx(4292, rel=0.01)
    assert found.rows_mean == pytest.approx(131, abs=2)
    assert sum(found.phases.values()) == pytest.approx(found.seconds)


def test_work_that_reaches_more_takes_less() -> None:
    cell = CENTRE.small()
    slow = predict(H100, cell, TINY, TINY)
    assert slow.share_of_the_least < 0.1  # small kernels and the host are all there is
    fast = predict(H100, cell, TINY, TINY, PERFECT)
    assert fast.seconds < slow.seconds / 10
    assert fast.phases["host"] == 0.0


def test_without_rewards_nothing_is_scored() -> None:
    cell = CENTRE.small()
    alone, scored = (predict(H100, cell, TINY, reward) for reward in (None, TINY))
    assert alone.phases["score"] == 0.0 < scored.phases["score"]
    assert alone.rows_mean == cell.batch


def test_steps_and_kernels() -> None:
    """13.2 GB of weights and 6.9 GB of keys and values, as a 7B model's step of 131 rows reads."""
    weights, keys = 13.2e9, 6.9e9 / (2 * 2 * 32 * 4096)
    least = 1e3 * weights / (H100.bytes_per_second * EXPECTED.weights)
    least += 1e3 * 6.9e9 / (H100.bytes_per_second * EXPECTED.attention)
    small = 1e3 * (35 + 32 * 6) * EXPECTED.launch_seconds
    found = step_milliseconds(H100, LLAMA_2_7B, 131, keys)
    assert found == pytest.approx(least + small, rel=0.01)
    assert kernel_share("sample top-k", 0) is None
    assert kernel_share("decode 64 groups", 8) == EXPECTED.attention
    assert kernel_share("rms norm", 0) == EXPECTED.small


def test_measured_and_predicted_stand_side_by_side() -> None:
    predicted = predict(H100, CENTRE.small(), TINY, TINY)
    measured = {
        "accepted_tokens_per_second": 2000.0,
        "share_of_the_least": 0.5,
        "rounds": 13.0,
        "seconds": 4.0,
        "phases": [
            {"name": "draft", "seconds": 2.0}, {"name": "score", "seconds": 1.0},
            {"name": "commit", "seconds": 0.5},
        ],
    }  # fmt: skip
    rows = {row[0]: row[1:] for row in beside(measured, predicted)}
    assert rows["accepted tokens/s"][0] == "2,000"
    assert rows["host, s"] == ["1.000", f"{predicted.phases['host']:.3f}"]
    assert rows["fork, s"][0] == "0.000"
