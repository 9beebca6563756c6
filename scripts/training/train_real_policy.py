"""A real chat model fine-tuned on a noisy judge's choices, with TRL: SFT, or DPO from its result.

    python scripts/training/train_real_policy.py --kind sft --model LM_DIR --samples S --out SFT
    python scripts/training/train_real_policy.py --kind dpo --model SFT --samples S --out DPO

The baselines of the STARS paper (arXiv 2511.03827) on the preferences that the reward model learned
from: the preferred responses are the demonstrations, the pairs those of DPO with beta 0.1. Low-rank
adapters of all linear layers are trained and merged. Needs the extra ``train``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from real_pairs import Preference, preferences, read
from settings_flags import parser_of, settings_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
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


def records(
    kind: str, pairs: list[Preference], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Lines of the trainers' data sets: chats as text, as the model reads them."""
    lines = []
    for pair in pairs:
        prompt = tokenizer.decode(pair.chosen.prompt_ids)
        if kind == "sft":
            lines.append({"prompt": prompt, "completion": pair.chosen.text})
        else:
            texts = {"chosen": pair.chosen.text, "rejected": pair.rejected.text}
            length = max(len(pair.chosen.ids), len(pair.rejected.ids))
            lines.append({"prompt": prompt, **texts, "length": length})
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

    responses = [one for one in read(Path(settings.samples)) if one.ids and not one.held_out]
    pairs = preferences(responses, settings.seed)[: settings.pairs]
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
            "train_dataset": Dataset.from_list(records(settings.kind, pairs, tokenizer)),
            "processing_class": tokenizer,
            "peft_config": adapters,
        }
        trainer = (
            SFTTrainer(args=SFTConfig(**common), **parts)
            if settings.kind == "sft"
            else DPOTrainer(
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
