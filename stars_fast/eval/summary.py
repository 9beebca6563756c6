"""From the records of responses and runs to what is reported of each spec."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean, median
from typing import Any

import numpy as np

from stars_fast.eval.attacks import under
from stars_fast.eval.budgets import COSTS
from stars_fast.eval.cost import Cost, total
from stars_fast.eval.metrics import (
    Comparison,
    Grid,
    Interval,
    Intervals,
    compare,
    distinct,
    pareto,
    perplexity,
)
from stars_fast.eval.store import Record, Store

_NGRAMS = (1, 2, 3)


@dataclass(frozen=True)
class Runs:
    """The runs of a spec that are there, by seed.

    Attributes
    ----------
    described
        The spec, as the record has it.
    costs, responses
        Costs and responses of each run, its parts together.
    """

    described: Mapping[str, Any]
    costs: Mapping[int, Cost]
    responses: Mapping[int, Sequence[Record]]

    @property
    def rows(self) -> list[Record]:
        """The responses of all seeds that were not refused or broken off."""
        return [row for rows in self.responses.values() for row in rows if row["error"] is None]

    def grid(self, column: str, numbers: Sequence[int], seeds: Sequence[int]) -> Grid:
        """Return a column of the responses, NaN where there is no value."""
        place = {number: i for i, number in enumerate(numbers)}
        grid = np.full((len(numbers), len(seeds)), np.nan)
        for j, seed in enumerate(seeds):
            for row in self.responses.get(seed, []):
                value = _value(row, column)
                if row["error"] is None and value is not None:
                    grid[place[row["number"]], j] = value
        return grid


def runs_of(settings: Mapping[str, Any], store: Store) -> list[Runs]:
    """Gather the runs of each spec that `settings` names, those that are finished."""
    known = {field.name for field in fields(Cost)}
    found = []
    for spec in settings["specs"]:
        parts: dict[int, list[str]] = {}
        for seed, given in spec["runs"].items():
            wanted = [given] if isinstance(given, str) else given  # one run, in older records
            names = [name for name in wanted if name in store.runs]
            if names:
                parts[int(seed)] = names
        costs = {
            seed: total(
                [
                    Cost(**{k: v for k, v in store.runs[name]["cost"].items() if k in known})
                    for name in names
                ]
            )
            for seed, names in parts.items()
        }
        rows = {
            seed: [
                _current(row, settings["measured_by"])
                for name in names
                for row in store.responses[name]
            ]
            for seed, names in parts.items()
        }
        found.append(Runs(spec, costs, rows))
    return found


def _current(row: Record, measured_by: Mapping[str, str]) -> Record:
    """Leave out what was measured by another reward, judge or base than this eval's."""
    measured = [name.removesuffix("_by") for name in row if name.endswith("_by")]
    stale = [column for column in measured if row[f"{column}_by"] != measured_by.get(column)]
    gone = {name for column in stale for name in (column, f"{column}_error", f"{column}_by")}
    kept = {name: value for name, value in row.items() if name not in gone}
    if "base_logprob" in stale:
        kept |= {"base_logprob": None, "base_tokens": None}
    return kept


def summarise(settings: Mapping[str, Any], store: Store) -> dict[str, Any]:
    """Return what is reported: ``specs``, ``pairwise``, and more where there is, JSON values.

    With further gold rewards ``other_pairwise``, by their names, and with attacks ``attacks``.

    Parameters
    ----------
    settings
        The eval's: ``specs`` with their ``runs``, ``reference``, ``seeds``, ``numbers`` of the
        prompts, ``tie_margin``, ``bootstrap_seed``, and ``measured_by``: which of the values of a
        column are this eval's; ``other_golds``, columns by name; with ``attacks`` and their
        ``runs`` also ``harm_below``.
    store
        The results.
    """
    numbers, seeds = settings["numbers"], settings["seeds"]
    intervals = Intervals(len(numbers), settings["bootstrap_seed"])
    all_runs = runs_of(settings, store)
    at = [spec["label"] for spec in settings["specs"]].index(settings["reference"])
    specs = [_spec(runs, settings, intervals) for runs in all_runs]

    def compared(column: str) -> tuple[list[dict[str, Any] | None], list[dict[str, Any]]]:
        """Return each spec against the reference, and each against each, by a gold score."""
        golds = [runs.grid(column, numbers, seeds) for runs in all_runs]

        def against(i: int, j: int) -> Comparison | None:
            return compare(golds[i], golds[j], settings["tie_margin"], intervals)

        references = [against(i, at) if i != at else None for i in range(len(golds))]
        pairs = [
            {"a": spec["label"], "b": other["label"], **found.to_json()}
            for i, spec in enumerate(specs)
            for j, other in enumerate(specs[:i])
            if (found := against(i, j)) is not None
        ]
        return [None if found is None else found.to_json() for found in references], pairs

    for name in COSTS:
        base = specs[at]["cost"][name]
        for spec in specs:
            spent = spec["cost"][name]
            spec["cost"][f"relative_{name}"] = spent / base if spent and base else None
    references, pairwise = compared("gold")
    for spec, found in zip(specs, references, strict=True):
        spec["against_reference"] = found
    _mark_front(specs)
    summary: dict[str, Any] = {"specs": specs, "pairwise": pairwise}
    others = settings.get("other_golds") or {}
    if others:
        summary["other_pairwise"] = {}
    for name, column in others.items():
        references, summary["other_pairwise"][name] = compared(column)
        for spec, runs, found in zip(specs, all_runs, references, strict=True):
            spec.setdefault("other_golds", {})[name] = {
                "gold": _interval(intervals.of(runs.grid(column, numbers, seeds))),
                "failed": _failures(runs, f"{column}_error"),
                "against_reference": found,
            }
    if settings.get("attacks"):
        summary["attacks"] = _attacks(all_runs, settings, store, intervals)
    return summary


