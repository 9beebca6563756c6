"""Train every model that alignment is compared with, in order, into one directory.

    python scripts/training/train_alignment_models.py --out DIR [--only NAME ...] [--seed 0]

``sft`` and ``dpo`` need TRL (``pip install -c constraints.txt '.[train]'``), ``value`` and
``acceptor`` do not. What is there already is left as it is. At the end: the mean gold of unaligned
responses of each language model to the evaluation's prompts, also in ``DIR/gold.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import train_acceptor
import train_dpo
import train_sft
import train_value_reward
from sampling import gold_figures, sample_responses

from stars_fast import demo

GOLD_PROMPTS, GOLD_SAMPLES = 128, 4


def steps(out: Path, seed: int) -> dict[str, Callable[[Path], object]]:
    """What makes each model, given where to write it; later ones start from earlier ones."""
    return {
        "sft": lambda path: train_sft.train(train_sft.SftSettings(seed=seed), path),
        "dpo": lambda path: train_dpo.train(
            train_dpo.DpoSettings(seed=seed, model=str(out / "sft")), path
        ),
        "value": lambda path: train_value_reward.train(
            train_value_reward.ValueSettings(seed=seed), path
        ),
        "acceptor": lambda path: train_acceptor.train(
            train_acceptor.AcceptorSettings(seed=seed, value=str(out / "value")), path
        ),
    }


def run(making: dict[str, Callable[[Path], object]], out: Path) -> None:
    """Make what is not there; a model's directory appears when it is complete."""
    for name, make in making.items():
        if (out / name).exists():
            print(f"{name}: there already")
            continue
        start = time.perf_counter()
        unfinished = out / f"{name}.unfinished"
        make(unfinished)
        unfinished.rename(out / name)
        print(f"{name}: {time.perf_counter() - start:.0f} s")


def gold_of_models(out: Path) -> dict[str, dict[str, float]]:
    """Gold of unaligned responses of the demo's language model and of those in ``out``."""
    models = {"base": demo.model_dir(), "sft": out / "sft", "dpo": out / "dpo"}
    prompts = demo.prompts(GOLD_PROMPTS)
    return {
        name: gold_figures(sample_responses(path, prompts, GOLD_SAMPLES))
        for name, path in models.items()
        if path.exists()
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of all models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(steps(Path(), 0)), help="leave others")
    arguments = parser.parse_args()
    making = steps(arguments.out, arguments.seed)
    run({name: making[name] for name in arguments.only or making}, arguments.out)
    gold = gold_of_models(arguments.out)
    (arguments.out / "gold.json").write_text(json.dumps(gold, indent=1) + "\n", encoding="utf-8")
    for name, figures in gold.items():
        print(f"{name}: mean gold {figures['gold']:.3f} +- {figures['standard_error']:.3f}")


if __name__ == "__main__":
    main()
