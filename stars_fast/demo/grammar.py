"""A grammar of short film and product reviews with an exact gold sentiment.

A review has an opening (see `stars_fast.demo.openings`), one to eight sentences and often a
verdict. Its writer has a mood, drawn once per review; each evaluation is kind with a probability
that follows the mood, so reviews lean to one side without being of one mind. Only
``random.Random.random`` is used: its stream is the same in every Python version.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from stars_fast.demo.gold import combine, value_of
from stars_fast.demo.lexicon import (
    ASPECTS,
    CONCESSION_WEIGHT,
    CONTRAST_WEIGHT,
    DEEDS,
    EXPECTATION_WEIGHT,
    MODIFIERS,
    NEGATORS,
    NEUTRAL,
    OPINIONS,
    PRODUCTS,
    QUALITIES,
    REPORT_WEIGHT,
    STRONG,
    VERDICT_WEIGHT,
)
from stars_fast.demo.openings import Opening, held_out_openings, training_openings

__all__ = ["Review", "reviews"]

_T = TypeVar("_T")
_Scored = tuple[tuple[float, float], ...]  # (weight, value) of each evaluation

_MOOD_PULL = 0.46  # an evaluation is kind with probability 0.5 + _MOOD_PULL * mood
_LENGTHS = (1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 7, 7, 8)
_PLAIN_COPULAS = ("is", "is", "was")
_COPULAS = ("is", "is", "is", "was", "feels", "seems")
_BEGINNINGS = {
    "film": ("at first", "in the first hour", "in the beginning"),
    "product": ("at first", "on the first day", "in the beginning"),
}
_LATER = {
    "film": ("in the second hour", "by the end", "after a while"),
    "product": ("after a week", "by the end", "after a while"),
}
_OTHERS = ("sister", "father", "friend", "neighbor", "boss")
_FILM_FAMILIES = ("story", "story", "story", "people", "people", "film look", "film sound")


@dataclass(frozen=True)
class Review:
    """A review and its gold sentiment.

    Attributes
    ----------
    prompt
        The opening, without a space at its end.
    response
        The rest, from its leading space on.
    gold
        Gold sentiment in (-1, 1), computed from the derivation, not from the text.
    """

    prompt: str
    response: str
    gold: float

    @property
    def text(self) -> str:
        """The whole review."""
        return self.prompt + self.response


def reviews(
    seed: int, *, held_out: bool = False, max_sentences: int | None = None
) -> Iterator[Review]:
    """Endless reviews, the same for the same seed.

    Parameters
    ----------
    seed
        Any int.
    held_out
        Take the openings that training never uses.
    max_sentences
        Longest response in sentences, at least 1; None for no limit but the grammar's own.

    Raises
    ------
    ValueError
        If ``max_sentences`` is below 1; on the first review, as this is a generator.
    """
    if max_sentences is not None and max_sentences < 1:
        raise ValueError(f"max_sentences must be at least 1, got {max_sentences}")
    lengths = [n for n in _LENGTHS if max_sentences is None or n <= max_sentences]
    rng = random.Random(seed)
    openings = held_out_openings() if held_out else training_openings()
    while True:
        sentences = _pick(rng, lengths)
        verdict = rng.random() < 0.6 and sentences != max_sentences
        yield _Writer(rng, _pick(rng, openings)).review(sentences, verdict=verdict)


def _pick(rng: random.Random, options: Sequence[_T]) -> _T:
    return options[int(rng.random() * len(options))]


class _Writer:
    """Writes one review; every method that returns text also returns what it is worth."""

    def __init__(self, rng: random.Random, opening: Opening) -> None:
        self._rng = rng
        self._opening = opening
        # The sine makes firm opinions more common than lukewarm ones.
        self._mood = math.sin(0.5 * math.pi * (2.0 * rng.random() - 1.0))
        self._families = _FILM_FAMILIES if opening.kind == "film" else PRODUCTS[opening.item]
        self._unused: list[tuple[str, str]] = []

    def review(self, length: int, *, verdict: bool) -> Review:
        """A review of ``length`` sentences and, if asked for, a verdict."""
        forms: tuple[tuple[float, Callable[[], tuple[str, _Scored]]], ...] = (
            (0.26, self._plain),
            (0.10, self._two_aspects),
            (0.09, self._two_qualities),
            (0.10, self._but),
            (0.09, self._although),
            (0.08, self._at_first),
            (0.10, self._opinion),
            (0.04, self._without),
            (0.06, self._report),
            (0.04, self._expectation),
            (0.05, self._neutral),
        )
        sentences = [self._weighted(forms)() for _ in range(length)]
        if verdict:
            sentences.append(self._verdict())
        scored = [pair for _, pairs in sentences for pair in pairs]
        response = "".join(f" {text[0].upper()}{text[1:]}" for text, _ in sentences)
        return Review(self._opening.text, response, combine(scored))

    def _chance(self, probability: float) -> bool:
        return self._rng.random() < probability

    def _weighted(self, options: Sequence[tuple[float, _T]]) -> _T:
        point = self._rng.random() * sum(weight for weight, _ in options)
        for weight, option in options:
            point -= weight
            if point < 0.0:
                return option
        return options[-1][1]

    def _kind(self) -> bool:
        """Whether the next evaluation is kind."""
        return self._chance(0.5 + _MOOD_PULL * self._mood)

    def _aspect(self) -> tuple[str, str]:
        """An aspect not yet used in this review and its family of qualities."""
        if not self._unused:
            self._unused = [(name, f) for f in self._families for name in ASPECTS[f]]
        name, family = self._unused.pop(int(self._rng.random() * len(self._unused)))
        self._unused = [pair for pair in self._unused if pair[0] != name]
        return name, family.removeprefix("film ")

    def _quality(self, family: str, kind: bool, *, bare: bool = False) -> tuple[str, float]:
        """``[negator] [modifier] quality`` that is kind or unkind; bare: the quality alone."""
        negator = None
        if not bare and self._chance(0.22):
            negator = _pick(
                self._rng, ("not", "not", "never", "hardly", "far from", "anything but")
            )
        fitting = QUALITIES["general" if self._chance(0.35) else family]
        wanted = kind if negator is None else not kind
        simple = bare or negator is not None  # "both too long and bad", "hardly light enough"
        quality, base = _pick(
            self._rng,
            [
                (quality, value)
                for quality, value in fitting.items()
                if (value > 0) == wanted and not (simple and " " in quality)
            ],
        )
        modifier = None
        graded = " " not in quality and abs(base) < STRONG  # no "very too long", "very superb"
        if graded and not bare and negator in (None, "not") and self._chance(0.35):
            modifier = "very" if negator else _pick(self._rng, tuple(MODIFIERS))
        words = [word for word in (negator, modifier, quality) if word]
        return " ".join(words), value_of(quality, modifier, negator)

    def _clause(self, kind: bool) -> tuple[str, float]:
        """``the aspect is quality``."""
        aspect, family = self._aspect()
        quality, value = self._quality(family, kind)
        negated = quality.startswith(tuple(NEGATORS))
        copula = _pick(self._rng, _PLAIN_COPULAS if negated else _COPULAS)
        return f"the {aspect} {copula} {quality}", value

    def _plain(self) -> tuple[str, _Scored]:
        clause, value = self._clause(self._kind())
        return f"{clause}.", ((1.0, value),)

    def _two_aspects(self) -> tuple[str, _Scored]:
        first, a = self._clause(self._kind())
        second, b = self._clause(self._kind())
        return f"{first} and {second}.", ((1.0, a), (1.0, b))

    def _two_qualities(self) -> tuple[str, _Scored]:
        aspect, family = self._aspect()
        kind = self._kind()
        first, a = self._quality(family, kind, bare=True)
        second, b = self._quality(family, kind, bare=True)
        while second == first:
            second, b = self._quality(family, kind, bare=True)
        return f"the {aspect} is both {first} and {second}.", ((1.0, a), (1.0, b))

    def _but(self) -> tuple[str, _Scored]:
        kind = self._kind()
        first, a = self._clause(not kind)
        second, b = self._clause(kind)
        return f"{first}, but {second}.", ((CONCESSION_WEIGHT, a), (CONTRAST_WEIGHT, b))

    def _although(self) -> tuple[str, _Scored]:
        kind = self._kind()
        first, a = self._clause(not kind)
        second, b = self._clause(kind)
        return f"although {first}, {second}.", ((CONCESSION_WEIGHT, a), (CONTRAST_WEIGHT, b))

    def _at_first(self) -> tuple[str, _Scored]:
        kind = self._kind()
        aspect, family = self._aspect()
        first, a = self._quality(family, not kind)
        second, b = self._quality(family, kind)
        text = (
            f"the {aspect} was {first} {_pick(self._rng, _BEGINNINGS[self._opening.kind])}, "
            f"but {second} {_pick(self._rng, _LATER[self._opening.kind])}."
        )
        return text, ((CONCESSION_WEIGHT, a), (CONTRAST_WEIGHT, b))

    def _opinion(self) -> tuple[str, _Scored]:
        kind = self._kind()
        negated = self._chance(0.3)
        past, base, value = _pick(
            self._rng, [verb for verb in OPINIONS if (verb[2] > 0) == (kind != negated)]
        )
        aspect, _ = self._aspect()
        if negated:
            return f"I did not {base} the {aspect}.", ((1.0, -NEGATORS["not"] * value),)
        modifier = "really" if self._chance(0.3) else None
        words = " ".join(word for word in ("I", modifier, past) if word)
        return f"{words} the {aspect}.", ((1.0, value_of(past, modifier)),)

    def _without(self) -> tuple[str, _Scored]:
        kind = self._kind()
        aspect, family = self._aspect()
        first, a = self._quality(family, kind, bare=True)
        second, b = self._quality(family, not kind, bare=True)
        text = f"the {aspect} is {first} without being {second}."
        return text, ((1.0, a), (1.0, -NEGATORS["without being"] * b))

    def _report(self) -> tuple[str, _Scored]:
        kind = self._kind()
        reporting = f"my {_pick(self._rng, _OTHERS)} {_pick(self._rng, ('says', 'thinks'))}"
        if self._chance(0.4):
            clause, value = self._clause(kind)
            return f"{reporting} {clause}.", ((REPORT_WEIGHT, value),)
        first, a = self._clause(not kind)
        second, b = self._quality("general", kind)
        text = f"{reporting} {first}, but I found it {second}."
        return text, ((CONCESSION_WEIGHT * REPORT_WEIGHT, a), (CONTRAST_WEIGHT, b))

    def _expectation(self) -> tuple[str, _Scored]:
        kind = self._kind()
        aspect, family = self._aspect()
        first, a = self._quality(family, not kind, bare=True)
        second, b = self._quality(family, kind)
        text = f"I expected the {aspect} to be {first}, but it is {second}."
        return text, ((CONCESSION_WEIGHT * EXPECTATION_WEIGHT, a), (CONTRAST_WEIGHT, b))

    def _neutral(self) -> tuple[str, _Scored]:
        return _pick(self._rng, NEUTRAL[self._opening.kind]), ()

    def _verdict(self) -> tuple[str, _Scored]:
        kind = self._kind()
        lead = _pick(self._rng, ("overall", "in the end", "all in all"))
        if self._chance(0.5):
            quality, value = self._quality("general", kind)
            return f"{lead}, it is {quality}.", ((VERDICT_WEIGHT, value),)
        negated = self._chance(0.4)
        deeds = DEEDS[self._opening.kind]
        deed = _pick(
            self._rng, [d for d, value in deeds.items() if (value > 0) == (kind != negated)]
        )
        negator = "not" if negated else None
        words = " ".join(word for word in ("I would", negator, deed) if word)
        return f"{lead}, {words}.", ((VERDICT_WEIGHT, value_of(deed, None, negator)),)