def _attacks(
    unattacked: Sequence[Runs], settings: Mapping[str, Any], store: Store, intervals: Intervals
) -> list[dict[str, Any]]:
    """Return how often each attack succeeds on each spec: all specs without one, then attacked."""
    numbers, seeds = settings["numbers"], settings["seeds"]
    cells = []
    before: list[tuple[Grid, Grid]] = []
    for attack in (None, *settings["attacks"]):
        attacked = unattacked
        if attack is not None:
            specs = zip(settings["specs"], attack["runs"], strict=True)
            renamed = [{**spec, "runs": names} for spec, names in specs]
            attacked = runs_of({**settings, "specs": renamed}, store)
        for place, runs in enumerate(attacked):
            gold = runs.grid("gold", numbers, seeds)
            harm = np.where(np.isfinite(gold), gold < settings["harm_below"], np.nan)
            cell: dict[str, Any] = {
                "spec": runs.described["label"],
                "attack": None if attack is None else attack["name"],
                "responses": len(runs.rows),
                "success": _interval(intervals.of(harm)),
                "gold": _interval(intervals.of(gold)),
            }
            if attack is None:
                before.append((harm, gold))
            else:
                cell["label"] = under(cell["spec"], attack["name"])
                cell["added_success"] = _interval(intervals.of(harm - before[place][0]))
                cell["added_gold"] = _interval(intervals.of(gold - before[place][1]))
                cell["failed"] = _failures(runs, "error")
                cell["reward_failed"] = _failures(runs, "reward_error")
                cell["gold_failed"] = _failures(runs, "gold_error")
            cells.append(cell)
    return cells


def _spec(runs: Runs, settings: Mapping[str, Any], intervals: Intervals) -> dict[str, Any]:
    numbers, seeds = settings["numbers"], settings["seeds"]
    rows = runs.rows
    tokens = [[row["token_ids"] for row in of_seed] for of_seed in _by_seed(runs)]

    def interval(column: str) -> dict[str, Any] | None:
        return _interval(intervals.of(runs.grid(column, numbers, seeds)))

    return {
        **{name: runs.described[name] for name in ("label", "method", "lm", "params")},
        "runs": len(runs.costs),
        "responses": len(rows),
        "empty": sum(not row["text"].strip() for row in rows),
        "failed": _failures(runs, "error"),
        "reward": interval("reward"),
        "reward_failed": _failures(runs, "reward_error"),
        "gold": interval("gold"),
        "gold_failed": _failures(runs, "gold_error"),
        "kl": _kl(runs, interval("kl")),
        "perplexity": perplexity(rows),
        **{f"distinct_{n}": _mean([distinct(ids, n) for ids in tokens]) for n in _NGRAMS},
        "tokens": interval("tokens"),
        "stopped": interval("stopped"),
        "fallback_share": _share(rows, "fallbacks", "count"),
        "attempts_per_segment": _share(rows, "attempts", "count"),
        "cost": _cost(runs),
        "judge": _judge(runs, interval("judge")),
    }


