"""A LoRA adapter's directory as reward model: its base with the adapter merged into it.

Weights are W + (alpha / r) B A (arXiv 2106.09685), alpha / sqrt(r) with rank-stabilised LoRA; the
head is the adapter's own. What peft writes beyond that is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from stars_fast.errors import ModelLoadError, UnsupportedModelError
from stars_fast.models.load import check_model_directory, read_json
from stars_fast.reward_head import RewardHead
from stars_fast.rewards.checkpoint import CALLABLE_ADVICE, HEAD_FILES, Loading
from stars_fast.rewards.kinds import Loaded
from stars_fast.rewards.kinds.classifier import of_classifier
from stars_fast.rewards.kinds.language_model import of_language_model
from stars_fast.rewards.kinds.value_head import of_values
from stars_fast.rewards.labels import label_readout

__all__ = ["Adapter"]

_CLASSES = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "CAUSAL_LM": AutoModelForCausalLM,
}
_PREFIX = "base_model.model."
#: LLaMA-Factory's head, in its own file.
_VALUES = "v_head.summary."
#: Options of peft under which a weight is more than W + s B A.
_MORE = (
    "use_dora", "use_qalora", "use_bdlora", "alpha_pattern", "layer_replication", "lora_bias",
    "alora_invocation_tokens", "trainable_token_indices", "target_parameters",
)  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """What a directory with an ``adapter_config.json`` holds.

    Parameters
    ----------
    folder : Path
    base : str
        Directory or hub id of the model that it adapts.
    fields : mapping
        Its configuration.
    """

    folder: Path
    base: str
    fields: Mapping[str, Any]

    @classmethod
    def find(cls, source: str) -> Adapter | None:
        """Return the adapter in a directory; None if it holds a model, or is none.

        Raises
        ------
        UnsupportedModelError
            If it is no plain LoRA, or of a task without rewards.
        ModelLoadError
            If its configuration cannot be read or does not name a base.
        """
        folder = Path(source)
        path = folder / "adapter_config.json"
        if not source or not path.is_file() or (folder / "config.json").exists():
            return None
        fields = read_json(path)
        name = f"adapter {source!r}"
        if fields.get("peft_type") != "LORA" or fields.get("bias", "none") != "none":
            raise UnsupportedModelError(
                f"{name} is {fields.get('peft_type')} with bias={fields.get('bias')!r}; only LORA "
                f"with bias='none' is read: merge it into its base, or {CALLABLE_ADVICE}"
            )
        more = [option for option in _MORE if fields.get(option)]
        if more:
            raise UnsupportedModelError(
                f"{name} has {', '.join(more)} set, which is more than a plain LoRA: merge it into "
                f"its base, or {CALLABLE_ADVICE}"
            )
        if fields.get("task_type") not in _CLASSES:
            raise UnsupportedModelError(
                f"{name} has task_type {fields.get('task_type')!r}; one of {', '.join(_CLASSES)} "
                "is needed"
            )
        base = fields.get("base_model_name_or_path")
        if not base:
            raise ModelLoadError(f"{name} does not name its base: set base_model_name_or_path")
        return cls(folder, str(base), fields)

    @property
    def name(self) -> str:
        """What it is called in errors."""
        return f"adapter {str(self.folder)!r}"

    @property
    def tokenizer_source(self) -> str:
        """Where its tokenizer is: beside it, or beside its base."""
        own = (self.folder / "tokenizer_config.json").is_file()
        return str(self.folder) if own else self.base

    def load(self, head: RewardHead, how: Loading) -> Loaded:
        """Load the base and merge the adapter into it.

        Raises
        ------
        ModelLoadError
            If a file is missing, or its weights do not fit the base.
        UnsupportedModelError, ValueError
            As of a model of that kind.
        """
        try:
            check_model_directory(self.base, allow_pickle=how.allow_pickle)
            config: PretrainedConfig = AutoConfig.from_pretrained(
                self.base, trust_remote_code=False
            )
        except (ModelLoadError, OSError, ValueError) as error:
            raise ModelLoadError(f"the base of {self.name}: {error}") from error
        weights = {
            name.removeprefix(_PREFIX): tensor
            for name, tensor in self._read("adapter_model.safetensors").items()
        }
        labels = weights.get("score.weight", weights.get("classifier.weight"))
        if labels is not None:
            config.num_labels = len(labels)
        model, report = how.model(_CLASSES[self.fields["task_type"]], self.base, config)
        missing = sorted(set(report["missing_keys"]) - weights.keys())
        if missing:
            raise ModelLoadError(
                f"neither {self.name} nor its base {self.base!r} has weights for "
                f"{', '.join(missing[:4])} of {type(model).__name__}"
            )
        self._merge(model, weights)
        if self.fields["task_type"] != "CAUSAL_LM":
            return of_classifier(model, head, self.name)
        file = next((name for name in HEAD_FILES if (self.folder / name).is_file()), None)
        if file is None or head.of_tokens:
            return of_language_model(model, head, self.name)
        layer = {
            name.removeprefix(_VALUES): tensor.to(model.device, torch.float32)
            for name, tensor in self._read(file).items()
        }
        if "weight" not in layer:
            raise ModelLoadError(f"{file} of {self.name} lacks {_VALUES}weight")
        readout = label_readout(head, config, len(layer["weight"]), self.name)
        backbone = model.base_model
        assert isinstance(backbone, PreTrainedModel)
        return of_values(backbone, layer, readout)

    def _read(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self.folder / name)
        except (OSError, SafetensorError) as error:
            raise ModelLoadError(f"{self.name}: {name} cannot be read: {error}") from error

    @torch.no_grad()
    def _merge(self, model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
        """Add the products of each pair, and put whole weights in place."""
        parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
        rest = dict(weights)
        for name in [name for name in weights if name.endswith(".lora_A.weight")]:
            path = name.removesuffix(".lora_A.weight")
            down, up = rest.pop(name), rest.pop(f"{path}.lora_B.weight", None)
            target, module = parameters.get(f"{path}.weight"), modules.get(path)
            if up is None or target is None or isinstance(module, nn.Embedding):
                raise ModelLoadError(
                    f"{self.name} adapts {path}, which {type(model).__name__} of its base "
                    f"{self.base!r} does not have so"
                )
            change = self._scale(len(down)) * up.float() @ down.float()
            if isinstance(module, Conv1D):  # transposed
                change = change.T
            if change.shape != target.shape:
                raise ModelLoadError(
                    f"{self.name} changes {path} by {tuple(change.shape)}, and its base "
                    f"{self.base!r} has {tuple(target.shape)} there"
                )
            target.add_(change.to(target.device, target.dtype))
        for name, value in rest.items():
            target = parameters.get(name)
            if target is None or target.shape != value.shape:
                raise ModelLoadError(
                    f"{self.name} has {name} {tuple(value.shape)}, which {type(model).__name__} of "
                    f"its base {self.base!r} does not have so"
                )
            target.copy_(value)

    def _scale(self, rank: int) -> float:
        alpha = float(self.fields.get("lora_alpha", 8))
        return alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)
