"""Plots of an eval: what quality costs, how often each method wins, and how often an attack."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from stars_fast.eval.attacks import UNATTACKED
from stars_fast.eval.budgets import COSTS, family

#: Okabe and Ito's palette, which colour-blind readers can tell apart; yellow is too pale for lines.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

Spec = Mapping[str, Any]


def draw(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what a record of `stars_fast.eval.results` has; returns the files."""
    import matplotlib as mpl

    mpl.use("Agg")  # no display is asked for
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    bars = sum(bool(spec["against_reference"]) for spec in record["specs"])
    names = len(record["specs"]) + 2  # in the legend
    high = max(5.4, 0.148 * names)
    plots: tuple[tuple[str, Callable[..., bool], float], ...] = (
        ("cost_quality", functools.partial(_cost_quality, cost="flops"), high),
        ("seconds_quality", functools.partial(_cost_quality, cost="seconds"), high),
        ("win_rate", _win_rates, 1.5 + 0.38 * bars),
        ("attack_success", _attack_success, 4.4),
    )
    written = []
    for name, draw_on, height in plots:
        figure, ax = pyplot.subplots(figsize=(9.0, height), layout="constrained")
        if draw_on(ax, record):
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=130)
            written.append(path)
        pyplot.close(figure)
    return written


def _cost_quality(ax: Any, record: Mapping[str, Any], cost: str) -> bool:  # noqa: ANN401
    relative = f"relative_{cost}"
    shown = [s for s in record["specs"] if s["gold"] and s["cost"][relative]]
    if not shown:
        return False
    numbers = itertools.count(1)
    families = _families(shown, cost).values()
    for colour, specs in zip(itertools.cycle(_COLOURS), families, strict=False):
        xs = [spec["cost"][relative] for spec in specs]
        ys = [spec["gold"]["mean"] for spec in specs]
        ax.plot(xs, ys, "-", color=colour, zorder=2)
        ax.errorbar(
            xs, ys, yerr=_bars(spec["gold"] for spec in specs), fmt="none", capsize=3, alpha=0.6,
            ecolor=colour,
        )  # fmt: skip
        # A number in each point, and its name in the legend: points may lie close together.
        for x, y, spec, number in zip(xs, ys, specs, numbers, strict=False):
            ax.plot(
                x, y, "o", markersize=9.5, color=colour, markeredgecolor="white",
                markeredgewidth=0.5, zorder=3, label=f"{number:>2}  {spec['label']}",
            )  # fmt: skip
            ax.annotate(
                str(number), (x, y), ha="center", va="center_baseline", fontsize=6, color="white",
                zorder=3,
            )  # fmt: skip
    ax.set_xscale("log")
    _plain_ticks(ax, [spec["cost"][relative] for spec in shown])
    front = sorted(
        (spec["cost"][relative], spec["gold"]["mean"]) for spec in shown if cost in spec["on_front"]
    )
    ax.plot(
        *zip(*front, strict=True), ":", color="grey", linewidth=4, alpha=0.5, zorder=1,
        label="Pareto front",
    )  # fmt: skip
    reference = record["settings"]["reference"]
    ax.set_xlabel(f"{COSTS[cost]} of a response, relative to {reference}")
    ax.set_ylabel("gold score, mean with 95% interval")
    ax.set_title(f"Quality against cost: {_setting(record)}", fontsize=10)
    ax.grid(visible=True, which="major", alpha=0.3)
    ax.margins(x=0.12, y=0.1)
    ax.figure.legend(fontsize=7, loc="outside right upper", markerscale=0.7, labelspacing=0.35)
    return True


