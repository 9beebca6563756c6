"""The prediction that stands beside measured figures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stars_fast.benchmarks.least import Machine
from stars_fast.benchmarks.models import LLAMA_2_7B, TINY
from stars_fast.benchmarks.paper_steps import CENTRE
from stars_fast.benchmarks.prediction import EXPECTED, Efficiency, beside, predict

H100 = Machine("H100", 3.0e12, 798e12)


def test_one_buffer_of_keys_and_values_gives_the_share_first_predicted() -> None:
    found = predict(H100, CENTRE, LLAMA_2_7B, LLAMA_2_7B, replace(EXPECTED, attention=0.55))
    assert found.accepted_tokens_per_second == pytest.approx(2234, rel=0.01)
    assert found.share_of_the_least == pytest.approx(0.52, abs=0.01)
    assert found.rows_mean == pytest.approx(131, abs=2)
    assert sum(found.phases.values()) == pytest.approx(found.seconds)


def test_work_that_reaches_more_takes_less() -> None:
    cell = CENTRE.small()
    slow = predict(H100, cell, TINY, TINY)
    assert slow.share_of_the_least < 0.1  # small kernels and the host are all there is
    free = Efficiency(1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
    fast = predict(H100, cell, TINY, TINY, free)
    assert fast.seconds < slow.seconds / 10
    assert fast.phases["host"] == 0.0


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