def _value(row: Mapping[str, Any], column: str) -> float | None:
    """Return a number of a response, some of them put together from others."""
    if column == "kl":
        return _response_kl(row)
    if column == "tokens":
        return len(row["token_ids"])
    if column == "stopped":
        return float(row["finish_reason"] == "stop")
    if column == "judge":
        return fmean(row["judge"]) if row.get("judge") else None
    value: float | None = row.get(column)
    return value


def _response_kl(row: Mapping[str, Any]) -> float | None:
    """Return the part of the choice and that of another model; None if one of them is not known."""
    part: float | None = row["alignment_kl"]
    if part is None or "base_logprob_by" not in row:
        return part if row["base_tokens"] is not None else None
    if not row["same_tokens"] or row["logprob"] is None:
        return None
    return part + float(row["logprob"] - row["base_logprob"])


def _kl(runs: Runs, interval: dict[str, Any] | None) -> dict[str, Any]:
    rows = runs.rows
    if interval is None:
        reasons = sorted({row["kl_reason"] for row in rows} - {""})
        if any(row.get("same_tokens") is False for row in rows):
            reasons.append("its tokens are not those of the base model")
        return {"reason": "; ".join(reasons) or "not measured"}
    kinds = {row["kl_kind"] for row in rows if row["kl_kind"] is not None}
    other_model = runs.described["lm"] is not None
    kind = max(kinds, key=("exact", "estimate", "upper bound").index)
    return {**interval, "kind": "estimate" if other_model and kind == "exact" else kind}


def _judge(runs: Runs, interval: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the win rate by the judge, both orders together; None if it was not asked."""
    asked = [row for row in runs.rows if "judge_by" in row]
    if not asked:
        return None
    means = [fmean(row["judge"]) for row in asked if row["judge"] is not None]
    found: dict[str, Any] = {"win_rate": interval, "failed": _failures(runs, "judge_error")}
    if means:
        found["win"] = sum(mean > 0.5 for mean in means) / len(means)
        found["loss"] = sum(mean < 0.5 for mean in means) / len(means)
        found["tie"] = sum(mean == 0.5 for mean in means) / len(means)
        # One order won, the other lost: the judge goes by the place.
        split = sum(row["judge"] in ([1, 0], [0, 1]) for row in asked)
        found["contradictory"] = split / len(means)
    return found


def _cost(runs: Runs) -> dict[str, Any]:
    """Return what a response costs: means over runs, the median of their seconds."""
    costs = list(runs.costs.values())
    sizes = [len(rows) for rows in runs.responses.values()]
    names = ("lm_tokens", "rm_tokens", "lm_calls", "rm_calls", "rm_jobs", "row_steps", "flops")
    found: dict[str, Any] = {
        name: _mean([getattr(c, name) / n for c, n in zip(costs, sizes, strict=True)])
        for name in names
    }
    each = [c.seconds / n for c, n in zip(costs, sizes, strict=True)]
    found["seconds"] = median(each) if each else None
    found["seconds_per_run"] = median(c.seconds for c in costs) if costs else None
    found["unused_share"] = _mean([c.unused_share for c in costs])
    found["discarded_per_rejection"] = _mean([c.discarded_per_rejection for c in costs])
    found["lm_parameters"] = costs[0].lm_parameters if costs else None
    found["rm_parameters"] = costs[0].rm_parameters if costs else None
    return found


def _mark_front(specs: Sequence[dict[str, Any]]) -> None:
    """Note the costs by which each spec is on the front."""
    for spec in specs:
        spec["on_front"] = []
    for name in COSTS:
        placed = [spec for spec in specs if spec["gold"] is not None and spec["cost"][name]]
        points = [(spec["cost"][name], spec["gold"]["mean"]) for spec in placed]
        for spec, kept in zip(placed, pareto(points), strict=True):
            if kept:
                spec["on_front"].append(name)


def _by_seed(runs: Runs) -> list[list[Record]]:
    return [[row for row in rows if row["error"] is None] for rows in runs.responses.values()]


def _failures(runs: Runs, key: str) -> list[dict[str, Any]]:
    """Return each record's number, seed and error."""
    return [
        {"number": row["number"], "seed": seed, "error": row[key]}
        for seed, rows in runs.responses.items()
        for row in rows
        if row.get(key) is not None
    ]


def _share(rows: Sequence[Record], key: str, of: str) -> float | None:
    total = sum(row["segments"][of] for row in rows)
    return sum(row["segments"][key] for row in rows) / total if total else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return fmean(known) if known else None


def _interval(interval: Interval | None) -> dict[str, Any] | None:
    return None if interval is None else interval.to_json()
