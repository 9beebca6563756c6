"""A method and its budget in a word, for clients that cannot send a ``stars`` object.

``best_of_n:8`` is the method with a budget of 8. It can follow the name of the model,
``demo:best_of_n:8``, and stand in the header `HEADER`.
"""

from __future__ import annotations

from typing import Any

from stars_fast.methods import METHODS, kind_of

#: Of a request.
HEADER = "X-Stars-Method"


def method_values(word: str) -> dict[str, Any]:
    """Return the fields of `StarsParams` that a method and its budget stand for.

    The budget is `max_attempts` where segments are tested, else `candidates`.

    Raises
    ------
    ValueError
        There is no such method, or it has no such budget.
    """
    method, colon, budget = word.partition(":")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not colon:
        return {"method": method}
    own = kind_of(method, "soft").parameters
    names = [name for name in ("max_attempts", "candidates") if name in own]
    if not names:
        raise ValueError(f"method {method!r} has no budget, got {budget!r}")
    if not budget.isascii() or not budget.isdecimal() or len(budget) > 9:
        raise ValueError(f"the budget of method {method!r} must be a number, got {budget!r}")
    return {"method": method, names[0]: int(budget)}


def values_in_name(name: str | None, model: str) -> dict[str, Any] | None:
    """Return what a model's name says beside naming `model`; None if it is another model's."""
    if name is None or name == model:
        return {}
    if not name.startswith(f"{model}:"):
        return None
    return method_values(name.removeprefix(f"{model}:"))
