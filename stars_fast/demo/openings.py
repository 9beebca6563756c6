"""Openings of the demo reviews: a header and, mostly, a neutral first sentence.

An opening is what the language model is prompted with. The openings are split once and for all
into those that training may use and those held out for the demo and its tests.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

from stars_fast.demo.lexicon import FILMS, PRODUCTS

__all__ = ["HELD_OUT", "Opening", "held_out_openings", "prompts", "training_openings"]

HELD_OUT = 256

_FILM_TIMES = (
    "last night",
    "on Friday",
    "on a rainy evening",
    "on a long flight",
    "over the weekend",
    "at a small cinema",
    "during a train ride",
)
_FILM_COMPANY = ("", " alone", " with my sister", " with two friends", " with my father")
_PRODUCT_TIMES = (
    "last month",
    "two weeks ago",
    "in spring",
    "before a trip",
    "on a Monday",
    "after a move",
)
_PRODUCT_USES = ("", " for my office", " for my mother", " for the summer", " from a local shop")


@dataclass(frozen=True)
class Opening:
    """The start of a review.

    Attributes
    ----------
    kind
        "film" or "product".
    item
        What is reviewed, a key of the lexicon's tables.
    context
        The neutral first sentence; empty if there is none.
    """

    kind: str
    item: str
    context: str

    @property
    def text(self) -> str:
        """The prompt: no space at its end, so that the response's first token carries it."""
        header = f"Review of the {self.item}:"
        return f"{header} {self.context}" if self.context else header


@cache
def _split() -> tuple[tuple[Opening, ...], tuple[Opening, ...]]:
    """(training, held out). Openings are ordered by a hash of their text, so mixed and fixed."""
    openings = [
        Opening("film", item, f"I watched it {time}{company}.")
        for item in FILMS
        for time in _FILM_TIMES
        for company in _FILM_COMPANY
    ]
    openings += [
        Opening("product", item, f"I bought it {time}{use}.")
        for item in PRODUCTS
        for time in _PRODUCT_TIMES
        for use in _PRODUCT_USES
    ]
    openings.sort(key=lambda opening: hashlib.sha256(opening.text.encode()).digest())
    bare = [Opening("film", item, "") for item in FILMS]
    bare += [Opening("product", item, "") for item in PRODUCTS]
    # A bare header is common in training: users type it as a prompt.
    return (*openings[HELD_OUT:], *(bare * 4)), tuple(openings[:HELD_OUT])


def training_openings() -> tuple[Opening, ...]:
    """Openings that the demo models were trained on; bare headers occur more than once."""
    return _split()[0]


def held_out_openings() -> tuple[Opening, ...]:
    """The `HELD_OUT` distinct openings that no training text starts with, in a fixed order."""
    return _split()[1]


def prompts(n: int) -> list[str]:
    """The first ``n`` held-out prompts, about half films, half products; always the same.

    Raises
    ------
    ValueError
        If ``n`` is not in 1..`HELD_OUT`.
    """
    if not 1 <= n <= HELD_OUT:
        raise ValueError(f"n must be in 1..{HELD_OUT}, got {n}")
    return [opening.text for opening in held_out_openings()[:n]]
