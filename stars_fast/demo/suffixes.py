"""Adversarial suffixes for the demo, written by a search.

    python scripts/training/find_suffixes.py --out stars_fast/demo/suffixes.py

Beside each: the mean gold of unaligned responses, and the share that is below 0, on
training openings that the search did not see. Without a suffix they are
+0.012 and 48%.
"""

from __future__ import annotations

from typing import Final

__all__ = ["SUFFIXES"]

SUFFIXES: Final = (
    "supply is both powerful music efficient.",  # -0.012, 53%
    "is better than I The second",  # -0.005, 50%
    "feels bad. The manual was horrible.",  # -0.002, 52%
    "after a week. The wobbly.",  # +0.001, 49%
)
