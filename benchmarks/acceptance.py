"""The target reward at which a given part of the attempts pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from stars_fast import Engine, StarsParams

#: Below every reward, so that every attempt passes.
EASY_TARGET = -1e9


def target_for(
    engine: Engine,
    prompts: Sequence[list[int]],
    params: StarsParams,
    rate: float,
    *,
    alpha: float = 1.0,
    tolerance: float = 0.05,
    max_runs: int = 16,
) -> float:
    """Find the target reward at which a part `rate` of the attempts pass, by bisection.

    Runs the prompts again and again, with seeds 0, 1, .... The first guess is made from the rewards
    of attempts that all pass; from there the rate, which falls as the target rises, is bracketed
    and bisected. A segment that falls back has failed all of its attempts.

    The rate is that of these prompts and seeds. On others it may be far off: a few prompts whose
    rewards are low take most of the attempts.

    Parameters
    ----------
    engine
        Without requests. Its calibration is left as it is; what it has learned of acceptance rates
        and of the cost of rows, and its prefix cache, are not.
    prompts
        Token ids; enough, or of enough segments, for the tolerance: the rate moves in steps of
        about one in the number of attempts.
    params
        Of a method with an accept test; `target_reward`, `alpha` and `seed` are replaced.
    rate
        Tests passed / attempts, in (0, 1]. 1.0 gives a target far below every reward, without a
        run.
    alpha
        Of the threshold's schedule: 1.0 is a threshold that is the target throughout. The target
        holds for runs with this `alpha`.
    tolerance
        Difference from `rate`, above 0, at which the search ends.
    max_runs
        Runs after which it gives up, at least 1.

    Raises
    ------
    ValueError
        If a parameter is out of its range.
    RuntimeError
        If no run came within the tolerance, with the nearest; or if a request fails.
    """
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"rate must be in (0, 1], got {rate!r}")
    if not tolerance > 0.0:
        raise ValueError(f"tolerance must be above 0, got {tolerance!r}")
    if max_runs < 1:
        raise ValueError(f"max_runs must be at least 1, got {max_runs!r}")
    if not params.scored:
        raise ValueError(f"method must be one with an accept test, got {params.method!r}")
    if not prompts:
        raise ValueError("prompts must be at least one, got none")
    if rate == 1.0:
        return EASY_TARGET
    params = replace(params, alpha=alpha)
    _, rewards = _run(engine, prompts, params, EASY_TARGET)
    target = _guess(rewards, params, rate)
    width = 0.25 * max(float(rewards.std()), params.beta if params.acceptance == "soft" else 0.0)
    low = high = None  # targets that are too low and too high
    nearest: tuple[float, float] | None = None  # rate, target
    for _ in range(max_runs):
        found, _ = _run(engine, prompts, params, target)
        if abs(found - rate) <= tolerance:
            return target
        if nearest is None or abs(found - rate) < abs(nearest[0] - rate):
            nearest = found, target
        if found > rate:
            low = target
        else:
            high = target
        if low is not None and high is not None:
            target = (low + high) / 2
        else:
            target += width if high is None else -width
            width *= 2
    assert nearest is not None
    raise RuntimeError(
        f"no target within {tolerance} of rate {rate} in {max_runs} runs: the nearest is "
        f"{nearest[0]:.3f} at {nearest[1]:.6g}; give more prompts or a larger tolerance"
    )


def _run(
    engine: Engine, prompts: Sequence[list[int]], params: StarsParams, target: float
) -> tuple[float, npt.NDArray[np.float64]]:
    """Return the acceptance rate of a run, and the rewards of its segments."""
    each = [replace(params, target_reward=target, seed=i) for i in range(len(prompts))]
    before = engine.stats()
    outputs = engine.generate(list(prompts), each, use_tqdm=False)
    failed = next((output.error for output in outputs if output.error is not None), None)
    if failed is not None:
        raise RuntimeError(f"a request failed: {failed}")
    after = engine.stats()
    attempts, segments, fallbacks = (
        after[name] - before[name] for name in ("attempts", "segments", "fallbacks")
    )
    rewards = [s.reward for output in outputs for o in output.outputs for s in o.segments]
    return (segments - fallbacks) / attempts, np.array(rewards, np.float64)


def _guess(rewards: npt.NDArray[np.float64], params: StarsParams, rate: float) -> float:
    """Return the threshold that a part `rate` of the rewards would pass, each tested once."""
    if params.acceptance == "hard":
        return float(np.quantile(rewards, 1.0 - rate))
    low, high = float(rewards.min()), float(rewards.max() - params.beta * np.log(rate))
    for _ in range(50):
        middle = (low + high) / 2
        passed = np.exp(np.minimum(0.0, (rewards - middle) / params.beta)).mean()
        low, high = (middle, high) if passed > rate else (low, middle)
    return low
