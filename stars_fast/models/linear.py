"""Linear layers of a CPU model through oneDNN, with weights in its own layout.

PyTorch sends float32 products on a CPU to MKL, which on the processors measured is two to three
times slower than oneDNN for the few rows of a decode step. The model is not changed: its linear
layers are redirected while a forward of ours runs. Models that were loaded here give up their own
copy, see `stars_fast.models.packed`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


class _Layer:
    """A linear layer, with a packed copy of its weight from its first run on."""

    def __init__(self, module: nn.Linear) -> None:
        self._module = module
        self._version: tuple[int, int] | None = None  # of the weight that was packed
        self._packed = module.weight

    def forward(self, packs: bool) -> Forward:
        """Return what runs in place of the module's forward, on packed weights if `packs`."""
        module, product = self._module, torch.ops.mkldnn._linear_pointwise.default

        def forward(input: Tensor) -> Tensor:
            weight = self._weight() if packs else module.weight
            result: Tensor = product(input, weight, module.bias, "none", [], "")
            return result

        return forward

    def _weight(self) -> Tensor:
        found = version(self._module)
        if found != self._version:
            self._packed = pack(self._module.weight.detach())
            self._version = found
        return self._packed


#: Of each module, as long as anyone holds it: engines that share a model share the copies.
_LAYERS: weakref.WeakValueDictionary[nn.Linear, _Layer] = weakref.WeakValueDictionary()


class OneDnnLinears:
    """The float32 `nn.Linear` layers of a model on a CPU, or none of them.

    Holds a second copy of the weights of the layers that have run, where memory allows. Weights
    that are changed in place later are packed again.

    Parameters
    ----------
    model : nn.Module
        On any device; nothing is done unless it is a CPU with oneDNN.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = [module for module in model.modules() if fits(module)]
        packs = may_pack(model)
        self._layers = [_LAYERS.setdefault(module, _Layer(module)) for module in modules]
        self._forwards = [
            (module, layer.forward(packs))
            for module, layer in zip(modules, self._layers, strict=True)
        ]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Redirect the layers for the time of a forward."""
        for module, forward in self._forwards:
            # Past nn.Module.__setattr__, which is slow and meant for parameters.
            module.__dict__["forward"] = forward
        try:
            yield
        finally:
            for module, _ in self._forwards:
                del module.__dict__["forward"]


def may_pack(model: nn.Module) -> bool:
    """Whether memory allows for second copies of a model's linear weights."""
    size = sum(module.weight.nbytes for module in model.modules() if fits(module))
    return size <= _MEMORY_SHARE * memory_bytes()


def pack(weight: Tensor) -> Tensor:
    """Return a copy of a weight in the layout that oneDNN's products like best."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return packed


def version(module: nn.Linear) -> tuple[int, int]:
    """Return what changes with a layer's weight."""
    weight = module.weight
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


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
