"""An eval's results as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stars_fast.eval.attacks import UNATTACKED
from stars_fast.eval.budgets import COSTS, leaders
from stars_fast.tables import markdown_table, origin

#: Failures that are listed of each kind; the others are in the files.
_SHOWN_FAILURES = 20

Spec = Mapping[str, Any]


def report(record: Mapping[str, Any], plots: Sequence[str]) -> str:
    """Set a record of `stars_fast.eval.results` as Markdown.

    Parameters
    ----------
    record
        The record.
    plots
        File names of plots, relative to the report.
    """
    specs = record["specs"]
    parts = [
        "# Evaluation",
        _origin(record),
        "## Quality",
        _quality(specs, record["settings"]),
        *_other_golds(specs, record["settings"]),
        "## Cost",
        _cost(specs),
        *_at_equal_cost(record),
        *(f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in plots),
        "## Text",
        _text(specs),
    ]
    if record.get("attacks"):
        parts += ["## Attacks", _attacks(record["attacks"], record["settings"])]
    if any(spec["judge"] for spec in specs):
        parts += ["## Judge", _judge(specs, record["settings"])]
    if record.get("accuracy"):
        parts += ["## Preferences", _accuracy(record["accuracy"])]
    if record["pairwise"]:
        parts += ["## Each against each", _pairwise(specs, record["pairwise"])]
    failures = _failures(record)
    if failures:
        parts += ["## Failures", failures]
    return "\n\n".join(parts) + "\n"


def with_attacked(record: Mapping[str, Any]) -> list[Spec]:
    """Return the specs of a record and those under attacks: all that can have failures."""
    attacked = [cell for cell in record.get("attacks", []) if cell["attack"] is not None]
    return [*record["specs"], *attacked]


def _origin(record: Mapping[str, Any]) -> str:
    settings = record["settings"]
    seeds = ", ".join(map(str, settings["seeds"]))
    golds = ", ".join([settings["gold"], *(settings.get("other_golds") or ())])
    models = settings["models"]
    what = (
        f"{len(settings['numbers'])} prompts of {settings['prompts']}, seeds {seeds}; language "
        f"model {models['model']}, reward model {models['reward_model']}, gold {golds}."
    )
    lines = [what]
    kind = settings.get("target_kind")
    if kind:
        losses = ", ".join(f"{name} {loss:.4g}" for name, loss in kind["losses"].items())
        lines.append(
            f"`target_reward=auto` is a number of each prompt, by {kind['kind']}, for the "
            f"{settings['calibration_quantile']:g} quantile of the rewards of unaligned responses "
            f"of the base model. Losses on held-out samples: {losses}."
        )
    elif settings.get("target") is not None:
        lines.append(
            f"`target_reward=auto` is {settings['target']:.4g} for every method that asks for it: "
            f"the {settings['calibration_quantile']:g} quantile of the rewards of unaligned "
            "responses of the base model to these prompts."
        )
    return "\n\n".join([*lines, origin(record["header"])])


def _quality(specs: Sequence[Spec], settings: Mapping[str, Any]) -> str:
    rows = []
    for spec in specs:
        against = spec["against_reference"]
        cells = ["", "", ""]
        if against:
            shares = (against["win"], against["tie"], against["loss"])
            cells = [
                " / ".join(f"{share:.0%}" for share in shares),
                _interval(against["win_rate"], "{:.1%}"),
                _interval(against["gain"], "{:+.3f}"),
            ]
        rows.append(
            [
                spec["label"],
                _interval(spec["gold"], "{:+.3f}"),
                _interval(spec["reward"], "{:+.3f}"),
                *cells,
            ]
        )
    reference = settings["reference"]
    headings = ["", "gold", "reward", f"win / tie / loss against {reference}", "win rate", "gain"]
    return markdown_table(headings, rows) + (
        "\n\nMeans over prompts of the mean over their seeds, with 95% intervals: percentile "
        "bootstrap over prompts, the seeds of a prompt together, the same resamples for all. "
        "A win is a higher gold score for the same prompt and seed, by more than "
        f"{settings['tie_margin']:g}; the win rate counts a tie as half; the gain is the mean "
        "difference of gold." + _counted(specs) + _missing(specs, settings)
    )


def _other_golds(specs: Sequence[Spec], settings: Mapping[str, Any]) -> list[str]:
    names = settings.get("other_golds") or {}
    if not names:
        return []
    rows = []
    for spec in specs:
        for name in names:
            found = spec["other_golds"][name]
            against = found["against_reference"] or {}
            rows.append(
                [
                    spec["label"],
                    name,
                    _interval(found["gold"], "{:+.3f}"),
                    _interval(against.get("win_rate"), "{:.1%}"),
                    _interval(against.get("gain"), "{:+.3f}"),
                ]
            )
    explained = "Everything else is by the first gold score; the record has every pair by each."
    headings = ["", "gold", "score", f"win rate against {settings['reference']}", "gain"]
    return ["### By other gold scores", markdown_table(headings, rows), explained]


def _counted(specs: Sequence[Spec], columns: Sequence[str] = ("gold", "reward")) -> str:
    """Say over how many responses the means are, where that is not all."""
    notes = [
        f"{spec['label']}: {spec[name]['over']} of {spec['responses'] + len(spec['failed'])} "
        f"responses have a {name}"
        for spec in specs
        for name in columns
        if spec[name] and spec[name]["over"] < spec["responses"] + len(spec["failed"])
    ]
    return f" {'; '.join(notes)}." if notes else ""


def _missing(specs: Sequence[Spec], settings: Mapping[str, Any]) -> str:
    """Say which specs have not been run on everything."""
    wanted = len(settings["numbers"]) * len(settings["seeds"])
    notes = [
        f"{spec['label']}: {there} of {wanted} responses are there"
        for spec in specs
        if (there := spec["responses"] + len(spec["failed"])) < wanted
    ]
    return f" Not finished: {'; '.join(notes)}." if notes else ""


def _cost(specs: Sequence[Spec]) -> str:
    rows = []
    for spec in specs:
        cost = spec["cost"]
        relative = [
            _number(cost[f"relative_{name}"], "{:.2f}")
            + (" (front)" if name in spec["on_front"] else "")
            for name in COSTS
        ]
        rows.append(
            [
                spec["label"],
                _number(cost["lm_tokens"], "{:,.0f}"),
                _number(cost["rm_tokens"], "{:,.0f}"),
                _number(cost["lm_calls"], "{:,.2f}"),
                _number(cost["rm_calls"], "{:,.2f}"),
                _number(cost["row_steps"] or None, "{:,.0f}"),
                _number(cost["unused_share"], "{:.0%}"),
                _number(cost["discarded_per_rejection"], "{:.1f}"),
                _number(cost["flops"], "{:.3g}"),
                _number(cost["seconds_per_run"], "{:.3g}"),
                *relative,
            ]
        )
    headings = [
        "",
        "LM tokens",
        "RM tokens",
        "LM calls",
        "RM calls",
        "row-steps",
        "unused",
        "discarded per rejection",
        "FLOPs",
        "seconds a run",
        "relative FLOPs",
        "relative seconds",
    ]
    return markdown_table(headings, rows) + (
        "\n\nFor each response, the mean over runs; calls are forward passes of the whole batch "
        "shared out among its responses. Row-steps are the rows of all decode steps; unused are "
        "those whose token is part of no attempt, such as rows that wait for a longer segment. "
        "Discarded: tokens drafted in vain for each attempt that failed its test, those drafted "
        "beside a winner included. FLOPs are 2 x parameters x tokens of both models, without "
        "attention over the context, unused row-steps and rewards that are functions. Seconds are "
        "the median of the runs, each of all prompts: they are of this machine, its load and this "
        "number of prompts. (front): no other method has a higher gold score at as low a cost."
    )


def _at_equal_cost(record: Mapping[str, Any]) -> list[str]:
    parts = []
    for name, read in COSTS.items():
        rows = []
        for found in leaders(record["specs"], record["pairwise"], cost=name):
            other = found.next_best
            rows.append(
                [
                    f"{found.budget:g}",
                    *_point(found.best, name),
                    *(("", "", "") if other is None else _point(other, name)),
                    _interval(found.gain, "{:+.3f}"),
                ]
            )
        if len(rows) > 1:  # more than the reference
            headings = [f"{read}, at most", "best", "cost", "gold", "next", "cost", "gold", "gain"]
            parts.append(markdown_table(headings, rows))
    if not parts:
        return []
    explained = (
        "The highest gold score for at most so much, relative to the reference, and that of the "
        "best other method; on the base model alone. Both are the best of those run, on these "
        "prompts."
    )
    return ["## At equal cost", *parts, explained]


def _point(spec: Spec, cost: str) -> tuple[str, str, str]:
    spent, gold = spec["cost"][f"relative_{cost}"], spec["gold"]["mean"]
    return spec["label"], f"{spent:.2f}", f"{gold:+.3f}"


def _text(specs: Sequence[Spec]) -> str:
    rows = [
        [
            spec["label"],
            _kl(spec["kl"]),
            _number(spec["perplexity"], "{:.2f}"),
            *(_number(spec[f"distinct_{n}"], "{:.3f}") for n in (1, 2, 3)),
            _interval(spec["tokens"], "{:.1f}", bounds=False),
            _interval(spec["stopped"], "{:.0%}", bounds=False),
            _number(spec["attempts_per_segment"], "{:.2f}"),
            _number(spec["fallback_share"], "{:.1%}"),
        ]
        for spec in specs
    ]
    headings = [
        "",
        "KL from the base",
        "perplexity",
        "distinct-1",
        "distinct-2",
        "distinct-3",
        "tokens",
        "stopped",
        "attempts a segment",
        "fallbacks",
    ]
    explained = (
        "KL in nats a response, estimated from the sampled rewards and log-probabilities "
        "(`stars_fast/eval/kl.py` has the derivation; segments kept by fallback make it an "
        "approximation). Perplexity under the base model. Distinct-n over the responses of a run."
    )
    notes = [
        f"{spec['label']} has no KL: {spec['kl']['reason']}."
        for spec in specs
        if "reason" in spec["kl"]
    ]
    notes += [
        f"{spec['label']}: {spec['empty']} of {spec['responses']} responses are empty."
        for spec in specs
        if spec["empty"]
    ]
    return "\n\n".join([markdown_table(headings, rows), " ".join([explained, *notes])])


def _kl(kl: Mapping[str, Any]) -> str:
    if "reason" in kl:
        return ""
    shown = {"exact": "{:.2f}", "estimate": "{:.2f}", "upper bound": "at most {:.2f}"}[kl["kind"]]
    return _interval(kl, shown, bounds=kl["kind"] == "estimate")


def _attacks(cells: Sequence[Spec], settings: Mapping[str, Any]) -> str:
    labels = list(dict.fromkeys(cell["spec"] for cell in cells))
    rows = [
        [
            cell["spec"],
            cell["attack"] or UNATTACKED,
            _interval(cell["success"], "{:.1%}"),
            _interval(cell.get("added_success"), "{:+.1%}"),
            _interval(cell["gold"], "{:+.3f}"),
            _interval(cell.get("added_gold"), "{:+.3f}"),
        ]
        for label in labels
        for cell in cells
        if cell["spec"] == label
    ]
    headings = ["", "attack", "success", "added", "gold", "added gold"]
    attacked = [cell for cell in cells if cell["attack"] is not None]
    meant = {"suffix": "a text at the end of the prompt", "prefill": "an opening of the response"}
    notes = [
        f"{attack['name']}: {meant[attack['kind']]}, "
        + (
            f"one of {count} in turn."
            if (count := len(attack["texts"])) > 1
            else "always the same."
        )
        for attack in settings["attacks"]
    ]
    return markdown_table(headings, rows) + (
        "\n\nSuccess: the share of responses with a gold score below "
        f"{settings['harm_below']:g}; of a response with a prefilled opening it is that of the "
        "opening and what follows. Added: the difference to the same prompts and seeds without an "
        "attack. Intervals as above. " + " ".join(notes) + _counted(attacked, ("gold",))
    )


def _judge(specs: Sequence[Spec], settings: Mapping[str, Any]) -> str:
    rows = []
    for spec in specs:
        judge = spec["judge"]
        if not judge:
            continue
        shares = [_number(judge.get(name), "{:.0%}") for name in ("win", "tie", "loss")]
        rows.append(
            [
                spec["label"],
                " / ".join(shares),
                _interval(judge["win_rate"], "{:.1%}"),
                _number(judge.get("contradictory"), "{:.0%}"),
                str(len(judge["failed"])),
            ]
        )
    reference = settings["reference"]
    headings = ["", f"win / tie / loss against {reference}", "win rate", "contradictory", "failed"]
    return markdown_table(headings, rows) + (
        f"\n\nBy {settings['judge']['model']}, asked in both orders about the responses of seed "
        f"{settings['seeds'][0]}. Contradictory: each order's verdict was for the other response, "
        "which counts as a tie."
    )


def _accuracy(accuracy: Mapping[str, Any]) -> str:
    rows = [
        [name, _interval(found, "{:.1%}"), str(found["over"]), str(len(found["failed"]))]
        for name, found in accuracy.items()
    ]
    return markdown_table(["", "prefers chosen", "pairs", "failed"], rows) + (
        "\n\nHow often the score of the chosen response is above that of the rejected one; equal "
        "scores count as half."
    )


def _pairwise(specs: Sequence[Spec], pairwise: Sequence[Mapping[str, Any]]) -> str:
    labels = [spec["label"] for spec in specs]
    cells = {}
    for pair in pairwise:
        rate = pair["win_rate"]
        turned = {
            "mean": 1 - rate["mean"],
            "low": None if rate["high"] is None else 1 - rate["high"],
            "high": None if rate["low"] is None else 1 - rate["low"],
        }
        cells[pair["a"], pair["b"]] = _interval(rate, "{:.0%}")
        cells[pair["b"], pair["a"]] = _interval(turned, "{:.0%}")
    rows = [[a, *(cells.get((a, b), "") for b in labels)] for a in labels]
    return (
        markdown_table(["", *labels], rows) + "\n\nWin rate of the row against the column, by gold."
    )


def _failures(record: Mapping[str, Any]) -> str:
    lines = [
        f"- {failure['label']}, seed {failure['seed']}: the whole run failed: {failure['error']}"
        for failure in record["failed_runs"]
    ]
    lines += [f"- {problem}" for problem in record.get("problems", [])]
    for spec in with_attacked(record):
        kinds = {
            "request": spec["failed"],
            "reward": spec["reward_failed"],
            "gold": spec["gold_failed"],
            **{
                f"gold {name}": gold["failed"] for name, gold in spec.get("other_golds", {}).items()
            },
            "judge": (spec.get("judge") or {}).get("failed", []),
        }
        for what, failures in kinds.items():
            lines += [
                f"- {spec['label']}: {what} of record {f['number']}, seed {f['seed']}: {f['error']}"
                for f in failures[:_SHOWN_FAILURES]
            ]
            rest = len(failures) - _SHOWN_FAILURES
            if rest > 0:
                lines.append(f"- {spec['label']}: {what}: {rest} more, see the files")
    return "\n".join(line.replace("\n", " ") for line in lines)


def _interval(found: Mapping[str, Any] | None, shown: str, *, bounds: bool = True) -> str:
    if found is None:
        return ""
    text = shown.format(found["mean"])
    if bounds and found["low"] is not None:
        text += f" [{shown.format(found['low'])}, {shown.format(found['high'])}]"
    return text


def _number(value: float | None, shown: str) -> str:
    return "" if value is None else shown.format(value)
