"""The contract between the engine and reward models of every kind.

Terms
-----
request
    One prompt being aligned, known by an integer handle of the engine.
branch
    One candidate response of a request, known by an integer unique among live candidates.
committed text
    The part of a request's response that has been accepted; every branch continues it.
r(x)
    The reward of the prompt alone: the job whose response is empty.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from transformers import PreTrainedModel

from stars_fast.errors import RewardError
from stars_fast.prompts import Prompt
from stars_fast.rewards.split_ids import Ids, no_ids

__all__ = ["HeadRewards", "KnownRewards", "Prompt", "PromptRewards", "RewardModel", "ScoreJob"]
__all__ += ["Scorer", "digest", "finite_reward"]


@dataclass(slots=True)
class ScoreJob:
    """One response to score.

    Parameters
    ----------
    request : int
        The request it belongs to, known to `Scorer.start`.
    branch : int
        Id of the candidate, to be named in `Scorer.keep` or `Scorer.accept` afterwards.
    new_ids : sequence of int, or int64 [N]
        The response behind `committed_ids`, as ids of the language model.
    response_text : str
        The whole response so far as text, special tokens left out.
    committed_ids : int64 [C]
        What the response begins with: committed text, or some of it. r(x) is asked for if there are
        no ids at all.
    """

    request: int
    branch: int
    new_ids: Sequence[int] | Ids
    response_text: str
    committed_ids: Ids = field(default_factory=no_ids)

    @property
    def response_ids(self) -> Sequence[int] | Ids:
        """The whole response so far."""
        if not len(self.committed_ids):
            return self.new_ids
        return np.concatenate((self.committed_ids, self.new_ids), dtype=np.int64)

    @property
    def of_prompt(self) -> bool:
        """Whether r(x) is asked for."""
        return not len(self.new_ids) and not len(self.committed_ids)


class HeadRewards(float):
    """The rewards of several heads, in the place of one; as a number the first of them.

    Attributes
    ----------
    parts : tuple of float
    """

    parts: tuple[float, ...]

    def __new__(cls, parts: Sequence[float]) -> HeadRewards:
        """Return the first number with all of them."""
        made = super().__new__(cls, parts[0])
        made.parts = tuple(parts)
        return made


@runtime_checkable
class RewardModel(Protocol):
    """Anything that scores whole texts, for reward models of any other kind."""

    def score(self, prompts: list[str], responses: list[str]) -> list[float]:
        """Return one finite reward per pair, in order; an empty response asks for r(x)."""
        ...


class Scorer(ABC):
    """A reward model as the engine drives it.

    For each request: `start`, then rounds of `score` followed by `accept` of one scored branch, or
    by `keep` and `prune` when every branch lost its test, at last `finish`. Not thread-safe.
    Kinds without a cache inherit `keep`, `accept` and `prune`, which do nothing.
    """

    #: Whether `ScoreJob.response_text` is read; if not, it may be left empty.
    needs_text: bool = True
    #: Device of the reward model; None for a function, which may be anywhere.
    device: torch.device | None = None
    #: The model; None for a function.
    module: PreTrainedModel | None = None
    #: Whether it waits for another machine, beside which other models can run.
    remote: bool = False
    #: Called in `score` once its device has work that it has still to wait for, if there is such.
    on_launch: Callable[[], object] | None = None

    @property
    def devices(self) -> frozenset[torch.device]:
        """Devices of all its models; empty for a function."""
        return frozenset(() if self.device is None else (self.device,))

    @property
    def modules(self) -> list[PreTrainedModel]:
        """All its models; none for a function."""
        return [] if self.module is None else [self.module]

    @abstractmethod
    def start(self, request: int, prompt: Prompt, max_response_tokens: int) -> None:
        """Admit a request; no model is run.

        Raises
        ------
        ValueError
            If the prompt with `max_response_tokens` more tokens cannot fit the reward model, or if
            the prompt cannot be put into its template. The request is then unknown here.
        """

    @abstractmethod
    def score(self, jobs: Sequence[ScoreJob]) -> list[float | Exception]:
        """Score every job.

        Returns
        -------
        list[float or Exception]
            In the order of `jobs`: a finite reward, or the error of that job. A failing job never
            raises here and never affects another. `SeveralScorer` returns `CombinedReward`, and a
            model with several heads `HeadRewards`.
        """

    def keep(self, request: int, branch: int) -> None:  # noqa: B027
        """Retain the cache of a branch that lost its test but is the best so far.

        The branch kept before, if any, is dropped.
        """

    def accept(self, request: int, branch: int) -> None:  # noqa: B027
        """Make a branch, kept or just scored, the committed text; drop the request's others."""

    def fork(self, source: int, target: int) -> None:  # noqa: B027
        """Make the committed text of `target` that of `source`, a request of the same prompt.

        Branches of `target` are dropped.
        """

    def prune(self, request: int) -> None:  # noqa: B027
        """Drop every branch of the request but the kept one."""

    @abstractmethod
    def finish(self, request: int) -> None:
        """Forget the request. An unknown request is ignored, so that aborts may come twice."""

    def take_tokens(self) -> dict[int, int]:
        """Return the tokens run for each request since the last call, finished ones included.

        They add up to `rm_tokens` of `stats`. Empty where the kind cannot know.
        """
        return {}

    @abstractmethod
    def stats(self) -> dict[str, int]:
        """Return counters since the scorer was made.

        Always there: `rm_jobs` (jobs scored), `rm_calls` (forward passes or calls) and `rm_tokens`
        (tokens run through the model, padding not counted; 0 where the kind cannot know).
        """


