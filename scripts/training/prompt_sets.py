"""The openings that trained models may see, split in two.

The evaluation prompts everything with `stars_fast.demo.prompts`, the held-out openings, and no
text that a script here trains or tunes on starts with one of them: a bare header starts many, but
what is written behind it is a review, never their first sentence.
"""

from __future__ import annotations

from stars_fast.demo.openings import training_openings

TUNING = 64


def tuning_prompts() -> list[str]:
    """Prompts for choosing settings: training openings that no fine-tuning sees."""
    return [opening.text for opening in training_openings()[:TUNING]]  # in the order of a hash


def training_prompts() -> list[str]:
    """The other training openings, each once."""
    return list(dict.fromkeys(opening.text for opening in training_openings()[TUNING:]))
