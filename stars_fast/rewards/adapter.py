"""A LoRA adapter's directory as reward model: its base with the adapter merged into it.

The head is the adapter's own.
"""

from __future__ import annotations

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from stars_fast.errors import ModelLoadError, UnsupportedModelError
from stars_fast.models.files import check_model_directory
from stars_fast.models.lora import LoraAdapter
from stars_fast.reward_head import RewardHead
from stars_fast.rewards.checkpoint import HEAD_FILES, Loading
from stars_fast.rewards.kinds import Loaded
from stars_fast.rewards.kinds.classifier import of_classifier
from stars_fast.rewards.kinds.language_model import of_language_model
from stars_fast.rewards.kinds.value_head import of_values
from stars_fast.rewards.labels import label_readout

__all__ = ["load_adapter"]

_CLASSES = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "CAUSAL_LM": AutoModelForCausalLM,
}
#: LLaMA-Factory's head, in its own file.
_VALUES = "v_head.summary."


def load_adapter(adapter: LoraAdapter, head: RewardHead, how: Loading) -> Loaded:
    """Load the base and merge the adapter into it.

    Raises
    ------
    ModelLoadError
        If a file is missing, or its weights do not fit the base.
    UnsupportedModelError, ValueError
        As of a model of that kind.
    """
    task = adapter.fields.get("task_type")
    if task not in _CLASSES:
        raise UnsupportedModelError(
            f"{adapter.name} has task_type {task!r}; one of {', '.join(_CLASSES)} is needed"
        )
    try:
        check_model_directory(adapter.base, allow_pickle=how.allow_pickle)
        config: PretrainedConfig = AutoConfig.from_pretrained(adapter.base, trust_remote_code=False)
    except (ModelLoadError, OSError, ValueError) as error:
        raise ModelLoadError(f"the base of {adapter.name}: {error}") from error
    weights = adapter.weights()
    labels = weights.get("score.weight", weights.get("classifier.weight"))
    if labels is not None:
        config.num_labels = len(labels)
    model, report = how.model(_CLASSES[task], adapter.base, config)
    missing = sorted(set(report["missing_keys"]) - weights.keys())
    if missing:
        raise ModelLoadError(
            f"neither {adapter.name} nor its base {adapter.base!r} has weights for "
            f"{', '.join(missing[:4])} of {type(model).__name__}"
        )
    adapter.merge(model, weights)
    if task != "CAUSAL_LM":
        return of_classifier(model, head, adapter.name)
    file = next((name for name in HEAD_FILES if (adapter.folder / name).is_file()), None)
    if file is None or head.of_tokens:
        return of_language_model(model, head, adapter.name)
    layer = {
        name.removeprefix(_VALUES): tensor.to(model.device, torch.float32)
        for name, tensor in adapter.read(file).items()
    }
    if "weight" not in layer:
        raise ModelLoadError(f"{file} of {adapter.name} lacks {_VALUES}weight")
    readout = label_readout(head, config, len(layer["weight"]), adapter.name)
    backbone = model.base_model
    assert isinstance(backbone, PreTrainedModel)
    return of_values(backbone, layer, readout)
