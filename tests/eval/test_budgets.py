"""Who leads at equal cost."""

from __future__ import annotations

from typing import Any

import pytest

from stars_fast.eval.budgets import family, leaders


def spec(label: str, method: str, cost: float | None, gold: float, **others: Any) -> dict[str, Any]:
    return {
        "label": label,
        "method": method,
        "lm": None,
        "params": {},
        "cost": {"relative_flops": cost, "relative_seconds": None if cost is None else 8 / cost},
        "gold": {"mean": gold, "low": gold - 0.1, "high": gold + 0.1},
        **others,
    }


SPECS = [
    spec("vanilla", "vanilla", 1.0, 0.0),
    spec("dpo", "vanilla", 1.0, 0.9, lm="dpo"),
    spec("cheap", "stars", 2.0, 0.2),
    spec("dear", "stars", 6.0, 0.5),
    spec("best of 2", "best_of_n", 3.5, 0.3),
    spec("no cost", "smc", None, 0.99),
]
PAIRS = [
    {"a": "best of 2", "b": "cheap", "gain": {"mean": 0.1, "low": 0.05, "high": 0.2, "over": 9}},
    {"a": "best of 2", "b": "dear", "gain": {"mean": -0.2, "low": -0.3, "high": -0.1, "over": 9}},
]


def test_leaders() -> None:
    found = leaders(SPECS, PAIRS, (0.5, 1.0, 2.0, 4.0, 8.0))
    assert [(x.budget, x.best["label"]) for x in found] == [
        (1.0, "vanilla"), (2.0, "cheap"), (4.0, "best of 2"), (8.0, "dear"),
    ]  # fmt: skip
    others = [x.next_best and x.next_best["label"] for x in found]
    assert others == [None, "vanilla", "cheap", "best of 2"]
    assert found[1].gain is None  # a pair that was not compared
    assert found[2].gain == PAIRS[0]["gain"]
    assert found[3].gain == {"mean": 0.2, "low": 0.1, "high": 0.3, "over": 9}  # turned around
    by_seconds = leaders(SPECS, PAIRS, (1.0, 2.0, 4.0), cost="seconds")
    assert [(x.budget, x.best["label"]) for x in by_seconds] == [(2.0, "dear"), (4.0, "dear")]


@pytest.mark.parametrize(
    ("params", "lm", "name"),
    [
        ({}, None, "stars"),
        ({"segment_end": "clause"}, None, "stars by clause"),
        ({"acceptance": "gibbs", "segment_end": "sentence"}, "sft", "gibbs by sentence on sft"),
    ],
)
def test_families(params: dict[str, Any], lm: str | None, name: str) -> None:
    assert family(spec("x", "stars", 1.0, 0.0, params=params, lm=lm)) == name
