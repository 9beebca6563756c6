"""Numbers on the command lines of the scripts: read, checked, and refused with what is allowed."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def number(
    kind: type[int] | type[float],
    *,
    low: float,
    high: float = math.inf,
    open_low: bool = False,
    words: tuple[str, ...] = (),
) -> Callable[[str], float | str]:
    """Return an argparse type: a finite number in a range, or one of some words.

    Parameters
    ----------
    kind
        int or float.
    low, high
        Of the range, which holds both; with `open_low` it does not hold `low`.
    words
        Allowed as they are.
    """
    name = "an integer" if kind is int else "a number"
    if high == math.inf:
        allowed = f"{name} {'above' if open_low else 'of at least'} {low:g}"
    else:
        allowed = f"{name} in {'(' if open_low else '['}{low:g}, {high:.10g}]"
    allowed = " or ".join([allowed, *words])

    def parse(text: str) -> float | str:
        if text in words:
            return text
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        inside = low < value <= high if open_low else low <= value <= high
        if not (inside and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}")
        return value

    return parse
