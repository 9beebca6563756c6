"""Linear layers that read the same input, as one product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stars_fast.models.linear import fits, pack, version


class JoinedLinears:
    """Some linear layers of one input.

    Parameters
    ----------
    modules : sequence of nn.Linear
        Of one input width.
    packs : bool
        Whether their weights may be copied, joined and in oneDNN's layout. Otherwise, and where
        oneDNN cannot run them, each is called by itself.
    """

    def __init__(self, modules: Sequence[nn.Module], *, packs: bool) -> None:
        self._modules = list(modules)
        self._linears = [module for module in modules if fits(module)]
        self._joins = packs and len(modules) > 1 and len(self._linears) == len(modules)
        self._sizes = [module.weight.shape[0] for module in self._linears]
        self._versions: list[tuple[int, int]] = []
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """Return each layer's result, ``[..., size]``; they may be parts of one tensor."""
        if not self._joins:
            return [module(x) for module in self._modules]
        versions = [version(module) for module in self._linears]
        if versions != self._versions:
            self._pack()
            self._versions = versions
        product = torch.ops.mkldnn._linear_pointwise.default
        out: Tensor = product(x, self._weight, self._bias, "none", [], "")
        return torch.split(out, self._sizes, dim=-1)

    def _pack(self) -> None:
        weights = [module.weight.detach() for module in self._linears]
        self._weight = pack(torch.cat(weights))
        biases = [module.bias for module in self._linears]
        self._bias = None
        if any(bias is not None for bias in biases):
            self._bias = torch.cat(
                [
                    weight.new_zeros(len(weight)) if bias is None else bias.detach()
                    for weight, bias in zip(weights, biases, strict=True)
                ]
            )
