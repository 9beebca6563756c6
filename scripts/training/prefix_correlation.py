"""How well the reward of a prefix tells the gold of the whole response, by position.

    python scripts/training/prefix_correlation.py --out FILE.json [--plot FILE.png] ...

For unaligned responses to the evaluation's prompts, none of which a model was trained on: Pearson
and Spearman correlation of the final gold with

``reward``               the reward model on prompt and prefix, as STARS reads it
``reward minus prompt``  less the reward of the prompt alone, r(x, y[:t]) - r(x)
``value``                a model of ``train_value_reward.py``, if given

at each position, over the responses that are at least that long; at their end; and over all these
prefixes together ("pooled"), which is where the level of a score may differ between positions.
A change of scale position by position leaves Spearman's rank correlation at a position as it is and
shows in the pooled one alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from loading import load_classifier
from make_demo_models import POSITIONS, correlation
from position_rewards import rewards_of_rows
from sampling import Sample, sample_responses
from settings_flags import parser_of, settings_of

from stars_fast import StarsParams, demo
from stars_fast.tables import text_table


@dataclass(frozen=True)
class CorrelationSettings:
    """What is measured.

    Attributes
    ----------
    model, reward_model
        Directories of the language model that draws and of the reward model.
    value
        Directory of a value model; empty: none.
    seed
        Of the responses.
    prompts, samples_per_prompt, max_tokens
        Responses measured on.
    """

    model: str = str(demo.model_dir())
    reward_model: str = str(demo.reward_model_dir())
    value: str = ""
    seed: int = 1_000
    prompts: int = 256
    samples_per_prompt: int = 4
    max_tokens: int = 128


#: Scores of each response at its positions 0 (the prompt alone) to its length.
Scores = Sequence[Sequence[float]]


def scores_of(settings: CorrelationSettings, samples: Sequence[Sample]) -> dict[str, Scores]:
    """Every score of every prefix, by the score's name.

    Another score, for example the reward calibrated by position, is one more entry here.
    """
    reward = prefix_scores(settings.reward_model, samples)
    scores: dict[str, Scores] = {
        "reward": reward,
        "reward minus prompt": [[value - values[0] for value in values] for values in reward],
    }
    if settings.value:
        scores["value"] = prefix_scores(settings.value, samples)
    return scores


def prefix_scores(directory: str, samples: Sequence[Sample]) -> Scores:
    """A classifier's output for each prefix of each response, the empty one first."""
    model, _ = load_classifier(directory)
    rows = rewards_of_rows(model, [sample.ids for sample in samples])
    return [
        values[len(sample.prompt_ids) - 1 :] for sample, values in zip(samples, rows, strict=True)
    ]


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0, equals sharing the mean of theirs."""
    _, group, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: list[float] = (last - (counts + 1) / 2)[group].tolist()
    return means


def correlations(scores: Sequence[float], gold: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's; 0 where one side is constant."""
    return {
        "pearson": correlation(scores, gold),
        "spearman": correlation(ranks(scores), ranks(gold)),
    }


def table(
    scores: Mapping[str, Scores],
    gold: Sequence[float],
    positions: Sequence[int] = POSITIONS,
) -> dict[str, dict[str, Any]]:
    """Rows of `correlations` by position, then ``end`` and ``pooled``.

    Positions that fewer than 8 responses reach are left out.
    """
    lengths = [len(values) - 1 for values in next(iter(scores.values()))]
    reached = {
        position: [(i, position) for i, length in enumerate(lengths) if length >= position]
        for position in positions
    }
    rows = {str(position): places for position, places in reached.items() if len(places) >= 8}
    rows["pooled"] = [place for places in rows.values() for place in places]
    rows["end"] = list(enumerate(lengths))
    return {
        row: {
            "prefixes": len(places),
            **{
                name: correlations([values[i][t] for i, t in places], [gold[i] for i, _ in places])
                for name, values in scores.items()
            },
        }
        for row, places in rows.items()
        if places
    }


def measure(settings: CorrelationSettings) -> dict[str, Any]:
    """Draw, score and correlate; returns what ``--out`` holds."""
    samples = sample_responses(
        settings.model,
        demo.prompts(settings.prompts),
        settings.samples_per_prompt,
        seed=settings.seed,
        params=StarsParams(max_tokens=settings.max_tokens),
    )
    gold = [sample.gold for sample in samples]
    rows = table(scores_of(settings, samples), gold)
    names = ("model", "reward_model", "value")
    recorded = {**asdict(settings), **{name: Path(getattr(settings, name)).name for name in names}}
    return {"settings": recorded, "responses": len(samples), "correlation with gold": rows}


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Spearman's correlation along the positions."""
    import matplotlib as mpl

    mpl.use("Agg")  # no display is asked for
    from matplotlib import pyplot

    rows = record["correlation with gold"]
    positions = [row for row in rows if row.isdigit()]
    figure, ax = pyplot.subplots(figsize=(5.4, 3.8), layout="constrained")
    for name in (name for name in rows["end"] if name != "prefixes"):
        values = [rows[position][name]["spearman"] for position in positions]
        ax.plot([int(position) for position in positions], values, "o-", label=name)
    ax.set_xlabel("tokens of the response")
    ax.set_ylabel("Spearman correlation with the final gold")
    ax.set_ylim(top=1.0)
    ax.grid(visible=True, alpha=0.3)
    ax.legend(fontsize=8)
    ax.set_title(f"{record['responses']} unaligned responses", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Command line."""
    parser = parser_of(__doc__, CorrelationSettings, out="JSON file to write")
    parser.add_argument("--plot", type=Path, help="PNG file to draw")
    arguments = parser.parse_args()
    record = measure(settings_of(CorrelationSettings, arguments))
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if arguments.plot is not None:
        draw(record, arguments.plot)
    rows = record["correlation with gold"]
    names = [name for name in rows["end"] if name != "prefixes"]
    lines = [["tokens", "prefixes", *names]]
    for position, row in rows.items():
        cells = [f"{row[name]['pearson']:.3f} / {row[name]['spearman']:.3f}" for name in names]
        lines.append([position, str(row["prefixes"]), *cells])
    print("\n".join([*text_table(lines, left=()), "Pearson / Spearman"]))


if __name__ == "__main__":
    main()
