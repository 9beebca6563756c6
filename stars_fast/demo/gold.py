"""The gold sentiment of a review, read from its text.

A review is read sentence by sentence, a sentence clause by clause. Every evaluation found, that is
``[negator] [modifier] entry`` in the lexicon's words, has a value v in [-1, 1] and a weight w:

    v = clip(base * modifier, -1, 1), times -strength if negated (times -1 for a deed)
    w = product of the clause's frames: concession 0.5 and contrast 1.5 around ", but" or
        "Although ..., ", report 0.25, expectation 0, verdict 2
    gold = sum(w * v) / (1 + sum(w))

so gold is a weighted mean drawn towards 0 by one neutral clause: it lies in (-1, 1), is 0 for text
without evaluations, and one kind word counts less than a consistent review. Any text has a score;
in a truncated one the evaluations that are complete count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from stars_fast.demo.lexicon import (
    CONCESSION_WEIGHT,
    CONTRAST_WEIGHT,
    ENTRIES,
    EXPECTATION_WEIGHT,
    MODIFIERS,
    NEGATORS,
    REPORT_WEIGHT,
    VERDICT_WEIGHT,
)

__all__ = ["combine", "evaluations", "gold_score", "value_of"]


def _alternatives(phrases: Iterable[str]) -> str:
    """Regular expression for any of the phrases, the longest first."""
    return "|".join(re.escape(phrase) for phrase in sorted(phrases, key=len, reverse=True))


_SENTENCE_END = re.compile(r"[.!?]")
_BUT = re.compile(r", but ")
_ALTHOUGH = re.compile(r"^although ([^,]*)(?:, (.*))?$")
_VERDICT = re.compile(r"^(?:overall|in the end|all in all), ")
_REPORT = re.compile(r"^my \w+ (?:says|thinks) ")
_EXPECTATION = re.compile(r"^i expected ")
_EVALUATION = re.compile(
    rf"\b(?:({_alternatives(NEGATORS)}) )?(?:({_alternatives(MODIFIERS)}) )?"
    rf"({_alternatives(ENTRIES)})\b"
)


def value_of(entry: str, modifier: str | None = None, negator: str | None = None) -> float:
    """Value in [-1, 1] of one evaluation, for example ("dull", "very", "not").

    Raises
    ------
    KeyError
        If a phrase is not in the lexicon.
    """
    base, is_deed = ENTRIES[entry.lower()]
    value = max(-1.0, min(1.0, base * (MODIFIERS[modifier] if modifier else 1.0)))
    if negator is None:
        return value
    return -value if is_deed else -NEGATORS[negator] * value


def combine(scored: Iterable[tuple[float, float]]) -> float:
    """Gold score of a review's (weight, value) pairs: sum(w * v) / (1 + sum(w))."""
    total = weight = 0.0
    for w, v in scored:
        total += w * v
        weight += w
    return total / (1.0 + weight)


def evaluations(text: str) -> list[tuple[float, float]]:
    """The (weight, value) pairs of all evaluations in ``text``, in reading order."""
    plain = " ".join(text.lower().split())
    return [
        (weight * _clause_weight(clause), value_of(entry, modifier, negator))
        for sentence in _SENTENCE_END.split(plain)
        for weight, clause in _clauses(sentence.strip().rpartition(": ")[2])
        for negator, modifier, entry in (match.groups() for match in _EVALUATION.finditer(clause))
    ]


def gold_score(text: str) -> float:
    """Gold sentiment of ``text`` in (-1, 1): negative is a bad review, 0 a neutral one."""
    return combine(evaluations(text))


def _clauses(sentence: str) -> list[tuple[float, str]]:
    """The clauses of a lower-case sentence with the weights of the sentence's frames."""
    verdict = _VERDICT.match(sentence)
    weight = VERDICT_WEIGHT if verdict else 1.0
    rest = sentence[verdict.end() :] if verdict else sentence
    although = _ALTHOUGH.match(rest)
    if although:
        conceded, claimed = although.groups()
        return [(weight * CONCESSION_WEIGHT, conceded), (weight * CONTRAST_WEIGHT, claimed or "")]
    *conceded_parts, last = _BUT.split(rest)
    if not conceded_parts:
        return [(weight, last)]
    return [
        *((weight * CONCESSION_WEIGHT, part) for part in conceded_parts),
        (weight * CONTRAST_WEIGHT, last),
    ]


def _clause_weight(clause: str) -> float:
    """Weight of a clause by whose opinion it states."""
    if _EXPECTATION.match(clause):
        return EXPECTATION_WEIGHT
    return REPORT_WEIGHT if _REPORT.match(clause) else 1.0
