"""Models of ours with packed weights alone: what they were packed from is freed.

A linear layer of a float32 model on a CPU runs on a copy of its weight in oneDNN's layout
(`stars_fast.models.linear`). A model that was loaded here is nobody else's, so that its layers can
do without the originals. A model that a user has loaded keeps them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stars_fast.models.linear import fits, pack
from stars_fast.models.machine import release_file_pages, trim_heap

__all__ = ["GATE_UP", "QKV", "PackedGroup", "PackedLinear", "group_of", "ours", "pack_model"]
__all__ += ["theirs"]

#: Layers that read one input, by their names in a module.
QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")

_OURS: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def ours(model: PreTrainedModel) -> None:
    """Say that a model, and the models inside it, were loaded here and are nobody else's."""
    _OURS.update(_models(model))


def theirs(model: PreTrainedModel) -> None:
    """Say that a user holds a model."""
    for one in _models(model):
        _OURS.discard(one)


def _models(model: PreTrainedModel) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, PreTrainedModel))


class PackedGroup:
    """The weights of layers that read one input, packed as those of one layer.

    Parameters
    ----------
    linears : sequence of nn.Linear
        Each of which `fits`. They are not changed here.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        weights = [linear.weight.detach() for linear in linears]
        biases = [linear.bias for linear in linears]
        self._sizes = [len(weight) for weight in weights]
        self._weight = pack(weights[0] if len(weights) == 1 else torch.cat(weights))
        self._bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            self._bias = torch.cat(
                [
                    weight.new_zeros(len(weight)) if bias is None else bias.detach()
                    for weight, bias in zip(weights, biases, strict=True)
                ]
            )
        #: What the layers still to run have of an input that another was given first.
        self._parts: dict[int, Tensor] = {}
        self._input: weakref.ref[Tensor] | None = None

    def product(self, x: Tensor) -> Sequence[Tensor]:
        """Return each layer's result, parts of one tensor."""
        linear = torch.ops.mkldnn._linear_pointwise.default
        out: Tensor = linear(x, self._weight, self._bias, "none", [], "")
        return torch.split(out, self._sizes, dim=-1)

    def part(self, index: int, x: Tensor) -> Tensor:
        """Return one layer's result; the others are kept until they are asked for, once each."""
        if len(self._sizes) == 1:
            return self.product(x)[0]
        if self._input is None or self._input() is not x or index not in self._parts:
            self._parts = dict(enumerate(self.product(x)))
            self._input = weakref.ref(x)
        part = self._parts.pop(index).contiguous()
        if not self._parts:
            self._input = None
        return part

    def weight(self, index: int) -> Tensor:
        """Return a copy of one layer's weight, ``[out_features, in_features]``."""
        rows: Tensor = torch.split(self._weight.to_dense(), self._sizes)[index]
        return rows.clone()

    def __deepcopy__(self, memo: object) -> PackedGroup:
        return self  # weights are only read


class PackedLinear(nn.Linear):
    """A linear layer without a parameter `weight`; made by `pack_model` of an `nn.Linear`.

    `weight` gives a copy, so that writing to it changes nothing. A state dict has it, too.
    """

    _group: PackedGroup
    _index: int

    def forward(self, input: Tensor) -> Tensor:
        """Return ``[..., out_features]`` of float32 ``[..., in_features]``."""
        return self._group.part(self._index, input)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A copy of the weight, float32 ``[out_features, in_features]``."""
        return self._group.weight(self._index)

    def _save_to_state_dict(
        self, destination: dict[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)


def group_of(modules: Sequence[nn.Module]) -> PackedGroup | None:
    """Return the group whose layers these are, all of them and in order; None if there is none."""
    first = modules[0]
    if not isinstance(first, PackedLinear):
        return None
    group = first._group
    whole = len(modules) == len(group._sizes) and all(
        isinstance(module, PackedLinear) and module._group is group and module._index == at
        for at, module in enumerate(modules)
    )
    return group if whole else None


@torch.no_grad()
def pack_model(model: PreTrainedModel) -> None:
    """Pack the linear layers of a model that is ours, one after the other, and free what they had.

    Those of the backbone and the language model's head; a table of embeddings that is also the head
    stays beside it, as its rows are read. Does nothing with a model that a user holds.
    """
    if model not in _OURS:
        return
    backbone: nn.Module = model.base_model
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    wanted = {*backbone.modules(), head}
    for parent in model.modules():
        children = dict(parent.named_children())
        groups = [names for names in (QKV, GATE_UP) if children.keys() >= {*names}]
        alone = children.keys() - {name for names in groups for name in names}
        for names in (*groups, *((name,) for name in alone)):
            linears = [children[name] for name in names if children[name] in wanted]
            whole = [linear for linear in linears if _packs(linear)]
            widths = {linear.in_features for linear in whole}
            if len(whole) == len(names) and len(widths) == 1:
                _pack(whole)
            else:
                for linear in whole:
                    _pack([linear])
    trim_heap()


def _packs(module: nn.Module) -> TypeGuard[nn.Linear]:
    return fits(module) and type(module.weight) is nn.Parameter


def _pack(linears: Sequence[nn.Linear]) -> None:
    group = PackedGroup(linears)
    for index, linear in enumerate(linears):
        weight = linear._parameters.pop("weight")
        assert weight is not None
        release_file_pages(weight)
        linear.__class__ = PackedLinear
        assert isinstance(linear, PackedLinear)
        linear._group, linear._index = group, index
