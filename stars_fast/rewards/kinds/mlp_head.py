"""Linear, ReLU, Linear on the last hidden state: INF-ORM, Qwen2.5-Math-RM, GRM.

Weights do not say what stands between two layers, so these are known by name.
"""

from __future__ import annotations

from torch import Tensor, nn

from stars_fast.reward_head import RewardHead
from stars_fast.rewards.checkpoint import Checkpoint, Loading
from stars_fast.rewards.kinds.base import Kind, Loaded
from stars_fast.rewards.kinds.classifier import labelled
from stars_fast.rewards.labels import label_readout
from stars_fast.rewards.reading import LastToken

__all__ = ["MLP_HEAD"]

#: Classes whose `score` is Linear, ReLU, Linear; their labels are read before padding.
_SCORES = frozenset(
    {"INFORMForSequenceClassification", "Qwen2ForRewardModel", "Qwen2ForProcessRewardModel"}
)
#: GRM's value head, the only one of these names.
_VALUES = "v_head.summary."


def _prefix(checkpoint: Checkpoint) -> str | None:
    """Return where the two layers are, if they are there."""
    candidates = [_VALUES, *(["score."] if checkpoint.architecture in _SCORES else [])]
    for prefix in candidates:
        shapes = checkpoint.starting_with(prefix)
        first, second = (shapes.get(f"{number}.weight", ()) for number in (0, 2))
        known = {f"{number}.{name}" for number in (0, 2) for name in ("weight", "bias")}
        if len(first) == len(second) == 2 and first[0] == second[1] and shapes.keys() <= known:
            return prefix
    return None


def _load(checkpoint: Checkpoint, head: RewardHead, how: Loading) -> Loaded:
    prefix = _prefix(checkpoint)
    assert prefix is not None
    labels = checkpoint.shapes[prefix + "2.weight"][0]
    readout = label_readout(head, checkpoint.config, labels, checkpoint.name)
    model = checkpoint.backbone(how, (prefix,))
    weights = checkpoint.tensors(prefix, model.device)

    def score(hidden: Tensor) -> Tensor:
        inner = nn.functional.linear(hidden.float(), weights["0.weight"], weights.get("0.bias"))
        return nn.functional.linear(inner.relu(), weights["2.weight"], weights.get("2.bias"))

    pad = None if prefix == _VALUES else model.config.get_text_config().pad_token_id
    reading = LastToken(labelled(score, readout), pad)
    return Loaded(model, reading=lambda _: reading)


MLP_HEAD = Kind("two-layer head", lambda checkpoint, _: _prefix(checkpoint) is not None, _load)
