"""Reward models given as Python code: a function on texts, or an object with method `score`."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable, Sequence
from typing import Any

from stars_fast.errors import RewardError
from stars_fast.rewards.base import KnownRewards, Prompt, ScoreJob, Scorer, finite_reward

__all__ = ["CallableScorer", "RewardFunction"]

RewardFunction = Callable[[list[str], list[str]], Any]


class CallableScorer(Scorer):
    """Scores whole texts with `function(prompts, responses)`.

    The function is called once per round with the jobs of every request, and must return one
    finite number per pair: a list, a tuple, a numpy array or a tensor. It gets the prompt as the
    language model reads it (`Prompt.text`) and the response without special tokens, empty for r(x).
    Each job is one pair of one call; equal pairs of live requests are asked for once.

    A call that raises, or that returns the wrong count, says nothing about which pair is to blame;
    the pairs are then tried again one by one, so that only the bad ones fail. A value that is not a
    number, or not finite, fails its own job alone.

    Parameters
    ----------
    function : callable
        `f(prompts: list[str], responses: list[str]) -> list[float]`.
    """

    def __init__(self, function: RewardFunction) -> None:
        self._function = function
        self._name = getattr(function, "__qualname__", type(function).__name__)
        self._prompts: dict[int, str] = {}
        self._known = KnownRewards()
        self._jobs = 0
        self._calls = 0

    def start(self, request: int, prompt: Prompt, max_response_tokens: int) -> None:
        """Remember the prompt; a function has no context length to check."""
        self._prompts[request] = prompt.text
        self._known.start(request, _bytes(prompt.text))

    def score(self, jobs: Sequence[ScoreJob]) -> list[float | Exception]:
        """Call the function; see `Scorer.score` and the notes of the class."""
        self._jobs += len(jobs)
        inputs = [(job.request, _bytes(job.response_text)) for job in jobs]
        return self._known.score(inputs, lambda todo: self._score([jobs[i] for i in todo]))

    def _score(self, jobs: Sequence[ScoreJob]) -> list[float | Exception]:
        """Score jobs of which no two are equal."""
        if not jobs:
            return []
        prompts = [self._prompts[job.request] for job in jobs]
        responses = [job.response_text for job in jobs]
        rewards = self._call(prompts, responses)
        if not isinstance(rewards, RewardError):
            return rewards
        if len(jobs) == 1:
            return [rewards]
        retried: list[float | Exception] = []
        for prompt, response in zip(prompts, responses, strict=True):
            one = self._call([prompt], [response])
            retried.append(one if isinstance(one, RewardError) else one[0])
        return retried

    def _call(
        self, prompts: list[str], responses: list[str]
    ) -> list[float | Exception] | RewardError:
        """Call once; the error of the whole call if it raises or miscounts."""
        self._calls += 1
        try:
            # Lists of its own: a function that changes them must not change the retry.
            returned = self._function(list(prompts), list(responses))
            values = returned.tolist() if hasattr(returned, "tolist") else list(returned)
        except Exception as error:  # noqa: BLE001 - user code may raise anything
            failure = RewardError(
                f"reward function {self._name} raised {type(error).__name__}: {error}"
            )
            failure.__cause__ = error
            return failure
        if not isinstance(values, list) or len(values) != len(prompts):
            count = len(values) if isinstance(values, list) else "a single number"
            return RewardError(
                f"reward function {self._name} returned {count} for {len(prompts)} responses; "
                "it must return one reward per response"
            )
        return [self._number(value) for value in values]

    def _number(self, value: object) -> float | Exception:
        if hasattr(value, "item"):  # a numpy scalar or a tensor of one element
            with contextlib.suppress(RuntimeError, ValueError):
                value = value.item()
        if isinstance(value, numbers.Real):
            try:
                return finite_reward(float(value))
            except OverflowError as error:
                return RewardError(f"reward function {self._name} returned an integer: {error}")
        return RewardError(
            f"reward function {self._name} returned a {type(value).__name__} ({value!r:.80}) where "
            "a number was due"
        )

    def finish(self, request: int) -> None:
        """Forget the prompt."""
        self._prompts.pop(request, None)
        self._known.finish(request)

    def stats(self) -> dict[str, int]:
        """Return the counters of `Scorer.stats`; tokens are not known here."""
        return {"rm_jobs": self._jobs, "rm_calls": self._calls, "rm_tokens": 0}


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")
