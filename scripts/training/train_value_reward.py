"""A value-head reward model: from a prefix, the reward that the whole response will have.

    python scripts/training/train_value_reward.py --out DIR [--samples-per-prompt 16] ...

A reward model is trained on whole reviews, so what it says of a prefix is the reward of a review
that ends there. Here its head learns, at every token of responses that the language model drew, the
final reward of that response: the mean over what may follow, E[r(x, y) | y[:t]], minimises the
squared error. Same shape as the reward model, started from it. The prompt alone has a value, too.

Final rewards are read at a response's own last token, an end-of-sequence token if it drew one, as
the engine scores it. Responses follow training openings; those to `prompt_sets.tuning_prompts`
check it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import make_demo_models
import numpy as np
import torch
from loading import load_classifier
from make_demo_models import deterministic, epochs, fit, padded, save
from position_rewards import position_rewards, rewards_of_rows
from prompt_sets import training_prompts, tuning_prompts
from sampling import Sample, sample_responses
from settings_flags import parser_of, settings_of
from transformers import LlamaForSequenceClassification

from stars_fast import StarsParams, demo


@dataclass(frozen=True)
class ValueSettings:
    """What is trained.

    Attributes
    ----------
    model, reward_model
        Directories of the language model that draws and of the reward model to start from.
    seed
        Of the responses and of the order of the data.
    prompts, samples_per_prompt, max_tokens
        Responses learned from: prompts (0: all), responses to each, and their longest.
    batch_size, rate, epochs
        Responses per step, peak learning rate, passes.
    end_weight
        How often a response's last token counts, where the final reward is known without noise.
    """

    model: str = str(demo.model_dir())
    reward_model: str = str(demo.reward_model_dir())
    seed: int = 0
    prompts: int = 0
    samples_per_prompt: int = 16
    max_tokens: int = 128
    batch_size: int = 32
    rate: float = 1e-3
    epochs: int = 3
    end_weight: float = 5.0


def value_loss(
    model: LlamaForSequenceClassification,
    samples: Sequence[Sample],
    final_rewards: Sequence[float],
    end_weight: float = 1.0,
) -> torch.Tensor:
    """Mean squared error to the final reward, from the prompt's last token to the response's.

    The last token counts ``end_weight`` times.
    """
    rewards = position_rewards(model, padded([sample.ids for sample in samples]))
    place = torch.arange(rewards.shape[1])
    starts = torch.tensor([len(sample.prompt_ids) - 1 for sample in samples])[:, None]
    ends = torch.tensor([len(sample.ids) - 1 for sample in samples])[:, None]
    weights = ((place >= starts) & (place <= ends)) + (end_weight - 1.0) * (place == ends)
    errors = rewards - torch.tensor(final_rewards, dtype=rewards.dtype)[:, None]
    return (weights * errors.square()).sum() / weights.sum()


@torch.no_grad()
def mean_loss(
    model: LlamaForSequenceClassification,
    samples: Sequence[Sample],
    final_rewards: Sequence[float],
    batch_size: int = 64,
) -> float:
    """`value_loss` of many samples, a mean over batches."""
    starts = range(0, len(samples), batch_size)
    losses = [
        value_loss(model, samples[i : i + batch_size], final_rewards[i : i + batch_size]).item()
        for i in starts
    ]
    return float(np.mean(losses))


def train(settings: ValueSettings, out: Path) -> dict[str, float]:
    """Train and write a model to ``out``; return the loss on checked responses before and after."""
    params = StarsParams(max_tokens=settings.max_tokens)
    prompts = training_prompts()[: settings.prompts or None]
    samples = sample_responses(
        settings.model, prompts, settings.samples_per_prompt, seed=settings.seed, params=params
    )
    checked = sample_responses(
        settings.model, tuning_prompts(), 4, seed=settings.seed + 1, params=params
    )
    model, tokenizer = load_classifier(settings.reward_model)
    with deterministic(make_demo_models.Settings(seed=settings.seed)):
        rewards, checked_rewards = (
            [values[-1] for values in rewards_of_rows(model, [sample.ids for sample in part])]
            for part in (samples, checked)
        )
        before = mean_loss(model, checked, checked_rewards)
        rng = np.random.default_rng(settings.seed)
        lengths = [len(sample.ids) for sample in samples]
        groups = epochs(lengths, settings.epochs, settings.batch_size, rng)

        def loss_of(group: list[int]) -> torch.Tensor:
            part = [samples[i] for i in group]
            return value_loss(model, part, [rewards[i] for i in group], settings.end_weight)

        fit(model, groups, loss_of, settings.rate, "value")
        after = mean_loss(model, checked, checked_rewards)
        save(model, tokenizer, out)
    return {
        "variance of the final reward": float(np.var(checked_rewards)),
        "squared error before": before,
        "squared error after": after,
    }


def main() -> None:
    """Command line."""
    arguments = parser_of(__doc__, ValueSettings).parse_args()
    for name, value in train(settings_of(ValueSettings, arguments), arguments.out).items():
        print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main()
