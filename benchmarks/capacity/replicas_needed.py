"""What a simulated replica can do, and how many of them a load needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from stars_fast.benchmarks.capacity.replica import Replica
from stars_fast.benchmarks.capacity.simulation import simulate
from stars_fast.benchmarks.capacity.workload import Workload


def saturation(
    workload: Workload,
    replica: Replica,
    candidates: int,
    *,
    count: int,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> float:
    """Return the requests per second of a replica that always has a queue.

    All requests are there at the start; those that end between a tenth and six tenths of the way
    count, so the queue has neither just begun nor come to its end. Give several times as many as
    run at once.
    """
    requests = workload.draw(count, np.inf, seed)
    outcome = simulate(requests, workload, replica, candidates, seed=seed, progress=progress)
    ends = np.sort(outcome.end)
    low, high = int(0.1 * count), int(0.6 * count)
    return float((high - low) / (ends[high] - ends[low]))


@dataclass(frozen=True)
class Limits:
    """What users must get: upper limits in seconds of the summary's figures; None: no limit."""

    wait_seconds_p99: float | None = None
    first_seconds_p99: float | None = None
    end_seconds_p99: float | None = None

    def hold(self, summary: dict[str, float]) -> bool:
        """Whether all of them hold."""
        limits = asdict(self).items()
        return all(limit is None or summary[name] <= limit for name, limit in limits)


def replicas_needed(
    workload: Workload,
    replica: Replica,
    candidates: int,
    load: float,
    limits: Limits,
    *,
    count: int,
    most: int,
    seed: int = 0,
) -> tuple[int, dict[str, float]] | None:
    """Return the least number of replicas that holds the limits, and the figures of one of them.

    Each request goes to one of the replicas at random, so that each has a Poisson load.

    Parameters
    ----------
    workload, replica, candidates, seed
        As `simulate` takes them.
    load
        Requests per second in all.
    limits
        To be held.
    count
        Requests of each trial.
    most
        Replicas to try, at most.

    Returns
    -------
    tuple or None
        None: `most` replicas do not hold the limits.
    """
    # Fewer cannot keep up at all, whatever a short trial says.
    low = int(load // saturation(workload, replica, candidates, count=count, seed=seed))
    tried: dict[int, dict[str, float]] = {}

    def holds(replicas: int) -> bool:
        requests = workload.draw(count, load / replicas, seed)
        tried[replicas] = simulate(requests, workload, replica, candidates, seed=seed).summary()
        return limits.hold(tried[replicas])

    # `low` replicas do not hold the limits; steps that double find some that do.
    high, step = low + 1, 1
    while high <= most and not holds(high):
        low, high, step = high, high + step, 2 * step
    if high > most:
        if low >= most or not holds(most):
            return None
        high = most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high, tried[high]
