"""Several reward models as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent import futures
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from stars_fast.errors import RewardError
from stars_fast.rewards.base import HeadRewards, Prompt, ScoreJob, Scorer
from stars_fast.rewards.combine import Combination

__all__ = ["Part", "SeveralScorer"]


@dataclass(frozen=True)
class Part:
    """A scorer and the rewards that it gives.

    Parameters
    ----------
    scorer : Scorer
        Its results are `HeadRewards` if there are several heads.
    names : tuple of str
        Their names.
    places : tuple of int
        Their places among all rewards.
    heads : tuple of int
        Which of the scorer's heads each of them is read from.
    """

    scorer: Scorer
    names: tuple[str, ...]
    places: tuple[int, ...]
    heads: tuple[int, ...]

    @property
    def name(self) -> str:
        """What it is called in errors."""
        return ", ".join(map(repr, self.names))


class SeveralScorer(Scorer):
    """Reward models that are asked for the same responses, and whose rewards are combined.

    Results are `CombinedReward`; where one of the rewards has failed, that error, with its name.
    Models on different devices, and those on other machines, run side by side, all but the first
    on threads of their own.

    Parameters
    ----------
    parts : sequence of Part
        Together they give every reward once.
    combination : Combination
        Of all rewards.
    """

    def __init__(self, parts: Sequence[Part], combination: Combination) -> None:
        self._parts = tuple(parts)
        self._combination = combination
        self._count = sum(len(part.names) for part in parts)
        self._jobs = 0
        self.needs_text = any(part.scorer.needs_text for part in parts)
        self._lanes = _lanes(self._parts)
        others = len(self._lanes) - 1
        self._threads = futures.ThreadPoolExecutor(others, "stars-fast-rm") if others else None

    @property
    def devices(self) -> frozenset[torch.device]:
        """Devices of all models."""
        return frozenset().union(*(part.scorer.devices for part in self._parts))

    @property
    def modules(self) -> list[PreTrainedModel]:
        """All models, each once."""
        found = [module for part in self._parts for module in part.scorer.modules]
        return list({id(module): module for module in found}.values())

    def start(self, request: int, prompt: Prompt, max_response_tokens: int) -> None:
        """Admit a request to all models, or to none; see `Scorer.start`."""
        try:
            for part in self._parts:
                try:
                    part.scorer.start(request, prompt, max_response_tokens)
                except ValueError as error:
                    raise ValueError(f"reward {part.name}: {error}") from error
        except BaseException:
            self.finish(request)
            raise

    def score(self, jobs: Sequence[ScoreJob]) -> list[float | Exception]:
        """Score every job by every model; see `Scorer.score`."""
        self._jobs += len(jobs)
        values = [[0.0] * self._count for _ in jobs]
        errors: dict[int, RewardError] = {}
        for part, scored in self._scored(jobs):
            for number, reward in enumerate(scored):
                if isinstance(reward, Exception):
                    errors.setdefault(number, _named(part.name, reward))
                    continue
                each = reward.parts if isinstance(reward, HeadRewards) else (reward,)
                for place, head in zip(part.places, part.heads, strict=True):
                    values[number][place] = each[head]
        return [
            errors[number] if number in errors else self._combination.of(values[number])
            for number in range(len(jobs))
        ]

    def _scored(self, jobs: Sequence[ScoreJob]) -> list[tuple[Part, list[float | Exception]]]:
        first, *others = self._lanes
        if self._threads is None:
            return _run(first, jobs)
        running = [self._threads.submit(_run, lane, jobs) for lane in others]
        try:
            found = _run(first, jobs)
        finally:
            futures.wait(running)  # whatever has happened, nothing runs on behind the caller
        return found + [pair for lane in running for pair in lane.result()]

    def keep(self, request: int, branch: int) -> None:
        """See `Scorer.keep`."""
        for part in self._parts:
            part.scorer.keep(request, branch)

    def accept(self, request: int, branch: int) -> None:
        """See `Scorer.accept`."""
        for part in self._parts:
            part.scorer.accept(request, branch)

    def fork(self, source: int, target: int) -> None:
        """See `Scorer.fork`."""
        for part in self._parts:
            part.scorer.fork(source, target)

    def prune(self, request: int) -> None:
        """See `Scorer.prune`."""
        for part in self._parts:
            part.scorer.prune(request)

    def finish(self, request: int) -> None:
        """Forget the request."""
        for part in self._parts:
            part.scorer.finish(request)

    def take_tokens(self) -> dict[int, int]:
        """Return the tokens run for each request, of all models together."""
        total: Counter[int] = Counter()
        for part in self._parts:
            total.update(part.scorer.take_tokens())
        return total

    def stats(self) -> dict[str, int]:
        """Return the sums of the models' counters; a job is one, however many models score it."""
        total: Counter[str] = Counter()
        for part in self._parts:
            total.update(part.scorer.stats())
        return {**total, "rm_jobs": self._jobs}


def _lanes(parts: Sequence[Part]) -> list[list[Part]]:
    """Return the parts that run one after the other; functions run with the first of them."""
    lanes: dict[Scorer | torch.device | None, list[Part]] = {}
    for part in parts:
        scorer = part.scorer
        lanes.setdefault(scorer if scorer.remote else scorer.device, []).append(part)
    anywhere = lanes.pop(None, [])
    found = list(lanes.values()) or [[]]
    return [anywhere + found[0], *found[1:]]


def _run(
    parts: Sequence[Part], jobs: Sequence[ScoreJob]
) -> list[tuple[Part, list[float | Exception]]]:
    with torch.inference_mode():  # which holds for one thread
        return [(part, part.scorer.score(jobs)) for part in parts]


def _named(name: str, error: Exception) -> RewardError:
    named = RewardError(f"{name}: {error}")
    named.__cause__ = error
    return named