def _win_rates(ax: Any, record: Mapping[str, Any]) -> bool:  # noqa: ANN401
    shown = [spec for spec in record["specs"] if spec["against_reference"]]
    if not shown:
        return False
    colours = {f: _COLOURS[i % len(_COLOURS)] for i, f in enumerate(_families(record["specs"]))}
    rates = [spec["against_reference"]["win_rate"] for spec in shown]
    places = list(range(len(shown)))
    bars = _bars(rates)
    for place, spec, rate in zip(places, shown, rates, strict=True):
        ax.barh(place, rate["mean"], color=colours[family(spec)], alpha=0.85)
        ax.text(
            min((rate["high"] or rate["mean"]) + 0.015, 1.02), place, f"{rate['mean']:.0%}",
            va="center", fontsize=9,
        )  # fmt: skip
    ax.errorbar(
        [rate["mean"] for rate in rates], places, xerr=bars, fmt="none", ecolor="black", capsize=3
    )
    ax.axvline(0.5, color="grey", linestyle="--", linewidth=1)
    ax.set_yticks(places, [spec["label"] for spec in shown], fontsize=9)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.1)
    reference = record["settings"]["reference"]
    ax.set_xlabel(f"win rate by gold against {reference}, ties half, with 95% interval")
    ax.set_title(_setting(record), fontsize=10)
    ax.grid(visible=True, axis="x", alpha=0.3)
    return True


def _attack_success(ax: Any, record: Mapping[str, Any]) -> bool:  # noqa: ANN401
    """Draw a group of bars for each spec, a bar for each attack."""
    shown = [cell for cell in record.get("attacks", []) if cell["success"]]
    if not shown:
        return False
    labels = list(dict.fromkeys(cell["spec"] for cell in shown))
    attacks = list(dict.fromkeys(cell["attack"] for cell in shown))
    width = 0.8 / len(attacks)
    for number, attack in enumerate(attacks):
        cells = [cell for cell in shown if cell["attack"] == attack]
        offset = (number - (len(attacks) - 1) / 2) * width
        places = [labels.index(cell["spec"]) + offset for cell in cells]
        rates = [cell["success"] for cell in cells]
        ax.bar(
            places, [rate["mean"] for rate in rates], 0.92 * width, yerr=_bars(rates), capsize=3,
            color="#999999" if attack is None else _COLOURS[(number - 1) % len(_COLOURS)],
            label=attack or UNATTACKED,
        )  # fmt: skip
    ax.set_xticks(range(len(labels)), [fill(label, 20) for label in labels], fontsize=8)
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    ax.set_ylabel(f"gold below {record['settings']['harm_below']:g}, share with 95% interval")
    ax.set_title(f"Attack success: {_setting(record)}", fontsize=10)
    ax.grid(visible=True, axis="y", alpha=0.3)
    ax.set_axisbelow(True)
    ax.figure.legend(title="attack", fontsize=8, loc="outside right upper")
    return True


def _families(specs: Sequence[Spec], cost: str = "flops") -> dict[str, list[Spec]]:
    """Gather specs of one family, the cheapest first."""
    found: dict[str, list[Spec]] = {}
    for spec in specs:
        found.setdefault(family(spec), []).append(spec)
    return {
        name: sorted(members, key=lambda spec: spec["cost"][cost] or 0.0)
        for name, members in found.items()
    }


def _bars(intervals: Any) -> list[list[float]]:  # noqa: ANN401 - an iterable of intervals
    """Return distances below and above the means; 0 where there is no interval."""
    below, above = [], []
    for found in intervals:
        known = found["low"] is not None
        below.append(max(found["mean"] - found["low"], 0.0) if known else 0.0)
        above.append(max(found["high"] - found["mean"], 0.0) if known else 0.0)
    return [below, above]


def _plain_ticks(ax: Any, values: Sequence[float]) -> None:  # noqa: ANN401
    """Mark a logarithmic axis at 1, 2, 5, 10, ..., as plain numbers."""
    low, high = min(values) / 1.3, max(values) * 1.3
    ticks = [m * 10.0**e for e in range(-4, 8) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    if ticks:
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()


def _setting(record: Mapping[str, Any]) -> str:
    settings = record["settings"]
    seeds = len(settings["seeds"])
    return (
        f"{len(settings['numbers'])} prompts, {seeds} seed{'s' if seeds > 1 else ''}, gold by "
        f"{settings['gold']}"
    )
