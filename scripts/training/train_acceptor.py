"""A small model that accepts or rejects single tokens, as in MARA.

    python scripts/training/train_acceptor.py --value VALUE_DIR --out DIR [--labels ranked] ...

MARA (arXiv 2505.19743) decodes token by token: the candidates are tried in turn, the most likely
first, and a small network says yes or no to each. Here that is a one-label classifier of the reward
model's shape which reads the text and the candidate behind it; its output is the logit of "accept".
It is trained by binary cross-entropy on soft labels. With the value model V of
``train_value_reward.py``, over the language model's likeliest tokens u at a position t, and p their
probabilities when sampled,

``average``  label(u) = sigmoid((V(y[:t] + u) - sum_w p(w) V(y[:t] + w)) / scale): is the token
             better than what it would be replaced by? A token counts by its p.
``ranked``   q(u) proportional to p(u) exp(V(y[:t] + u) / scale), and label(u) = q(u) / the sum of
             q over u and all tokens less likely than u. Trying tokens in turn with these
             probabilities draws from q, the distribution with the most value for its distance to p.
             A token counts by that sum, as often as it is tried.

By ``average`` even a token that all but has to follow is rejected half of the time, for one that
hardly can; so ``ranked`` is the default.

The difference to MARA: there the network is an MLP on the language model's hidden state, trained by
reinforcement learning with the reward of whole responses; here it has a backbone of its own, so
that it runs wherever a reward model does, and is fitted to labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import make_demo_models
import numpy as np
import torch
from candidate_tokens import candidate_outputs, draw_positions, likely_tokens
from loading import load_classifier, load_lm
from make_demo_models import deterministic, epochs, fit, padded, save
from prompt_sets import training_prompts, tuning_prompts
from sampling import Sample, sample_responses
from settings_flags import parser_of, settings_of
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from stars_fast import StarsParams, demo


@dataclass(frozen=True)
class AcceptorSettings:
    """What is trained.

    Attributes
    ----------
    model
        Directory of the language model that draws and proposes.
    value
        Directory of the value model, which the acceptor starts from.
    seed
        Of the responses, the positions and the order of the data.
    prompts, samples_per_prompt, max_tokens
        Responses learned from: prompts (0: all), responses to each, and their longest.
    positions, alternatives
        Positions looked at in a response each time it is read, and tokens compared at each.
    temperature
        That the language model is sampled at.
    labels, scale
        ``"ranked"`` or ``"average"``, see above, and its unit of value.
    batch_size, rate, epochs
        Responses per step, peak learning rate, passes.
    """

    model: str = str(demo.model_dir())
    value: str = str(demo.reward_model_dir())
    seed: int = 0
    prompts: int = 0
    samples_per_prompt: int = 8
    max_tokens: int = 128
    positions: int = 8
    alternatives: int = 10
    temperature: float = 0.8
    labels: str = "ranked"
    scale: float = 0.2
    batch_size: int = 32
    rate: float = 1e-3
    epochs: int = 2


@dataclass(frozen=True)
class Comparison:
    """Candidate tokens of some positions of some texts, with their labels.

    Attributes
    ----------
    ids
        int64 [rows, width], padded on the right.
    positions
        int64 [rows, P].
    tokens, labels, weights
        [rows, P, k]; the weights of a position need not sum to 1.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor


