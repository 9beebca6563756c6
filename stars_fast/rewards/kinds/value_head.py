"""A linear layer at every token, read at the last one: value heads, and score heads like them.

TRL's ``AutoModelForCausalLMWithValueHead`` and LLaMA-Factory's (``v_head.summary``, the latter in a
file of its own), OpenRLHF's (``value_head`` or ``score``), safe-rlhf's reward and cost models
(``score_head``), UltraRM and Eurus-RM (``regression_head``). The last token is any, padding and EOS
not excepted: those texts have no padding behind them here.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from stars_fast.errors import UnsupportedModelError
from stars_fast.reward_head import RewardHead
from stars_fast.rewards.checkpoint import CALLABLE_ADVICE, Checkpoint, Loading
from stars_fast.rewards.kinds.base import Kind, Loaded
from stars_fast.rewards.kinds.classifier import is_encoder, labelled
from stars_fast.rewards.labels import Readout, label_readout
from stars_fast.rewards.reading import LastToken

__all__ = ["VALUE_HEAD", "of_values"]

_PREFIXES = (
    "v_head.summary.",
    "v_head.",
    "value_head.",
    "score_head.",
    "regression_head.",
    "reward_head.",
    "score.",
)
#: Whose own code, beside the weights, is no more than this.
_KNOWN = frozenset({"EurusRewardModel", "LlamaRewardModel", "RewardModel", "CriticModel"})
_NATIVE = frozenset(
    {
        *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values(),
        *MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values(),
    }
)


def _prefix(checkpoint: Checkpoint) -> str | None:
    """Return where the linear layer is, if there is one."""
    size = checkpoint.config.get_text_config().hidden_size
    for prefix in _PREFIXES:
        shapes = checkpoint.starting_with(prefix)
        weight = shapes.pop("weight", ())
        if len(weight) == 2 and weight[1] == size and shapes in ({}, {"bias": weight[:1]}):
            return prefix
    return None


def _fits(checkpoint: Checkpoint, head: RewardHead) -> bool:
    if checkpoint.architecture in _NATIVE or head.of_tokens:
        return False
    trusted = not checkpoint.remote_code or checkpoint.architecture in _KNOWN
    return trusted and _prefix(checkpoint) is not None


def _load(checkpoint: Checkpoint, head: RewardHead, how: Loading) -> Loaded:
    prefix = _prefix(checkpoint)
    assert prefix is not None
    if is_encoder(checkpoint.config):
        raise UnsupportedModelError(
            f"{checkpoint.name} has a value head on a bidirectional {checkpoint.architecture}: "
            f"{CALLABLE_ADVICE}"
        )
    if getattr(checkpoint.config, "do_normalize", False):
        raise UnsupportedModelError(
            f"{checkpoint.name} normalizes its scores (do_normalize in its config.json), which is "
            "not done here: set it to false for the scores as they are"
        )
    labels = checkpoint.shapes[prefix + "weight"][0]
    readout = label_readout(head, checkpoint.config, labels, checkpoint.name)
    model = checkpoint.backbone(how, (prefix,))
    return of_values(model, checkpoint.tensors(prefix, model.device), readout)


def of_values(model: PreTrainedModel, layer: Mapping[str, Tensor], readout: Readout) -> Loaded:
    """Return how a linear layer at the last token is read.

    Parameters
    ----------
    model : PreTrainedModel
        The backbone.
    layer : mapping of str to Tensor
        ``weight`` [L, hidden] and perhaps ``bias`` [L], float32.
    readout : Readout
        From its outputs to rewards.
    """

    def values(hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.float(), layer["weight"], layer.get("bias"))

    reading = LastToken(labelled(values, readout), None)
    return Loaded(model, reading=lambda _: reading)


VALUE_HEAD = Kind("value head", _fits, _load)
