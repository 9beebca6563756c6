"""A model's first layers, enough of them that each kind of layer is there."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from stars_fast.models.probe import LayerLayout

_Module = TypeVar("_Module", bound=nn.Module)

#: Layers that a shortened model has at least, so that one reads what another has written.
_AT_LEAST = 2


def first_layers(
    model: PreTrainedModel, layouts: Sequence[LayerLayout]
) -> tuple[PreTrainedModel, Hashable]:
    """Return a model of the same parts with only its first layers, and what kinds they are.

    Two layers are of a kind if their modules, settings, shapes and attention are the same. The
    result holds the modules of `model`, which is not changed. It is `model` itself where the layers
    are not found or the last is of a kind of its own.

    Parameters
    ----------
    model
        In any state.
    layouts
        Its attention calls, see `stars_fast.models.probe.attention_layout`.

    Returns
    -------
    model : PreTrainedModel
        The first layers, at least two.
    kinds : hashable
        Equal for models whose layers are of the same kinds in the same order.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in lists)  # experts of a layer
        if isinstance(module, nn.ModuleList) and len(module) == len(layouts) and not inner:
            lists[name] = module
    if len(lists) != 1:
        return model, _kind(model, -1)
    ((name, layers),) = lists.items()
    kinds = [(_kind(layer, i), layouts[i]) for i, layer in enumerate(layers)]
    first = {kind: i for i, kind in reversed([*enumerate(kinds)])}
    count = max(_AT_LEAST, 1 + max(first.values()))
    if count >= len(layers):
        return model, tuple(kinds)
    return _with(model, name.split("."), layers[:count]), tuple(kinds)


def _with(module: _Module, path: Sequence[str], part: nn.Module) -> _Module:
    """Return a shallow copy of a module in which `path` leads to `part`."""
    name, *rest = path
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    inner = module._modules[name]
    assert inner is not None
    clone._modules[name] = _with(inner, rest, part) if rest else part
    return clone


def _kind(layer: nn.Module, index: int) -> Hashable:
    """What a layer computes, but for its weights; `index` is its place."""
    return tuple(
        (
            name,
            type(module),
            tuple((key, *_setting(value)) for key, value in _settings(module, index)),
            tuple((key, x.shape, x.dtype) for key, x in module.named_parameters(recurse=False)),
            (len(module._forward_pre_hooks), len(module._forward_hooks)),
        )
        for name, module in layer.named_modules()
    )


def _settings(module: nn.Module, index: int) -> list[tuple[str, object]]:
    """The attributes by which modules of a class may differ; a layer's own number is none."""
    return sorted(
        (key, value)
        for key, value in vars(module).items()
        if not key.startswith("_")
        and not (type(value) is int and value == index and "layer" in key)
    )


def _setting(value: object) -> tuple[Hashable, ...]:
    """Something that differs where a setting does; of other objects, such as functions, the name.

    A function that replaces a method of one instance (`forward`) is a setting as well.
    """
    if isinstance(value, bool | int | float | str | None):
        return (value,)
    return repr(type(value)), getattr(value, "__qualname__", None)
