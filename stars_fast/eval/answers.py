"""Answers to questions of mathematics: right or wrong, by math-verify."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from stars_fast.eval.datasets import Item

#: As the user calls it.
MATH = "math"

_SECONDS = 5  # that math-verify may take for one answer


def check_answers(items: Sequence[Item]) -> None:
    """Raise ValueError if answers cannot be compared: a record has none, or math-verify is missing.

    Nothing is imported: what it rests on takes a second.
    """
    if find_spec("math_verify") is None:
        raise ValueError(
            "gold math needs math-verify, which is not installed: pip install 'stars_fast[math]'"
        )
    lacking = [item.number for item in items if item.answer is None]
    if lacking:
        raise ValueError(f"gold math needs an answer in each record; record {lacking[0]} has none")


class MathScores:
    r"""1 for a response whose answer is the right one, 0 for any other.

    The right answer is a number or an expression, in LaTeX or not; of GSM8K's, what follows
    ``####``. Of a response the last one is taken, ``\boxed{}`` before all others.
    """

    def __init__(self) -> None:
        from math_verify import parse, verify

        self._parse: Callable[..., list[Any]] = parse
        self._verify: Callable[..., bool] = verify

    def score(self, answers: Sequence[str], responses: Sequence[str]) -> list[float | Exception]:
        """Return the score of each response to the question of each answer, or why there is none.

        math-verify's limit of 5 seconds for each rests on a signal; off the main thread, where
        there are none, it has no limit.
        """
        main = threading.current_thread() is threading.main_thread()
        seconds = _SECONDS if main else None
        found: list[float | Exception] = []
        for answer, response in zip(answers, responses, strict=True):
            right = self._parse(_as_latex(answer), parsing_timeout=seconds)
            if not right:
                found.append(ValueError(f"the answer {answer!r} is no mathematics"))
                continue
            given = self._parse(response, parsing_timeout=seconds)
            found.append(float(self._verify(right, given, timeout_seconds=seconds)))
        return found


def _as_latex(answer: str) -> str:
    answer = answer.rpartition("####")[2].strip()
    return answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