class PromptRewards:
    """The latest values of r(x), so that requests with one prompt pay for it once.

    Parameters
    ----------
    capacity : int
        Prompts remembered; the least recently used is forgotten first.
    """

    def __init__(self, capacity: int = 1024) -> None:
        self._capacity = capacity
        self._values: OrderedDict[Hashable, float] = OrderedDict()

    def get(self, key: Hashable) -> float | None:
        """Return the remembered reward, or None."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: Hashable, value: float | Exception) -> None:
        """Remember a reward; an error is not remembered."""
        if isinstance(value, Exception):
            return
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._capacity:
            self._values.popitem(last=False)


class KnownRewards:
    """Rewards of what requests of one prompt have had scored, while any of them lives.

    Equal inputs get one reward, whatever they are batched with: otherwise they would differ by
    rounding, and the best of them would depend on the batch.
    """

    def __init__(self) -> None:
        self._prompts: dict[int, bytes] = {}  # by request
        self._requests: Counter[bytes] = Counter()  # by prompt
        self._rewards: dict[bytes, dict[bytes, float]] = {}  # by prompt, then by input

    def start(self, request: int, prompt: bytes) -> None:
        """Note a request; `prompt` is equal where equal inputs have equal rewards."""
        key = digest(prompt)
        self._prompts[request] = key
        self._requests[key] += 1
        self._rewards.setdefault(key, {})

    def finish(self, request: int) -> None:
        """Forget a request, if there is one, and with the last of a prompt its rewards."""
        prompt = self._prompts.pop(request, None)
        if prompt is None:
            return
        self._requests[prompt] -= 1
        if not self._requests[prompt]:
            del self._requests[prompt], self._rewards[prompt]

    def score(
        self,
        inputs: Sequence[tuple[int, bytes]],
        run: Callable[[list[int]], Sequence[float | Exception]],
    ) -> list[float | Exception]:
        """Return the reward of each input, a request and the `digest` of all that is read of it.

        Parameters
        ----------
        inputs
            In any order.
        run
            Scores those of the given numbers, of which no two are equal. Errors are not remembered.
        """
        rewards: list[float | Exception] = [math.nan] * len(inputs)
        todo: dict[tuple[bytes, bytes], list[int]] = {}  # equal ones, the first to be run
        for number, (request, key) in enumerate(inputs):
            prompt = self._prompts[request]
            known = self._rewards[prompt].get(key)
            if known is None:
                todo.setdefault((prompt, key), []).append(number)
            else:
                rewards[number] = known
        firsts = [numbers[0] for numbers in todo.values()]
        for ((prompt, key), numbers), scored in zip(todo.items(), run(firsts), strict=True):
            for number in numbers:
                rewards[number] = scored
            if not isinstance(scored, Exception):
                self._rewards[prompt][key] = scored
        return rewards


def digest(*parts: bytes | array[int] | memoryview) -> bytes:
    """Return 16 bytes that stand for the parts, one behind the other."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(part)
    return state.digest()


def finite_reward(value: float | list[float]) -> float | RewardError:
    """Return the value, or the error to put in its place if it is NaN or infinite.

    A list, one value for each of several heads, becomes `HeadRewards`.
    """
    if type(value) is float and math.isfinite(value):
        return value
    reward = HeadRewards(value) if isinstance(value, list) else value
    parts = list(reward.parts) if isinstance(reward, HeadRewards) else [reward]
    if all(map(math.isfinite, parts)):
        return reward
    shown = parts if len(parts) > 1 else parts[0]
    return RewardError(f"the reward model returned {shown}; rewards must be finite numbers")
