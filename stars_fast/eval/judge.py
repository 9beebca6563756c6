"""A language model as a judge of two responses, through any OpenAI-compatible endpoint.

Each pair is asked about twice, once in each order: judges prefer one place to the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # which needs httpx
    from stars_fast.remote.http import Endpoint

Verdict = Literal["A", "B", "tie"]

PROMPT = """\
Below are a prompt and two responses to it, A and B. Decide which response is the better one: more \
helpful, more accurate, more harmless, and closer to what the prompt asks for. Neither their order \
nor their length must matter.

[Prompt]
{prompt}
[End of prompt]

[Response A]
{a}
[End of response A]

[Response B]
{b}
[End of response B]

Answer with one word and nothing else: A, B or tie."""

_WORDS = r"(?:(?:final|my|the|verdict|answer|winner|choice|better|response|is)\W+)*"
_VERDICT = re.compile(rf"\W*{_WORDS}(a|b|tie)(?:\W+is\W+better)?\W*", re.IGNORECASE)
_MARKED = re.compile(r"\[\[(a|b|c|tie)\]\]", re.IGNORECASE)
_VERDICTS: dict[str, Verdict] = {"a": "A", "b": "B", "c": "tie", "tie": "tie"}


class JudgeError(Exception):
    """A question that got no verdict."""


@dataclass(frozen=True)
class PairJudge:
    """A model at an endpoint.

    Parameters
    ----------
    endpoint
        Of the API. Closed by whoever opened it.
    model
        Its name there.
    workers
        Pairs at once, at least 1.
    """

    endpoint: Endpoint
    model: str
    workers: int = 8

    def ask(self, prompt: str, a: str, b: str) -> Verdict:
        """Ask which of two responses is better.

        Raises
        ------
        JudgeError
            The endpoint failed, or its answer is no verdict.
        """
        from stars_fast.remote.chat import PATH, choice_of, filled, question
        from stars_fast.remote.http import RemoteError

        text = filled(PROMPT, {"prompt": prompt, "a": a, "b": b})
        try:
            content, _ = choice_of(self.endpoint.post(PATH, question(self.model, text)))
        except RemoteError as error:
            raise JudgeError(f"the judge failed: {error}") from error
        return verdict_of(content)

    def compare(self, prompt: str, response: str, other: str) -> tuple[float, float]:
        """Ask in both orders.

        Returns
        -------
        tuple[float, float]
            For each order 1 if `response` is better, 0 if `other` is, 0.5 for a tie.

        Raises
        ------
        JudgeError
            As `ask`.
        """
        first = {"A": 1.0, "B": 0.0, "tie": 0.5}[self.ask(prompt, response, other)]
        second = {"A": 0.0, "B": 1.0, "tie": 0.5}[self.ask(prompt, other, response)]
        return first, second

    def compare_all(
        self, pairs: Sequence[tuple[str, str, str]]
    ) -> Iterator[tuple[int, tuple[float, float] | JudgeError]]:
        """Ask about many pairs, `workers` at once.

        Parameters
        ----------
        pairs
            Arguments of `compare`.

        Yields
        ------
        A pair's place and its scores, or why there are none, in the order of the answers.
        """
        with futures.ThreadPoolExecutor(self.workers, "stars-fast-judge") as pool:
            asked = {pool.submit(self.compare, *pair): i for i, pair in enumerate(pairs)}
            try:
                for done in futures.as_completed(asked):
                    try:
                        result: tuple[float, float] | JudgeError = done.result()
                    except JudgeError as error:
                        result = error
                    yield asked[done], result
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def verdict_of(answer: str) -> Verdict:
    """Read a judge's answer: one word, or a sentence around it, or ``[[A]]``.

    Raises
    ------
    JudgeError
        It is no verdict.
    """
    marked = _MARKED.findall(answer)
    if marked:
        return _VERDICTS[marked[-1].lower()]
    lines = [line for line in answer.splitlines() if line.strip()]
    for line in (answer, *lines[-1:]):
        found = _VERDICT.fullmatch(line)
        if found:
            return _VERDICTS[found[1].lower()]
    raise JudgeError(f"no verdict in the judge's answer {answer[:200]!r}")


def describe(judge: PairJudge) -> dict[str, Any]:
    """Return what a verdict depends on; the key is not in it."""
    return {"url": judge.endpoint.url, "model": judge.model, "prompt": PROMPT, "orders": "both"}
