"""Settings that belong together, and the best method at equal cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Spec = Mapping[str, Any]

#: Cost of a response, relative to the reference.
BUDGETS = (1.0, 2.0, 4.0, 8.0, 16.0)

#: Costs of a response by which methods are compared, and how users read them.
COSTS = {"flops": "FLOPs", "seconds": "seconds"}


@dataclass(frozen=True)
class Leader:
    """The spec with the highest gold score within a budget.

    Attributes
    ----------
    budget
        Cost relative to the reference.
    best
        The spec with the highest mean gold score among those within the budget.
    next_best
        The best spec of any other method within it; None if there is none.
    gain
        Mean difference of gold between the two with its interval, as in the record's pairs.
    """

    budget: float
    best: Spec
    next_best: Spec | None
    gain: Mapping[str, Any] | None


def family(spec: Spec) -> str:
    """Return what a spec is a setting of: method, how it chooses, segment ends, models."""
    params = spec["params"]
    ends = params.get("segment_end", "length")
    parts = [
        "gibbs" if params.get("acceptance") == "gibbs" else str(spec["method"]),
        f"by {ends}" if ends != "length" else "",
        f"on {spec['lm']}" if spec["lm"] else "",
    ]
    return " ".join(filter(None, parts))


def leaders(
    specs: Sequence[Spec],
    pairwise: Sequence[Mapping[str, Any]],
    budgets: Sequence[float] = BUDGETS,
    cost: str = "flops",
) -> list[Leader]:
    """Return the leader at each budget that something keeps to, specs of the base model alone.

    `cost` is one of `COSTS`.
    """
    gains: dict[tuple[str, str], Mapping[str, Any]] = {}
    for pair in pairwise:
        gains[pair["a"], pair["b"]] = pair["gain"]
        gains[pair["b"], pair["a"]] = _turned_around(pair["gain"])
    found = []
    for budget in budgets:
        within = [
            spec
            for spec in specs
            if not spec["lm"]
            and spec["gold"] is not None
            and spec["gold"]["mean"] is not None
            and (spec["cost"][f"relative_{cost}"] or float("inf")) <= budget
        ]
        if not within:
            continue
        best = max(within, key=lambda spec: spec["gold"]["mean"])
        others = [spec for spec in within if spec["method"] != best["method"]]
        next_best = max(others, key=lambda spec: spec["gold"]["mean"], default=None)
        gain = None if next_best is None else gains.get((best["label"], next_best["label"]))
        found.append(Leader(budget, best, next_best, gain))
    return found


def _turned_around(gain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the gain of the other side; an interval that is not known stays so."""

    def minus(value: float | None) -> float | None:
        return None if value is None else -value

    return {
        **gain,
        "mean": minus(gain["mean"]),
        "low": minus(gain["high"]),
        "high": minus(gain["low"]),
    }
