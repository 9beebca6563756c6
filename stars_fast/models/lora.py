"""LoRA adapters in peft's files, merged into their base or applied beside it.

Weights are W + (alpha / r) B A (arXiv 2106.09685), alpha / sqrt(r) with rank-stabilised LoRA. What
peft writes beyond that is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stars_fast.errors import ModelLoadError, UnsupportedModelError
from stars_fast.models.files import read_json
from stars_fast.models.quantize import Int8Linear

__all__ = ["LoraAdapter", "LoraLayers"]

_PREFIX = "base_model.model."
#: Options of peft under which a weight is more than W + s B A.
_MORE = (
    "use_dora", "use_qalora", "use_bdlora", "alpha_pattern", "layer_replication", "lora_bias",
    "alora_invocation_tokens", "trainable_token_indices", "target_parameters",
)  # fmt: skip


@dataclass(frozen=True)
class LoraAdapter:
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
    def find(cls, source: str) -> LoraAdapter | None:
        """Return the adapter in a directory; None if it holds a model, or is none.

        Raises
        ------
        UnsupportedModelError
            If it is no plain LoRA.
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
                "with bias='none' is read: merge it into its base, and give the merged model"
            )
        more = [option for option in _MORE if fields.get(option)]
        if more:
            raise UnsupportedModelError(
                f"{name} has {', '.join(more)} set, which is more than a plain LoRA: merge it into "
                "its base, and give the merged model"
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

    def weights(self) -> dict[str, Tensor]:
        """Return its weights, by their names in the base.

        Raises
        ------
        ModelLoadError
            If the file is missing or damaged.
        """
        read = self.read("adapter_model.safetensors")
        return {name.removeprefix(_PREFIX): tensor for name, tensor in read.items()}

    def read(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one of its files; ModelLoadError if that cannot be read."""
        try:
            return load_file(self.folder / name)
        except (OSError, SafetensorError) as error:
            raise ModelLoadError(f"{self.name}: {name} cannot be read: {error}") from error

    @torch.no_grad()
    def merge(self, model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
        """Add the products of each pair to the base's weights, and put whole weights in place.

        Raises
        ------
        ModelLoadError
            If it adapts what the base does not have.
        """
        parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
        pairs, rest = self._pairs(weights)
        for path, (down, up) in pairs.items():
            target, module = parameters.get(f"{path}.weight"), modules.get(path)
            if target is None or isinstance(module, nn.Embedding):
                raise ModelLoadError(
                    f"{self.name} adapts {path}, which {type(model).__name__} of its base "
                    f"{self.base!r} does not have so"
                )
            change = up @ down
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

    @torch.no_grad()
    def beside(
        self, model: PreTrainedModel, weights: Mapping[str, Tensor]
    ) -> tuple[LoraLayers, dict[str, Tensor]] | None:
        """Return its layers beside those of a model that stays as it is, and its whole weights.

        None where a pair adapts anything but a linear layer of the model's backbone.

        Raises
        ------
        ModelLoadError
            If half of a pair is missing.
        """
        pairs, rest = self._pairs(weights)
        modules = dict(model.named_modules())
        inside = {*model.base_model.modules()}
        layers = []
        for path, (down, up) in pairs.items():
            module = modules.get(path)
            if module not in inside or not isinstance(module, nn.Linear | Conv1D | Int8Linear):
                return None
            like = module.weight
            shape = tuple(like.shape[::-1] if isinstance(module, Conv1D) else like.shape)
            if isinstance(module, Int8Linear):
                like, shape = module.scale, (module.out_features, module.in_features)
            if (len(up), down.shape[1]) != shape or not like.is_floating_point():
                return None
            layers.append(_Layer(module, down.to(like), up.to(like)))
        return LoraLayers(tuple(layers)), rest

    def _pairs(
        self, weights: Mapping[str, Tensor]
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
        """Return A and (alpha / r) B by path, in float32, and the weights that are of no pair."""
        pairs, rest = {}, dict(weights)
        for name in [name for name in weights if name.endswith(".lora_A.weight")]:
            path = name.removesuffix(".lora_A.weight")
            down, up = rest.pop(name), rest.pop(f"{path}.lora_B.weight", None)
            if up is None:
                raise ModelLoadError(f"{self.name} adapts {path} by lora_A without lora_B")
            pairs[path] = down.float(), self._scale(len(down)) * up.float()
        return pairs, rest

    def _scale(self, rank: int) -> float:
        alpha = float(self.fields.get("lora_alpha", 8))
        return alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)


@dataclass(frozen=True)
class _Layer:
    module: nn.Module
    down: Tensor  # A [r, in]
    up: Tensor  # (alpha / r) B [out, r]

    def forward(self, base: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return the layer's forward with the pair's product added: W x + (alpha / r) B A x."""
        linear = nn.functional.linear

        def forward(input: Tensor) -> Tensor:
            return base(input) + linear(linear(input, self.down), self.up)

        return forward


@dataclass(frozen=True)
class LoraLayers:
    """Pairs of an adapter beside linear layers of a model, which they change only while `active`.

    The model's weights are neither copied nor written.
    """

    layers: tuple[_Layer, ...]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Add each pair to its layer's forward, whatever that is now, for the time of a pass."""
        before = [layer.module.__dict__.get("forward") for layer in self.layers]
        for layer in self.layers:
            # Past nn.Module.__setattr__, which is slow and meant for parameters.
            layer.module.__dict__["forward"] = layer.forward(layer.module.forward)
        try:
            yield
        finally:
            for layer, forward in zip(self.layers, before, strict=True):
                if forward is None:
                    del layer.module.__dict__["forward"]
                else:
                    layer.module.__dict__["forward"] = forward
