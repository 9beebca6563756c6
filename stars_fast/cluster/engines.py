"""Engines of workers, and the target reward that they share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stars_fast.cluster.rows import Row, request_of
from stars_fast.outputs import Calibration, TargetKind
from stars_fast.params import StarsParams
from stars_fast.prompts import PromptValue

if TYPE_CHECKING:
    from stars_fast.engine import Engine
    from stars_fast.rewards.load_several import RewardModelsLike

#: Prompts that `calibrate` draws samples for, as ``stars-fast generate`` does.
CALIBRATION_PROMPTS = 32
_SAMPLES_PER_PROMPT = 4


def load_engine(
    model: str | None, reward_model: RewardModelsLike | None, seed: int, options: dict[str, Any]
) -> Engine:
    """Return an engine, without progress bars in the log; `model` None is the demo's pair."""
    from stars_fast.engine import Engine
    from stars_fast.models.progress import quiet_libraries

    quiet_libraries()
    if model is None:
        return Engine.demo(seed=seed, **options)
    return Engine(model, reward_model, seed=seed, **options)


def calibrate(
    rows: Iterable[Row],
    model: str | None,
    reward_model: RewardModelsLike | None,
    *,
    quantile: float = 0.9,
    targets: TargetKind = "pooled",
    num_prompts: int | None = CALIBRATION_PROMPTS,
    params: StarsParams | None = None,
    seed: int = 0,
    num_cpus: float = 1,
    num_gpus: float = 0,
    **options: Any,
) -> Calibration:
    """Find the target reward of a run, once, for all workers to use.

    A Ray task with the requested resources does this. The target is that of ``stars-fast generate``
    with the same rows, seed and parameters.

    Parameters
    ----------
    rows
        Rows of the run; the first `num_prompts` valid requests are used.
    quantile
        Quantile of the rewards of unaligned samples, in (0, 1).
    targets
        As of `Engine.calibrate`.
    num_prompts
        At least 1, or None for all.
    num_cpus, num_gpus
        Resources of the task.
    model, reward_model, params, seed, options
        See `stars_fast.cluster.bulk.StarsMapper`.

    Raises
    ------
    ValueError
        If a parameter is out of range, or no row is a request.
    """
    import ray

    if not 0 < quantile < 1:
        raise ValueError(f"quantile must be in (0, 1), got {quantile}")
    if num_prompts is not None and num_prompts < 1:
        raise ValueError(f"num_prompts must be at least 1 or None, got {num_prompts}")
    base = params or StarsParams()
    prompts = _prompts(rows, base, seed, num_prompts)
    if not prompts:
        raise ValueError("rows must hold at least one request to calibrate on")
    task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(_calibrate)
    found: Calibration = ray.get(
        task.remote(model, reward_model, seed, options, prompts, quantile, targets, base)
    )
    return found


def _prompts(
    rows: Iterable[Row], base: StarsParams, seed: int, count: int | None
) -> list[PromptValue]:
    prompts: list[PromptValue] = []
    for row in rows:
        if len(prompts) == count:
            break
        try:
            prompts.append(request_of(row, base, seed).prompt)
        except (ValueError, TypeError):
            continue  # its own record will say so
    return prompts


def _calibrate(
    model: str | None,
    reward_model: RewardModelsLike | None,
    seed: int,
    options: dict[str, Any],
    prompts: list[PromptValue],
    quantile: float,
    targets: TargetKind,
    params: StarsParams,
) -> Calibration:
    engine = load_engine(model, reward_model, seed, options)
    return engine.calibrate(
        prompts,
        quantile,
        _SAMPLES_PER_PROMPT,
        replace(params, n=1),
        use_tqdm=False,
        targets=targets,
    )
