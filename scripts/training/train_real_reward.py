"""A reward model from a real chat model: Bradley-Terry on a noisy judge's choices, prefixes too.

    python scripts/training/train_real_reward.py --model LM_DIR --samples samples.jsonl --out DIR

The classifier's backbone is the language model's, of which the last ``--trained-layers`` layers and
the head are trained: the others run once over every response, and what they give is kept. All
responses to a chat run once a pass, and every two of them are compared at their ends and at
``--cuts`` random places, as large a share of both: the engine asks for rewards of prefixes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from make_demo_models import epochs, fit
from real_pairs import Preference, Response, preferences, read
from settings_flags import parser_of, settings_of
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

CHECKED_SHARES = (0.25, 0.5, 0.75, 1.0)  # of a response


@dataclass(frozen=True)
class RewardSettings:
    """What is trained.

    Attributes
    ----------
    model, samples
        Directory of the chat model, and the file that `real_pairs` wrote.
    seed
        Of the judge, the cuts and the order.
    layers
        Of the language model that the reward model has; 0: all.
    trained_layers
        The last so many of these are trained.
    cuts
        Places at which two responses are compared, beside their ends.
    batch_size, rate, epochs
        Chats a step, peak learning rate, passes.
    """

    model: str = ""
    samples: str = ""
    seed: int = 0
    layers: int = 0
    trained_layers: int = 8
    cuts: int = 3
    batch_size: int = 2
    rate: float = 1e-4
    epochs: int = 2


class SplitModel:
    """A classifier whose lower layers run once over each response, and keep what they gave.

    Attributes
    ----------
    classifier
        The whole.
    """

    def __init__(self, classifier: PreTrainedModel, trained_layers: int) -> None:
        self.classifier = classifier
        self._backbone = classifier.model
        self._layers, self._norm = self._backbone.layers, self._backbone.norm
        self._below = len(self._layers) - trained_layers
        self._kept: dict[tuple[int, ...], torch.Tensor] = {}

    def hidden(self, responses: Sequence[Response]) -> torch.Tensor:
        """Last hidden states [rows, width, hidden] of prompts with responses, padded behind."""
        rows = [tuple(response.prompt_ids + response.ids) for response in responses]
        for row in rows:
            if row not in self._kept:
                self._kept[row] = self._lower(row)
        lower = pad_sequence([self._kept[row] for row in rows], batch_first=True)
        with self._only(self._layers[self._below :], self._norm):  # no real token sees the padding
            hidden: torch.Tensor = self._backbone(
                inputs_embeds=lower, use_cache=False
            ).last_hidden_state
        return hidden

    @torch.no_grad()
    def _lower(self, row: tuple[int, ...]) -> torch.Tensor:
        with self._only(self._layers[: self._below], torch.nn.Identity()):
            output = self._backbone(input_ids=torch.tensor([row]), use_cache=False)
        lower: torch.Tensor = output.last_hidden_state[0]
        return lower

    @contextmanager
    def _only(self, layers: torch.nn.ModuleList, norm: torch.nn.Module) -> Iterator[None]:
        self._backbone.layers, self._backbone.norm = layers, norm
        try:
            yield
        finally:
            self._backbone.layers, self._backbone.norm = self._layers, self._norm


def load(settings: RewardSettings) -> SplitModel:
    """The classifier to train: a new head of zeros, only the last layers with a gradient.

    Raises
    ------
    ValueError
        If more layers are asked for than the model has.
    """
    model = AutoModelForSequenceClassification.from_pretrained(
        settings.model, num_labels=1, dtype=torch.float32
    )
    layers = model.model.layers
    kept = settings.layers or len(layers)
    if not 1 <= settings.trained_layers <= kept <= len(layers):
        raise ValueError(
            f"1 <= trained_layers <= layers <= {len(layers)} must hold, "
            f"got {settings.trained_layers} and {kept}"
        )
    model.model.layers = layers[:kept]
    model.config.num_hidden_layers = kept
    model.requires_grad_(False)
    for part in (*model.model.layers[-settings.trained_layers :], model.model.norm, model.score):
        part.requires_grad_(True)
    torch.nn.init.zeros_(model.score.weight)
    return SplitModel(model, settings.trained_layers)


def rewards_at(
    model: SplitModel, responses: Sequence[Response], ends: torch.Tensor
) -> torch.Tensor:
    """Rewards [rows, places] of responses cut behind ``ends`` [rows, places] of their tokens."""
    hidden = model.hidden(responses)
    places = ends + torch.tensor([[len(response.prompt_ids) - 1] for response in responses])
    picked = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
    rewards: torch.Tensor = model.classifier.score(picked)[..., 0]
    return rewards


def differences(
    model: SplitModel, pairs: Sequence[Preference], shares: Sequence[float]
) -> torch.Tensor:
    """How much higher the chosen one's reward is after ``shares`` of both, [pairs, shares].

    Each response runs once, in however many pairs it is.
    """
    numbers: dict[int, int] = {}
    responses: list[Response] = []
    for response in (one for pair in pairs for one in (pair.chosen, pair.rejected)):
        if id(response) not in numbers:
            numbers[id(response)] = len(responses)
            responses.append(response)
    lengths = torch.tensor([[len(response.ids)] for response in responses])
    ends = (torch.tensor([list(shares)]) * lengths).ceil().long().clamp(min=1)
    rewards = rewards_at(model, responses, ends)
    chosen, rejected = (
        [numbers[id(getattr(pair, side))] for pair in pairs] for side in ("chosen", "rejected")
    )
    return rewards[chosen] - rewards[rejected]


@torch.no_grad()
def right(model: SplitModel, pairs: Sequence[Preference]) -> dict[str, float]:
    """Shares of pairs whose chosen response has the higher reward, by the share that is read."""
    chats = itertools.groupby(pairs, key=lambda pair: pair.chosen.prompt)
    parts = [differences(model, list(group), CHECKED_SHARES) > 0 for _, group in chats]
    means = torch.cat(parts).float().mean(0).tolist()
    return {
        f"pairs right at {share:.0%}": mean
        for share, mean in zip(CHECKED_SHARES, means, strict=True)
    }


def train(settings: RewardSettings, out: Path) -> dict[str, float]:
    """Train and write a reward model; return what was measured on held-out prompts."""
    responses = [one for one in read(Path(settings.samples)) if one.ids]
    pairs = preferences([one for one in responses if not one.held_out], settings.seed)
    checked = preferences([one for one in responses if one.held_out], settings.seed + 1)
    chats = [list(group) for _, group in itertools.groupby(pairs, key=lambda p: p.chosen.prompt)]
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    model = load(settings)

    def loss_of(group: list[int]) -> torch.Tensor:
        losses = [
            -logsigmoid(differences(model, chats[i], [1.0, *rng.random(settings.cuts)])).mean()
            for i in group
        ]
        return torch.stack(losses).mean()

    groups = epochs([1] * len(chats), settings.epochs, settings.batch_size, rng)
    fit(model.classifier, groups, loss_of, settings.rate, "reward model")
    model.classifier.eval()
    model.classifier.save_pretrained(out)
    AutoTokenizer.from_pretrained(settings.model).save_pretrained(out)
    by_gold = [p for p in checked if abs(p.chosen.gold - p.rejected.gold) > 0.2]
    agreed = [float(p.chosen.gold > p.rejected.gold) for p in by_gold]
    return {
        "pairs": len(pairs),
        "held-out pairs": len(checked),
        "the judge agrees with gold": float(np.mean(agreed)),
        **right(model, checked),
    }


def main() -> None:
    """Command line."""
    arguments = parser_of(__doc__, RewardSettings).parse_args()
    for name, value in train(settings_of(RewardSettings, arguments), arguments.out).items():
        print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main()
