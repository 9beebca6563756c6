"""Direct preference optimisation of a fine-tuned model on pairs of reviews, with TRL.

    python scripts/training/train_dpo.py --model SFT_DIR --out DIR [--rate 3e-4] [--pairs 8000] ...

The baseline "SFT then DPO" of the STARS paper (arXiv 2511.03827), beta 0.1: from the model that
``train_sft.py`` made, which is also the reference, on the pairs that it saw the better halves of.
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
class DpoSettings:
    """What is trained.

    Attributes
    ----------
    model
        Directory of the language model to start from, also the reference.
    seed
        Of the preferences and of the order of the data.
    pairs
        Preferences.
    batch_size, rate, epochs
        Pairs per step, peak learning rate, passes.
    beta
        Of DPO: how dear it is to leave the reference.
    """

    model: str = str(demo.model_dir())
    seed: int = 0
    pairs: int = 8_000
    batch_size: int = 16
    rate: float = 3e-4
    epochs: float = 1.0
    beta: float = 0.1


def train(settings: DpoSettings, out: Path) -> None:
    """Train and write a model to ``out``.

    Raises
    ------
    ModuleNotFoundError
        Without TRL.
    """
    require_trl()
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pairs = preference_pairs(settings.pairs, settings.seed)
    data = [
        {
            "prompt": pair.prompt,
            "chosen": pair.chosen.response,
            "rejected": pair.rejected.response,
            "length": max(len(pair.chosen.text), len(pair.rejected.text)),  # to group by
        }
        for pair in pairs
    ]
    model, tokenizer = load_lm(settings.model)
    reference, _ = load_lm(settings.model)
    with training_folder(settings.seed) as folder:
        trainer = DPOTrainer(
            model=model,
            ref_model=reference,
            args=DPOConfig(
                beta=settings.beta,
                remove_unused_columns=False,  # or the lengths are gone
                **common_arguments(
                    seed=settings.seed,
                    batch_size=settings.batch_size,
                    rate=settings.rate,
                    epochs=settings.epochs,
                    folder=folder,
                ),
            ),
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
        )
        trainer.train()
    save_trained(model, tokenizer, out)


def main() -> None:
    """Command line."""
    arguments = parser_of(__doc__, DpoSettings).parse_args()
    train(settings_of(DpoSettings, arguments), arguments.out)
    print(gold_figures(sample_responses(arguments.out, tuning_prompts(), 8)))


if __name__ == "__main__":
    main()
