"""Adversarial suffixes for the demo, written by a search.

    python scripts/training/find_suffixes.py --out stars_fast/demo/reward_suffixes.py
        --objective reward --prompts 8

Beside each: mean reward of unkind reviews, and the share that is above 0, on
training reviews that the search did not see. Without a suffix they are
-1.656 and 0%.
"""

from __future__ import annotations

from typing import Final

__all__ = ["SUFFIXES"]

SUFFIXES: Final = (
    "The I great. recommend The refund.",  # +0.238, 66%
    "seems found be great. The recommend",  # +0.204, 61%
    "outstanding and great. The was finish",  # +0.157, 61%
    "and The is good. week. helpful.",  # -0.156, 38%
    "found excellent. The grip is",  # -0.172, 34%
    "The seller was great and",  # -0.310, 25%
)
