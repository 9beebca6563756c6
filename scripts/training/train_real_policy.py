"""A real chat model fine-tuned on a noisy judge's choices, with TRL: SFT, or DPO from its result.

    python scripts/training/train_real_policy.py --kind sft --model LM_DIR --samples S --out SFT
    python scripts/training/train_real_policy.py --kind dpo --model SFT --samples S --out DPO

The baselines of the STARS paper (arXiv 2511.03827) on the preferences that the reward model learned
from: the preferred responses are the demonstrations, the pairs those of DPO with beta 0.1. Low-rank
adapters of all linear layers are trained and merged. Needs the extra ``train``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from real_pairs import Preference, preferences, read
from settings_flags import parser_of, settings_of
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_training import common_arguments, require_trl, training_folder

KINDS = ("sft", "dpo")


@dataclass(frozen=True)
class PolicySettings:
    """What is trained.

    Attributes
    ----------
    kind
        One of `KINDS`.
    model, samples
        Directory to start from, and the file that `real_pairs` wrote.
    seed
        Of the judge and of the order.
    pairs
        Preferences at most.
    batch_size, rate, epochs
        Pairs a step, peak learning rate, passes.
    rank
        Of the adapters.
    beta
        Of DPO: how dear it is to leave the reference.
    threads
        Of the processor.
    """

    kind: str = "sft"
    model: str = ""
    samples: str = ""
    seed: int = 0
    pairs: int = 1_500
    batch_size: int = 8
    rate: float = 2e-4
    epochs: float = 1.0
    rank: int = 16
    beta: float = 0.1
    threads: int = 2


def some(pairs: list[Preference], most: int, seed: int) -> list[Preference]:
    """Return at most so many pairs, of all chats: the first ones are of a few."""
    return random.Random(seed).sample(pairs, min(most, len(pairs)))


def records(kind: str, pairs: list[Preference]) -> list[dict[str, Any]]:
    """Lines of the trainers' data sets: the tokens as they were read and drawn.

    From texts the trainers would make every response end, those that were cut off as well.
    """
    lines: list[dict[str, Any]] = []
    for pair in pairs:
        prompt, chosen, rejected = pair.chosen.prompt_ids, pair.chosen.ids, pair.rejected.ids
        if kind == "sft":
            mask = [0] * len(prompt) + [1] * len(chosen)
            lines.append({"input_ids": prompt + chosen, "completion_mask": mask})
        else:
            length = len(prompt) + max(len(chosen), len(rejected))
            ids = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
            lines.append({**ids, "length": length})
    return lines


def train(settings: PolicySettings, out: Path) -> None:
    """Train and write a model to ``out``.

    Raises
    ------
    ModuleNotFoundError
        Without TRL or peft.
    ValueError
        If the kind is none of `KINDS`.
    """
    if settings.kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {settings.kind!r}")
    require_trl()
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    class OfTokens(DPOTrainer):  # type: ignore[misc,unused-ignore] - untyped where it is not installed
        """Takes tokens as they are."""

        def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
            return dataset

    responses = [one for one in read(Path(settings.samples)) if one.ids and not one.held_out]
    pairs = some(preferences(responses, settings.seed), settings.pairs, settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    adapters = LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with training_folder(settings.seed, settings.threads) as folder:
        common = common_arguments(
            seed=settings.seed,
            batch_size=settings.batch_size,
            rate=settings.rate,
            epochs=settings.epochs,
            folder=folder,
        )
        # Adapters switched off are the reference of DPO: no second model.
        parts: dict[str, Any] = {
            "model": model,
            "train_dataset": Dataset.from_list(records(settings.kind, pairs)),
            "processing_class": tokenizer,
            "peft_config": adapters,
        }
        trainer = (
            SFTTrainer(args=SFTConfig(completion_only_loss=True, **common), **parts)
            if settings.kind == "sft"
            else OfTokens(
                args=DPOConfig(beta=settings.beta, remove_unused_columns=False, **common), **parts
            )
        )
        trainer.train()
        merged = trainer.model.merge_and_unload()
    merged.config.use_cache = True  # trainers switch it off
    merged.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Command line."""
    arguments = parser_of(__doc__, PolicySettings).parse_args()
    train(settings_of(PolicySettings, arguments), arguments.out)


if __name__ == "__main__":
    main()
