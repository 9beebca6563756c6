"""What a group of paths does, told plainly: the oracle of the core's groups."""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
from helpers.scheduler_draws import PURPOSE_RESAMPLE, Event, Spec, purpose_uniform

from stars_fast import _core


@dataclass(frozen=True)
class Generation:
    """A segment of every path that grows, and what becomes of the paths; by their numbers."""

    events: dict[int, Event]
    copies: list[tuple[int, int]]  # target, source
    dropped: list[int]
    chosen: int | None

    @property
    def fails(self) -> bool:
        return any(event.kind == _core.EVENT_FAILED for event in self.events.values())


@dataclass
class Path:
    position: int = 0
    stream: int = 0
    reward: float = 0.0
    before: float = 0.0  # the reward when weights were last made equal
    breaks: bool = False
    alive: bool = True
    grows: bool = True


@dataclass(frozen=True)
class GroupSpec:
    """Paths that differ in their seeds, and how they are compared."""

    paths: list[Spec]
    resample: bool
    seed: int
    beta: float = 1.0
    ess_threshold: float = 0.5
    rejection_rate: float = 0.5

    def add_to(self, scheduler: _core.Scheduler, requests: list[int]) -> None:
        path = self.paths[0]
        scheduler.add_group(
            requests,
            [spec.seed for spec in self.paths],
            np.array(path.prompt, np.int64),
            resample=self.resample,
            segment_length=path.segment_length,
            max_tokens=path.max_tokens,
            seed=self.seed,
            beta=self.beta,
            ess_threshold=self.ess_threshold,
            rejection_rate=self.rejection_rate,
        )

    def outcome(self) -> list[Generation]:
        """What the group does, one generation after the other."""
        paths = [Path() for _ in self.paths]
        generations: list[Generation] = []
        while not generations or (generations[-1].chosen is None and not generations[-1].fails):
            events = {
                number: self.paths[number].outcome_at(path.position, path.stream)
                for number, path in enumerate(paths)
                if path.alive and path.grows
            }
            for number, event in events.items():
                path = paths[number]
                path.position += len(event.tokens)
                drawn = self.paths[number].draw(event.start, 0, path.stream)
                path.reward, path.breaks = drawn.reward, drawn.breaks
                path.grows = event.goes_on
            generation = Generation(events, [], [], None)
            if not generation.fails:
                compare = self._resample if self.resample else self._prune
                generation = Generation(events, *compare(paths, len(generations)))
            generations.append(generation)
        return generations

    def _resample(
        self, paths: list[Path], generation: int
    ) -> tuple[list[tuple[int, int]], list[int], int | None]:
        some_keep = not all(path.breaks for path in paths)
        logs = [
            -math.inf if path.breaks and some_keep else (path.reward - path.before) / self.beta
            for path in paths
        ]
        weights = [math.exp(log - max(logs)) for log in logs]
        ends = list(itertools.accumulate(weights))
        number = len(paths)
        copies: list[tuple[int, int]] = []
        if any(path.grows for path in paths):
            effective = ends[-1] ** 2 / sum(weight**2 for weight in weights)
            if effective >= self.ess_threshold * number:
                return [], [], None
            uniform = purpose_uniform(self.seed, generation, 0, 0, PURPOSE_RESAMPLE)
            points = [(k + uniform) / number * ends[-1] for k in range(number)]
            drawn = [bisect.bisect(ends, point) for point in points]
            spare = [path for path in range(number) for _ in range(drawn.count(path) - 1)]
            gone = [path for path in range(number) if path not in drawn]
            copies = list(zip(gone, spare, strict=True))
            for target, source in copies:
                paths[target] = replace(paths[source], stream=generation + 1)
            for path in paths:
                path.before = path.reward
            if any(path.grows for path in paths):
                return copies, [], None
            ends = [float(path + 1) for path in range(number)]
        uniform = purpose_uniform(self.seed, generation, 1, 0, PURPOSE_RESAMPLE)
        return copies, [], bisect.bisect_left(ends, uniform * ends[-1])

    def _prune(
        self, paths: list[Path], _: int
    ) -> tuple[list[tuple[int, int]], list[int], int | None]:
        alive = [number for number, path in enumerate(paths) if path.alive]
        alive.sort(key=lambda number: (paths[number].breaks, -paths[number].reward))
        keep = max(1, round((1 - self.rejection_rate) * len(alive)))
        for number in alive[keep:]:
            paths[number].alive = False
        grows = any(paths[number].grows for number in alive[:keep])
        return [], alive[keep:], None if grows else alive[0]
