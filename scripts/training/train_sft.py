"""Supervised fine-tuning of the demo language model on preferred reviews, with TRL.

    python scripts/training/train_sft.py --out DIR [--rate 2e-3] [--pairs 8000] ...

The baseline "SFT" of the STARS paper (arXiv 2511.03827): the demonstrations are the reviews that a
noisy judge preferred to another of the same opening, see `preferences`. The loss is taken on the
response alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loading import load_lm
from preferences import preference_pairs
from prompt_sets import tuning_prompts
from sampling import gold_figures, sample_responses
from settings_flags import parser_of, settings_of
from trl_training import common_arguments, require_trl, save_trained, training_folder

from stars_fast import demo


@dataclass(frozen=True)
class SftSettings:
    """What is trained.

    Attributes
    ----------
    model
        Directory of the language model to start from.
    seed
        Of the preferences and of the order of the data.
    pairs
        Preferences whose preferred reviews are learned from.
    batch_size, rate, epochs
        Demonstrations per step, peak learning rate, passes.
    """

    model: str = str(demo.model_dir())
    seed: int = 0
    pairs: int = 8_000
    batch_size: int = 32
    rate: float = 2e-3
    epochs: float = 2.0


def train(settings: SftSettings, out: Path) -> None:
    """Train and write a model to ``out``.

    Raises
    ------
    ModuleNotFoundError
        Without TRL.
    """
    require_trl()
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    pairs = preference_pairs(settings.pairs, settings.seed)
    data = [{"prompt": pair.prompt, "completion": pair.chosen.response} for pair in pairs]
    model, tokenizer = load_lm(settings.model)
    with training_folder(settings.seed) as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                **common_arguments(
                    seed=settings.seed,
                    batch_size=settings.batch_size,
                    rate=settings.rate,
                    epochs=settings.epochs,
                    folder=folder,
                )
            ),
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
        )
        trainer.train()
    save_trained(model, tokenizer, out)


def main() -> None:
    """Command line."""
    arguments = parser_of(__doc__, SftSettings).parse_args()
    train(settings_of(SftSettings, arguments), arguments.out)
    print(gold_figures(sample_responses(arguments.out, tuning_prompts(), 8)))


if __name__ == "__main__":
    main()
