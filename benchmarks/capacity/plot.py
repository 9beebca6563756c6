"""The plot of a sweep of simulated loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(record: dict[str, Any], target: Path) -> None:
    """Draw a record's sweep as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex=True, constrained_layout=True)
    wait, end, waste, pages = axes.flat
    tops = record["saturation_requests_per_second"]
    for number, name in enumerate(tops):
        runs = [run for run in record["runs"] if str(run["candidates"]) == name]
        load = [run["requests_per_second"] for run in runs]
        style: dict[str, Any] = {"color": f"C{number}", "marker": "o", "markersize": 4}
        if name == "auto":
            style |= {"color": "black", "linewidth": 2.2}
        for axis, key in ((wait, "wait"), (end, "end")):
            axis.plot(load, [run[f"{key}_seconds_p99"] for run in runs], **style)
            axis.plot(load, [run[f"{key}_seconds_p50"] for run in runs], ls=":", **style)
        waste.plot(load, [run["drafted_per_accepted"] for run in runs], **style)
        pages.plot(load, [100 * run["page_share_mean"] for run in runs], label=name, **style)
    wait.set(yscale="log", ylabel="seconds", title="Wait: arrival to first round")
    end.set(yscale="log", ylabel="seconds", title="Latency: arrival to end of response")
    kinds = [
        Line2D([], [], color="grey", ls=style, label=name)
        for style, name in (("-", "99th percentile"), (":", "median"))
    ]
    wait.legend(handles=kinds, loc="upper left")
    waste.set(ylabel="tokens drafted / token accepted", title="Waste", ylim=(0, None))
    pages.set(ylabel="% of the pages, mean", title="KV pages in use", ylim=(0, 100))
    pages.legend(title="candidates N", loc="upper left")
    highest = max(tops.values())
    for axis in axes.flat:
        axis.grid(alpha=0.3, which="both")
        axis.axvspan(highest, 1.12 * highest, color="red", alpha=0.07, lw=0)
        axis.set_xlim(0.27 * highest, 1.12 * highest)
    pages.annotate(
        "more than\nany N can do",
        (1.11 * highest, 4),
        ha="right",
        va="bottom",
        fontsize=8,
        color="darkred",
    )
    for axis in axes[1]:
        axis.set_xlabel("requests per second on one replica")
    figure.suptitle(
        f"Simulated, not measured: {record['model']} with a reward model of shape "
        f"{record['reward_model']} on one {record['replica']['machine']['name']}\n"
        f"real scheduler, round times from data-sheet ceilings x {record['efficiency']:g}, "
        f"{record['requests']:,} requests"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    plt.close(figure)
    print(f"wrote {target}")
