"""What a GPU is predicted to reach, from the part of its ceilings that each kind of work reaches.

The real scheduler plans the rounds and a clock takes the time of their work (`capacity`), at the
efficiencies of `EXPECTED`. None of these has been measured on this code: they are a model, printed
beside what is measured so that the first GPU shows where the model is wrong.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from stars_fast import _core
from stars_fast.benchmarks.capacity.replica import Gpu, Replica, RoundTime, round_time
from stars_fast.benchmarks.capacity.simulation import AUTO, TimeOf, simulate
from stars_fast.benchmarks.capacity.workload import Requests, Workload
from stars_fast.benchmarks.least import Machine, copy_work
from stars_fast.benchmarks.models import Shape
from stars_fast.benchmarks.paper_steps import Cell
from stars_fast.benchmarks.roofline import PAGE_SIZE, max_rows, pages_needed

_WORKING = ("fork", "prefill", "draft", "score")
_SEEDS = 3
_MEMORY_BYTES = 80e9


@dataclass(frozen=True)
class Efficiency:
    """How near each kind of work comes to a GPU's ceilings, and what has no ceiling.

    Attributes
    ----------
    weights, attention
        Part of the bandwidth, in (0, 1], at which weights, and keys and values, are read.
    products
        Part of the rate of matrix products, in (0, 1].
    step_seconds
        Small kernels of a decode step, 1,000 in 32 layers.
    pass_seconds
        Those of a pass over 1,920 tokens; at least the time of 300.
    host_seconds
        The host between the phases of a round of 128 rows; three tenths of it at none.
    """

    weights: float
    attention: float
    products: float
    step_seconds: float
    pass_seconds: float
    host_seconds: float


#: Of 7B models. Attention: 0.55 with one buffer of keys and values, 0.8 with the several there are.
EXPECTED = Efficiency(0.80, 0.80, 0.75, 2.9e-3, 12e-3, 12e-3)


@dataclass(frozen=True)
class Prediction:
    """A setting's predicted figures, means over seeds.

    Attributes
    ----------
    accepted_tokens_per_second, seconds, rounds, rows_mean
        Of the whole run; rows of a round.
    share_of_the_least
        The least time of the same requests over `seconds`.
    phases
        Seconds by phase, ``host`` what is between them.
    """

    accepted_tokens_per_second: float
    seconds: float
    rounds: float
    rows_mean: float
    share_of_the_least: float
    phases: dict[str, float]


def predict(
    machine: Machine,
    cell: Cell,
    language: Shape,
    reward: Shape,
    efficiency: Efficiency = EXPECTED,
) -> Prediction:
    """Predict a cell of the paper's setting whose requests are all there at its start.

    Parameters
    ----------
    machine
        Measured ceilings.
    cell
        Each of its attempts passes with the same probability.
    language, reward
        Of its models.
    efficiency
        That the work reaches.
    """
    rows = max_rows(cell.batch, cell.candidates)
    gpu = Gpu(machine, _MEMORY_BYTES)
    replica = Replica.of(gpu, language, reward, efficiency=1.0, overhead=0.0, max_rows=rows)
    pages = pages_needed(
        cell.batch, rows, cell.prompt, cell.max_tokens, cell.segment_length, PAGE_SIZE
    )
    replica = replace(replica, num_pages=min(pages, replica.num_pages))
    phases: defaultdict[str, float] = defaultdict(float)

    def expected(plan: _core.Plan, lengths: npt.NDArray[np.int32], replica: Replica) -> RoundTime:
        taken = expected_time(plan, lengths, replica, efficiency)
        for name in _WORKING:
            phases[name] += getattr(taken, name) / _SEEDS
        phases["host"] += taken.overhead / _SEEDS
        return taken

    runs = [_run(cell, replica, expected, seed) for seed in range(_SEEDS)]
    least = np.mean([_run(cell, replica, round_time, seed)[0] for seed in range(_SEEDS)])
    seconds, tokens, rounds, rows_mean = np.mean(runs, axis=0).tolist()
    return Prediction(
        tokens / seconds, seconds, rounds, rows_mean, float(least) / seconds, dict(phases)
    )


def _run(cell: Cell, replica: Replica, time_of: TimeOf, seed: int) -> tuple[float, ...]:
    """Seconds, tokens, rounds and the mean of a round's rows."""
    count = cell.requests
    requests = Requests(
        arrival=np.zeros(count),
        prompt_length=np.full(count, cell.prompt),
        response_length=np.full(count, cell.max_tokens),
        pass_rate=np.full(count, cell.acceptance),
    )
    workload = Workload(max_tokens=cell.max_tokens, segment_length=cell.segment_length)
    candidates = AUTO if cell.candidates == "auto" else cell.candidates
    done = simulate(requests, workload, replica, candidates, seed=seed, time_of=time_of)
    rows = done.rounds.rows
    return float(done.end.max()), float(done.tokens.sum()), float(len(rows)), float(rows.mean())


