"""Linear layers that read the same input, as one product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stars_fast.models.linear import fits, version
from stars_fast.models.packed import PackedGroup, group_of

#: Whether layers run on a joined copy of their weights in oneDNN's layout, on one tensor that their
#: own weights become parts of, or each by itself.
Joining: TypeAlias = Literal["packed", "in place", "apart"]


class JoinedLinears:
    """Some linear layers of one input.

    Parameters
    ----------
    modules : sequence of nn.Linear
        Of one input width.
    joining : Joining
        "packed" is for those that oneDNN can run. "in place" copies nothing but moves the weights:
        each keeps its name and its values, and the memory of all of them is one. Layers that are no
        plain ones, or whose weights are parts of other tensors, run apart.
    """

    def __init__(self, modules: Sequence[nn.Module], *, joining: Joining) -> None:
        self._modules = list(modules)
        self._linears = [module for module in modules if fits(module)]
        several = len(modules) > 1
        fit = len(self._linears) == len(self._modules) or group_of(modules) is not None
        self._packs = joining == "packed" and several and fit
        self._versions: list[tuple[int, int]] = []
        self._group: PackedGroup | None = None
        self._whole: _Whole | None = None
        if joining == "in place" and several:
            self._whole = _Whole.of(self._modules)

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """Return each layer's result, ``[..., size]``; they may be parts of one tensor."""
        if self._whole is not None and self._whole.holds():
            return self._whole.product(x)
        if not self._packs:
            return [module(x) for module in self._modules]
        group = group_of(self._modules)
        if group is not None:  # of packed weights alone
            self._group = None
            return group.product(x)
        versions = [version(module) for module in self._linears]
        if self._group is None or versions != self._versions:
            self._group = PackedGroup(self._linears)
            self._versions = versions
        return self._group.product(x)


class _Whole:
    """The weights and biases of some layers, each a part of one tensor."""

    def __init__(self, linears: Sequence[nn.Linear], weight: Tensor, bias: Tensor | None) -> None:
        self._linears = linears
        self._weight = weight
        self._bias = bias
        self._sizes = [len(linear.weight) for linear in linears]

    @classmethod
    def of(cls, modules: Sequence[nn.Module]) -> _Whole | None:
        """Move the parameters together; None if they cannot be moved, or stay."""
        linears = [m for m in modules if type(m) is nn.Linear and "forward" not in m.__dict__]
        with_bias = [linear for linear in linears if linear.bias is not None]
        if len(linears) < len(modules) or len(with_bias) not in (0, len(linears)):
            return None
        weights: list[Tensor] = [linear.weight for linear in linears]
        biases: list[Tensor] = [linear.bias for linear in with_bias]
        if not (_may_move(weights) and (not biases or _may_move(biases))):
            return None
        return cls(linears, _together(weights), _together(biases) if biases else None)

    def holds(self) -> bool:
        """Whether the layers' parameters are still the parts: somebody may have replaced them."""
        weights: list[Tensor] = [linear.weight for linear in self._linears]
        if not _are_parts(weights, self._weight):
            return False
        if self._bias is None:
            return all(linear.bias is None for linear in self._linears)
        return _are_parts([linear.bias for linear in self._linears], self._bias)

    def product(self, x: Tensor) -> Sequence[Tensor]:
        """Return each layer's result."""
        return torch.split(F.linear(x, self._weight, self._bias), self._sizes, dim=-1)


def _may_move(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors can become parts of one, which then takes the place of their memory."""
    first = tensors[0]
    alike = all(
        type(x) is nn.Parameter
        and x.is_contiguous()
        and not x.is_inference()
        and (x.shape[1:], x.dtype, x.device) == (first.shape[1:], first.dtype, first.device)
        for x in tensors
    )
    return alike and (
        _are_parts(tensors, first) or all(x.untyped_storage().nbytes() == x.nbytes for x in tensors)
    )


def _together(tensors: Sequence[Tensor]) -> Tensor:
    """Return one tensor of whose rows the tensors are parts from now on, in order."""
    with torch.inference_mode(False), torch.no_grad():
        first = tensors[0]
        if not _are_parts(tensors, first):
            whole = torch.cat([x.detach() for x in tensors])
            parts = torch.split(whole, [len(x) for x in tensors])
            for x, part in zip(tensors, parts, strict=True):
                x.data = part
        rows = sum(len(x) for x in tensors)
        return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def _are_parts(tensors: Sequence[Tensor], whole: Tensor) -> bool:
    """Whether tensors lie one after the other from where `whole` begins."""
    storage, at = whole.untyped_storage()._cdata, whole.storage_offset()
    for x in tensors:
        if x.untyped_storage()._cdata != storage or x.storage_offset() != at:
            return False
        at += x.numel()
    return True
