"""``name=value,...`` as text, on the command line."""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["values_of"]


def values_of(text: str) -> dict[str, Any]:
    """Read ``name=value,...``; values are JSON, or else plain text.

    Raises
    ------
    ValueError
        A part is not of this form, or comes twice.
    """
    found: dict[str, Any] = {}
    # A comma within a value is not followed by another name.
    for part in re.split(r",(?=\s*\w+\s*=)", text) if text.strip() else []:
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not name.isidentifier():
            raise ValueError(f"expected name=value, got {part!r}")
        if name in found:
            raise ValueError(f"{name} is given twice")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