def average_labels(
    values: torch.Tensor, probabilities: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and weights [..., k] of candidates with these values and probabilities [..., k]."""
    mean = (probabilities * values).sum(dim=-1, keepdim=True)
    return torch.sigmoid((values - mean) / scale), probabilities


def ranked_labels(
    values: torch.Tensor, probabilities: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for candidates in the order in which they are tried."""
    q = (probabilities.log() + values / scale).softmax(dim=-1)
    tried = q.flip(-1).cumsum(dim=-1).flip(-1)
    tiny = torch.finfo(q.dtype).tiny
    return q / tried.clamp(min=tiny), tried


LABELS = {"average": average_labels, "ranked": ranked_labels}


@torch.no_grad()
def compare(
    lm: LlamaForCausalLM,
    value: LlamaForSequenceClassification,
    samples: list[Sample],
    settings: AcceptorSettings,
    rng: np.random.Generator,
) -> Comparison:
    """Label the likeliest tokens at random positions of each response."""
    ids = padded([sample.ids for sample in samples])
    positions = draw_positions(
        [len(sample.prompt_ids) for sample in samples],
        [len(sample.ids) for sample in samples],
        settings.positions,
        rng,
    )
    tokens, probabilities = likely_tokens(
        lm, ids, positions, settings.alternatives, settings.temperature
    )
    values = candidate_outputs(value, ids, positions, tokens)
    labels, weights = LABELS[settings.labels](values, probabilities, settings.scale)
    return Comparison(ids, positions, tokens, labels, weights)


def accept_loss(model: LlamaForSequenceClassification, data: Comparison) -> torch.Tensor:
    """Cross-entropy of the labels, a mean over tokens by their weights."""
    logits = candidate_outputs(model, data.ids, data.positions, data.tokens)
    losses = binary_cross_entropy_with_logits(logits, data.labels, reduction="none")
    return (data.weights * losses).sum() / data.weights.sum()


@torch.no_grad()
def figures(model: LlamaForSequenceClassification, data: list[Comparison]) -> dict[str, float]:
    """How near the model is to the labels, and how often it decides as they do."""
    outputs = [candidate_outputs(model, one.ids, one.positions, one.tokens) for one in data]
    logits = torch.cat([one.flatten() for one in outputs])
    labels = torch.cat([one.labels.flatten() for one in data])
    weights = torch.cat([one.weights.flatten() for one in data])

    def mean(each: torch.Tensor) -> float:
        return float((weights * each).sum() / weights.sum())

    entropy = -torch.xlogy(labels, labels) - torch.xlogy(1 - labels, 1 - labels)
    losses = binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return {
        "loss": mean(losses),
        "least loss": mean(entropy),
        "mean label": mean(labels),
        "error of the probability (root mean square)": mean((logits.sigmoid() - labels) ** 2)
        ** 0.5,
        "same decision at one half": mean(((logits > 0) == (labels > 0.5)).float()),
    }


def train(settings: AcceptorSettings, out: Path) -> dict[str, float]:
    """Train and write a model to ``out``; return `figures` of checked responses.

    Raises
    ------
    ValueError
        If ``labels`` is unknown.
    """
    if settings.labels not in LABELS:
        raise ValueError(f"labels must be one of {', '.join(LABELS)}, got {settings.labels!r}")
    params = StarsParams(max_tokens=settings.max_tokens)
    prompts = training_prompts()[: settings.prompts or None]
    # Not the responses that the value model learned from: it knows how those end.
    samples = sample_responses(
        settings.model, prompts, settings.samples_per_prompt, seed=settings.seed + 2, params=params
    )
    checked = sample_responses(
        settings.model, tuning_prompts(), 2, seed=settings.seed + 3, params=params
    )
    lm, _ = load_lm(settings.model)
    value, tokenizer = load_classifier(settings.value)
    model, _ = load_classifier(settings.value)
    with deterministic(make_demo_models.Settings(seed=settings.seed)):
        torch.nn.init.zeros_(model.score.weight)  # values are no logits
        rng = np.random.default_rng(settings.seed)
        lengths = [len(sample.ids) for sample in samples]
        groups = epochs(lengths, settings.epochs, settings.batch_size, rng)

        def loss_of(group: list[int]) -> torch.Tensor:
            part = [samples[i] for i in group]
            return accept_loss(model, compare(lm, value, part, settings, rng))

        fit(model, groups, loss_of, settings.rate, "acceptor")
        save(model, tokenizer, out)
        check_rng = np.random.default_rng(settings.seed + 1)
        size = settings.batch_size
        parts = [checked[i : i + size] for i in range(0, len(checked), size)]
        return figures(model, [compare(lm, value, part, settings, check_rng) for part in parts])


def main() -> None:
    """Command line."""
    arguments = parser_of(__doc__, AcceptorSettings).parse_args()
    for name, value in train(settings_of(AcceptorSettings, arguments), arguments.out).items():
        print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main()