def expected_time(
    plan: _core.Plan,
    lengths: npt.NDArray[np.int32],
    replica: Replica,
    efficiency: Efficiency,
) -> RoundTime:
    """Return the time of a round at these efficiencies; arguments as those of `round_time`."""
    machine, batch = replica.machine, plan.draft
    rows, steps, prompts = batch.num_rows, batch.max_new, plan.prefill.num_tokens
    rate = machine.operations_per_second * efficiency.products
    weights = machine.bytes_per_second * efficiency.weights
    attention = machine.bytes_per_second * efficiency.attention
    cached = int((batch.group_extent - (batch.padding_end - batch.padding_start)).sum())
    slots = int(plan.copies[2].sum())

    def score(tokens: int) -> float:
        products = max(
            replica.score.weight_bytes / weights, tokens * replica.score.operations / rate
        )
        small = efficiency.pass_seconds * max(tokens, 300) / 1920
        return products + small + cached * replica.score.kv_bytes / attention

    own = (steps - 1) / 2  # tokens of the segment before the step, on average
    products = max(replica.step.weight_bytes / weights, rows * replica.step.operations / rate)
    step = products + (cached + rows * own) * replica.step.kv_bytes / attention
    step += efficiency.step_seconds
    prefill = prompts * replica.prefill.operations / rate + efficiency.pass_seconds * prompts / 1920
    drafted = int(lengths.sum())
    return RoundTime(
        fork=(copy_work(replica.step, slots) + copy_work(replica.score, slots)).seconds(machine),
        prefill=prefill,
        draft=steps * step if rows else 0.0,
        score=score(drafted + prompts) if rows or prompts else 0.0,
        overhead=efficiency.host_seconds * (0.3 + 0.7 * rows / 128),
        score_segments=score(drafted) if rows else 0.0,
    )


def beside(found: dict[str, Any], predicted: Prediction) -> list[list[str]]:
    """Return rows of a table, each figure measured and predicted.

    Parameters
    ----------
    found
        As `stars_fast.benchmarks.observe.Run.record` makes it.
    predicted
        Of the same cell.
    """
    rows = [
        ["accepted tokens/s", *(f"{x:,.0f}" for x in (
            found["accepted_tokens_per_second"], predicted.accepted_tokens_per_second))],
        ["share of the roofline", *(f"{x:.0%}" for x in (
            found["share_of_the_least"], predicted.share_of_the_least))],
        ["rounds", *(f"{x:.0f}" for x in (found["rounds"], predicted.rounds))],
        ["whole, s", *(f"{x:.3f}" for x in (found["seconds"], predicted.seconds))],
    ]  # fmt: skip
    measured = {phase["name"]: phase["seconds"] for phase in found["phases"]}
    between = found["seconds"] - sum(measured.get(name, 0.0) for name in _WORKING)
    measured = {name: measured.get(name, 0.0) for name in _WORKING} | {"host": between}
    rows += [
        [f"{name}, s", f"{seconds:.3f}", f"{predicted.phases[name]:.3f}"]
        for name, seconds in measured.items()
    ]
    return rows
