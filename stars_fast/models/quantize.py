"""Models with 8-bit weights on a CPU, from those that have just been loaded.

Linear layers and the embedding of tokens become modules that hold packed bytes
(`stars_fast.ops.int8`); where the embedding is the output head as well, both hold the same. The
rest becomes float32, and so are hidden states.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from stars_fast.config import Quantize
from stars_fast.models.progress import bars_on_terminals_only
from stars_fast.ops.int8 import MOST_INPUTS, Int8Layer, int8_linear, quantize, weight_rows

__all__ = [
    "Int8Embedding",
    "Int8Linear",
    "Int8Module",
    "check_quantize",
    "joined",
    "quantize_model",
]


class Int8Module(nn.Module):
    """Holds a packed weight ``[rows, width]``."""

    def __init__(self, weight: nn.Parameter, scale: Tensor, width: int) -> None:
        super().__init__()
        #: Those of the weight, without what pads it.
        self.num_weights = len(scale) * width
        self.weight = weight  # uint8; see Int8Layer
        self.scale: Tensor
        self.register_buffer("scale", scale)


class Int8Linear(Int8Module):
    """A linear layer; input and output are float32 on a CPU."""

    def __init__(
        self, weight: nn.Parameter, scale: Tensor, in_features: int, bias: Tensor | None
    ) -> None:
        super().__init__(weight, scale, in_features)
        self.in_features = in_features
        self.out_features = len(scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), False)

    @property
    def layer(self) -> Int8Layer:
        """What the operator reads."""
        return Int8Layer(self.weight, self.scale, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``[..., out_features]`` of ``[..., in_features]``."""
        return int8_linear(input, (self.layer,))


class Int8Embedding(Int8Module):
    """An embedding whose rows are multiplied by `factor`."""

    def __init__(
        self, weight: nn.Parameter, scale: Tensor, embedding_dim: int, factor: float
    ) -> None:
        super().__init__(weight, scale, embedding_dim)
        self.num_embeddings = len(scale)
        self.embedding_dim = embedding_dim
        self.factor = factor

    def forward(self, input: Tensor) -> Tensor:
        """Return float32 ``[..., embedding_dim]`` of ids."""
        rows = weight_rows(Int8Layer(self.weight, self.scale), input, self.embedding_dim)
        return rows if self.factor == 1 else rows * self.factor


def joined(linears: Sequence[Int8Linear]) -> Callable[[Tensor], Sequence[Tensor]]:
    """Return what gives the results of layers of one input; they are parts of one tensor."""
    sizes = [linear.out_features for linear in linears]

    def product(x: Tensor) -> Sequence[Tensor]:
        return torch.split(int8_linear(x, [linear.layer for linear in linears]), sizes, dim=-1)

    return product


def check_quantize(
    quantize: Quantize, *, device: torch.device | str | None, num_ranks: int, name: str = "quantize"
) -> None:
    """Raise ValueError where weights cannot be quantised; `name` is the option's."""
    if quantize == "none":
        return
    if num_ranks > 1:
        raise ValueError(f"{name} must be 'none' with tensor_parallel=True, got {quantize!r}")
    if device is not None and torch.device(device).type != "cpu":
        raise ValueError(f"{name} must be 'none' for a model on {device}, got {quantize!r}")


@torch.no_grad()
def quantize_model(model: PreTrainedModel) -> None:
    """Give a model on a CPU 8-bit weights, in place: layer by layer, so that the old ones go.

    What is no plain linear layer of the backbone stays: convolutions, weights of experts, heads but
    the language model's. What has been quantised stays as it is.
    """
    backbone: nn.Module = model.base_model
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    wanted = {m for m in backbone.modules() if _is_linear(m)} | {embedding}
    if head is not None and _is_linear(head):
        wanted.add(head)
    packed: dict[nn.Parameter, tuple[nn.Parameter, Tensor]] = {}
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if child in wanted
    ]
    with bars_on_terminals_only():
        for parent, name, child in logging.tqdm(places, desc="Quantizing weights"):
            replaced = _quantized(child, packed)
            if replaced is not None:
                setattr(parent, name, replaced)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            # Copied in any case: a view of the file would keep all of it in memory.
            tensor.data = tensor.data.to(torch.float32, copy=True)


def _is_linear(module: nn.Module) -> bool:
    if type(module) is nn.Linear:
        return module.in_features <= MOST_INPUTS
    return type(module) is Conv1D and len(module.weight) <= MOST_INPUTS


def _quantized(
    module: nn.Module, packed: dict[nn.Parameter, tuple[nn.Parameter, Tensor]]
) -> nn.Module | None:
    """Return a module's replacement; None if it has none."""
    weight = module.weight
    factor = None if _is_linear(module) else _factor(module)
    if not isinstance(weight, nn.Parameter) or not (_is_linear(module) or factor):
        return None
    if weight not in packed:
        rows = weight.T if isinstance(module, Conv1D) else weight
        layer = quantize(rows)
        packed[weight] = nn.Parameter(layer.packed, requires_grad=False), layer.scale
    inputs = weight.shape[0 if isinstance(module, Conv1D) else 1]
    if factor is not None:
        return Int8Embedding(*packed[weight], inputs, factor)
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor)
    return Int8Linear(*packed[weight], inputs, bias)


def _factor(module: nn.Module) -> float | None:
    """By what an embedding multiplies its rows; None if it does anything else."""
    if not isinstance(module, nn.Embedding):
        return None
    few = copy.copy(module)
    few._parameters = {**module._parameters, "weight": nn.Parameter(module.weight[:8].float())}
    few.num_embeddings, few.padding_idx = len(few.weight), None
    ids = torch.arange(len(few.weight))
    plain, got = F.embedding(ids, few.weight), few(ids)
    factor = float((got * plain).sum() / plain.square().sum())
    return factor if torch.allclose(got, plain * factor, rtol=1e-6, atol=0) else None
