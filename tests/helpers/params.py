"""Parameters to test with, made from the fields of `StarsParams` and the methods' records."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args, get_type_hints

from stars_fast.methods import COMMON, METHODS, Method
from stars_fast.params import RANGES, StarsParams

_DEFAULTS = {field.name: field.default for field in fields(StarsParams)}
_HINTS = get_type_hints(StarsParams)
_OTHER: dict[str, Any] = {
    "target_reward": 1.25,
    "budget": 3.0,
    "candidates": 3,
    "seed": 4,
    "logit_bias": {5: 1.5},
    "bad_words": ("x",),
    "guided": {"regex": "a+"},
    "stop": ("x",),
    "step_text": "Step",
    "stop_token_ids": (5,),
}


def owner(name: str) -> Method:
    """The first method that has a parameter."""
    return next(m for m, kind in METHODS.items() if name in (*COMMON, *kind.parameters))


def other_value(name: str) -> Any:
    """An allowed value of a parameter that is not its default."""
    if name in _OTHER:
        return _OTHER[name]
    default = _DEFAULTS[name]
    if isinstance(default, bool):
        return not default
    if name not in RANGES:
        return get_args(_HINTS[name])[1]
    assert isinstance(default, int | float)
    return default + 1 if RANGES[name].whole else default / 2 or 0.25
