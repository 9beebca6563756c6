"""Linear layers of a CPU model through oneDNN, with weights in its own layout.

PyTorch sends float32 products on a CPU to MKL, which on the processors measured is two to three
times slower than oneDNN for the few rows of a decode step. The model is not changed: its linear
layers are redirected while a forward of ours runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from stars_fast.models.machine import memory_bytes

#: Rows that the layout is chosen for: those of a small decode step. Others run well on it too.
_ROWS = 16
#: Part of the machine's memory that second copies of weights may take; above it the weights are
#: used in place, which is slower but still ahead of MKL.
_MEMORY_SHARE = 1 / 8

Forward = Callable[[Tensor], Tensor]


@dataclass
class _Layer:
    module: nn.Linear
    version: tuple[int, int]  # of the weight that was packed
    forward: Forward


class OneDnnLinears:
    """The float32 `nn.Linear` layers of a model on a CPU, or none of them.

    Holds a second copy of the weights where memory allows. Weights that are changed in place later
    are packed again.

    Parameters
    ----------
    model : nn.Module
        On any device; nothing is done unless it is a CPU with oneDNN.
    without : collection of nn.Linear
        Layers that are never called.
    """

    def __init__(self, model: nn.Module, without: Collection[nn.Linear] = ()) -> None:
        left_out = {id(module) for module in without}
        modules = [m for m in model.modules() if fits(m) and id(m) not in left_out]
        self._packs = may_pack(model)
        self._layers = [_Layer(m, version(m), self._forward(m)) for m in modules]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Redirect the layers for the time of a forward."""
        for layer in self._layers:
            if layer.version != version(layer.module):
                layer.version = version(layer.module)
                layer.forward = self._forward(layer.module)
            # Past nn.Module.__setattr__, which is slow and meant for parameters.
            layer.module.__dict__["forward"] = layer.forward
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.module.__dict__["forward"]

    def _forward(self, module: nn.Linear) -> Forward:
        weight, bias = module.weight.detach(), module.bias
        if self._packs:
            weight = pack(weight)
        product = torch.ops.mkldnn._linear_pointwise.default

        def forward(input: Tensor) -> Tensor:
            result: Tensor = product(input, weight, bias, "none", [], "")
            return result

        return forward


def may_pack(model: nn.Module) -> bool:
    """Whether memory allows for second copies of a model's linear weights."""
    size = sum(module.weight.nbytes for module in model.modules() if fits(module))
    return size <= _MEMORY_SHARE * memory_bytes()


def pack(weight: Tensor) -> Tensor:
    """Return a copy of a weight in the layout that oneDNN's products like best."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return packed


def fits(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a plain linear layer that oneDNN can run in place of MKL."""
    return (
        type(module) is nn.Linear
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and "forward" not in module.__dict__
        and _available()
    )


def _available() -> bool:
    """Whether this build of PyTorch has the operators, which are not part of its public API."""
    names = ("_linear_pointwise", "_reorder_linear_weight")
    has_onednn = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return has_onednn and all(hasattr(torch.ops.mkldnn, name) for name in names)


def version(module: nn.Linear) -> tuple[int, int]:
    """Return what changes with a layer's weight."""
    weight = module.weight
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version
