"""A LoRA adapter's directory as reward model: merged into its base, or beside the language model's.

Where its base is the language model itself, there is one set of weights: the adapter's products are
added to the layers while rewards are computed. The head is the adapter's own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
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
from stars_fast.models.lora import LoraAdapter, LoraLayers
from stars_fast.models.quantize import quantize_model
from stars_fast.reward_head import RewardHead
from stars_fast.rewards.checkpoint import HEAD_FILES, Loading
from stars_fast.rewards.kinds import Loaded
from stars_fast.rewards.kinds.classifier import labelled, of_classifier
from stars_fast.rewards.kinds.language_model import of_language_model
from stars_fast.rewards.kinds.value_head import of_values
from stars_fast.rewards.labels import Readout, label_readout
from stars_fast.rewards.reading import LastToken

__all__ = ["adapts", "load_adapter"]

_log = logging.getLogger(__name__)

_CLASSES = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "CAUSAL_LM": AutoModelForCausalLM,
}
#: LLaMA-Factory's head, in its own file.
_VALUES = "v_head.summary."
#: The heads of transformers' classifiers.
_HEADS = ("score", "classifier")


def adapts(adapter: LoraAdapter, source: str | None) -> bool:
    """Whether an adapter's base is the model of a directory or hub id."""
    if source is None:
        return False
    if adapter.base == source:
        return True
    base, folder = Path(adapter.base), Path(source)
    return base.is_dir() and folder.is_dir() and base.samefile(folder)


def load_adapter(
    adapter: LoraAdapter,
    head: RewardHead,
    how: Loading,
    language_model: PreTrainedModel | None = None,
) -> tuple[Loaded, LoraLayers | None]:
    """Load an adapter's head, and put its pairs beside a model or into its base.

    Parameters
    ----------
    adapter : LoraAdapter
    head : RewardHead
        What the user asks for.
    how : Loading
    language_model : PreTrainedModel, optional
        Its base as a language model, loaded already. It is used as it is, unless the adapter
        changes more of it than linear layers of its backbone.

    Returns
    -------
    loaded : Loaded
    lora : LoraLayers or None
        What has to be active while its model runs; None where the pairs were merged.

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
    if language_model is not None:
        beside = adapter.beside(language_model, weights)
        layer = None if beside is None else _linear_head(beside[1], language_model)
        if beside is not None and task == "CAUSAL_LM" and not beside[1]:
            return _of_language_model(adapter, language_model, head, config), beside[0]
        if beside is not None and task != "CAUSAL_LM" and layer is not None:
            pad = None if task == "TOKEN_CLS" else config.get_text_config().pad_token_id
            readout = label_readout(head, config, len(layer["weight"]), adapter.name)
            return _of_classifier(language_model, layer, readout, pad), beside[0]
        _log.info("%s changes more than linear layers: its base is loaded again", adapter.name)
    whole = replace(how, quantize="none")  # until the adapter is merged into it
    model, report = whole.model(_CLASSES[task], adapter.base, config)
    missing = sorted(set(report["missing_keys"]) - weights.keys())
    if missing:
        raise ModelLoadError(
            f"neither {adapter.name} nor its base {adapter.base!r} has weights for "
            f"{', '.join(missing[:4])} of {type(model).__name__}"
        )
    adapter.merge(model, weights)
    if how.quantize == "int8":
        quantize_model(model)
    if task != "CAUSAL_LM":
        return of_classifier(model, head, adapter.name), None
    return _of_language_model(adapter, model, head, config), None


def _linear_head(
    whole: Mapping[str, Tensor], language_model: PreTrainedModel
) -> dict[str, Tensor] | None:
    """Return the weight, and perhaps the bias, of a linear head; None if that is not all."""
    name = next((name for name in _HEADS if f"{name}.weight" in whole), "")
    weight = whole.get(f"{name}.weight")
    if weight is None or weight.ndim != 2 or not whole.keys() <= {f"{name}.weight", f"{name}.bias"}:
        return None
    if weight.shape[1] != language_model.config.get_text_config().hidden_size:
        return None
    like = language_model.device, language_model.dtype
    return {key.removeprefix(f"{name}."): tensor.to(*like) for key, tensor in whole.items()}


def _of_classifier(
    language_model: PreTrainedModel,
    layer: Mapping[str, Tensor],
    readout: Readout,
    pad_token_id: int | None,
) -> Loaded:
    """Return how a classifier's linear head on the backbone of a language model is read."""

    def labels(hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, layer["weight"], layer.get("bias"))

    backbone = language_model.base_model
    assert isinstance(backbone, PreTrainedModel)
    reading = LastToken(labelled(labels, readout), pad_token_id)
    return Loaded(backbone, reading=lambda _: reading)


def _of_language_model(
    adapter: LoraAdapter, model: PreTrainedModel, head: RewardHead, config: PretrainedConfig
) -> Loaded:
    """Return how the reward of an adapted language model is read: by a value head, or a token."""
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
