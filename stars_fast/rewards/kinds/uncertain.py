"""URM (arXiv 2410.00847): means of attributes, summed by weights that the hidden state gives.

`score` has two outputs for each attribute, its mean and the logarithm of its spread; the reward
takes the means. ``weights.fc`` is Linear, SELU, Linear, SELU, Linear.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from stars_fast.reward_head import RewardHead
from stars_fast.rewards.checkpoint import Checkpoint, Loading
from stars_fast.rewards.kinds.base import Kind, Loaded
from stars_fast.rewards.kinds.classifier import labelled
from stars_fast.rewards.labels import label_readout
from stars_fast.rewards.reading import LastToken

__all__ = ["UNCERTAIN"]

_SCORE, _WEIGHTS = "score.", "weights.fc."


def _fits(checkpoint: Checkpoint, _: RewardHead) -> bool:
    score = checkpoint.starting_with(_SCORE)
    layers = checkpoint.starting_with(_WEIGHTS)
    named = {name for name in layers if re.fullmatch(r"[024]\.(weight|bias)", name)}
    attributes = layers.get("4.weight", (0,))[0]
    return (
        attributes > 0
        and named == layers.keys()
        and score.keys() <= {"weight", "bias"}
        and score.get("weight", (0,))[0] == 2 * attributes
    )


def _load(checkpoint: Checkpoint, head: RewardHead, how: Loading) -> Loaded:
    attributes = checkpoint.shapes[_WEIGHTS + "4.weight"][0]
    readout = None
    if head.is_asked:  # labels are the attributes' means
        readout = label_readout(head, checkpoint.config, attributes, checkpoint.name)
    model = checkpoint.backbone(how, (_SCORE, _WEIGHTS))
    score = checkpoint.tensors(_SCORE, model.device)
    layers = checkpoint.tensors(_WEIGHTS, model.device)

    def means(hidden: Tensor) -> Tensor:
        both = nn.functional.linear(hidden.float(), score["weight"], score.get("bias"))
        return both[:, ::2]

    def weighted(hidden: Tensor) -> Tensor:
        inner = hidden.float()
        for number in (0, 2, 4):
            weight, bias = layers[f"{number}.weight"], layers.get(f"{number}.bias")
            inner = nn.functional.linear(inner if number == 0 else nn.functional.selu(inner),
                                         weight, bias)  # fmt: skip
        return (means(hidden) * inner).sum(dim=1)

    reward = weighted if readout is None else labelled(means, readout)
    reading = LastToken(reward, model.config.get_text_config().pad_token_id)
    return Loaded(model, reading=lambda _: reading)


UNCERTAIN = Kind("attributes with weights (URM)", _fits, _load)
