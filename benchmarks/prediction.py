"""What a GPU is predicted to reach, from the part of its ceilings that each kind of work reaches.

    python benchmarks/prediction.py

The real scheduler plans the rounds and a clock takes the time of their work (`capacity`), at the
efficiencies of `EXPECTED`. None of these has been measured on this code: they are a model, printed
beside what is measured so that the first GPU shows where the model is wrong. Run by itself, it
prints what it predicts of the paper's setting, and what each part would give at its ceiling.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stars_fast import _core
from stars_fast.benchmarks.capacity.replica import Gpu, Replica, RoundTime, round_time
from stars_fast.benchmarks.capacity.simulation import AUTO, TimeOf, simulate
from stars_fast.benchmarks.capacity.workload import Requests, Workload
from stars_fast.benchmarks.least import Machine, ModelCost, copy_work
from stars_fast.benchmarks.models import LLAMA_2_7B, Shape, language_model
from stars_fast.benchmarks.paper_steps import CENTRE, Cell
from stars_fast.benchmarks.roofline import PAGE_SIZE, max_rows, pages_needed
from stars_fast.tables import markdown_table

_WORKING = ("fork", "prefill", "draft", "score")
_SEEDS = 3
_MEMORY_BYTES = 80e9
_ITEM = 2  # bytes of bfloat16

#: Launches of a decode step of Llama, in a layer and beside the layers, as
#: tests/models/test_launches.py counts them.
LAYER_LAUNCHES, STEP_LAUNCHES = 11, 35
_LARGE = 5  # of a layer: four products and attention, whose time is that of what they read

#: Ceilings as such cards were measured: bytes and bfloat16 operations a second.
CARDS = (Machine("H100", 3.0e12, 798e12), Machine("H200", 4.3e12, 790e12))


@dataclass(frozen=True)
class Efficiency:
    """How near each kind of work comes to a GPU's ceilings, and what has no ceiling.

    Attributes
    ----------
    weights, attention, small
        Part of the bandwidth at which weights, keys and values, and what small kernels read and
        write between products, are moved. The least has nothing between products: `small` is
        infinite.
    products
        Part of the rate of matrix products, in (0, 1].
    launch_seconds
        Of a small kernel, at the least.
    host_seconds
        The host between the phases of a round of 128 rows; three tenths of it at none.
    """

    weights: float
    attention: float
    small: float
    products: float
    launch_seconds: float
    host_seconds: float


#: Of 7B models. Weights and products: of four joined products a layer. Attention: with several
#: buffers of keys and values. Host: what a device waits for, benchmarks/results/host-cpu.json.
EXPECTED = Efficiency(0.88, 0.80, 0.80, 0.78, 2.9e-6, 2.6e-3)
#: Where nothing is lost.
PERFECT = Efficiency(1.0, 1.0, math.inf, 1.0, 0.0, 0.0)
_PARTS = {
    "weights": "weights",
    "products": "products",
    "keys and values": "attention",
    "launches of small kernels": "launch_seconds",
    "what small kernels move": "small",
    "the host": "host_seconds",
}


@dataclass(frozen=True)
class Passes:
    """A model's passes over tokens.

    Attributes
    ----------
    cost
        Of its weights, and of keys and values.
    launches, small_bytes
        Of small kernels: in a pass, and what they read and write for a token.
    """

    cost: ModelCost
    launches: int
    small_bytes: int

    @classmethod
    def of(cls, cost: ModelCost, shape: Shape) -> Passes:
        """Return those of a Llama of this shape, in bfloat16."""
        hidden = shape.hidden_size
        keys = hidden * shape.num_key_value_heads // shape.num_attention_heads
        turned = 2 * (hidden + 2 * keys)  # queries and keys rotated, keys and values appended
        gated, added, normed = 3 * shape.intermediate_size, 3 * hidden, 2 * 4 * hidden
        moved = turned + gated + added + normed
        return cls(
            cost,
            STEP_LAUNCHES + shape.num_hidden_layers * (LAYER_LAUNCHES - _LARGE),
            _ITEM * shape.num_hidden_layers * moved,
        )

    def seconds(
        self, tokens: float, keys: float, machine: Machine, efficiency: Efficiency
    ) -> float:
        """Return the time of a pass over `tokens` that reads `keys` cached ones."""
        bandwidth = machine.bytes_per_second
        weights = self.cost.weight_bytes / (bandwidth * efficiency.weights)
        rate = machine.operations_per_second * efficiency.products
        products = max(weights, tokens * self.cost.operations / rate)
        moved = tokens * self.small_bytes / (bandwidth * efficiency.small)
        small = max(moved, self.launches * efficiency.launch_seconds)
        return products + small + keys * self.cost.kv_bytes / (bandwidth * efficiency.attention)


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


@dataclass(frozen=True)
class Models:
    """The models' passes: steps and prefill of the language model, and the rewards; None: none."""

    step: Passes
    prefill: Passes
    score: Passes | None

    @classmethod
    def of(cls, replica: Replica, language: Shape, reward: Shape | None) -> Models:
        """Return those of a replica's models."""
        return cls(
            Passes.of(replica.step, language),
            Passes.of(replica.prefill, language),
            None if reward is None else Passes.of(replica.score, reward),
        )


def predict(
    machine: Machine,
    cell: Cell,
    language: Shape,
    reward: Shape | None,
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
        Of its models; without rewards, every row is kept.
    efficiency
        That the work reaches.
    """
    if reward is None:
        cell = replace(cell, candidates=1, acceptance=1.0)
    rows = max_rows(cell.batch, cell.candidates)
    gpu = Gpu(machine, _MEMORY_BYTES)
    replica = Replica.of(
        gpu, language, reward or language, efficiency=1.0, overhead=0.0, max_rows=rows
    )
    pages = pages_needed(
        cell.batch, rows, cell.prompt, cell.max_tokens, cell.segment_length, PAGE_SIZE
    )
    replica = replace(replica, num_pages=min(pages, replica.num_pages))
    models = Models.of(replica, language, reward)
    phases: defaultdict[str, float] = defaultdict(float)

    def expected(plan: _core.Plan, lengths: npt.NDArray[np.int32], replica: Replica) -> RoundTime:
        taken = expected_time(plan, lengths, machine, models, efficiency)
        for name in _WORKING:
            phases[name] += getattr(taken, name) / _SEEDS
        phases["host"] += taken.overhead / _SEEDS
        return taken

    def least(plan: _core.Plan, lengths: npt.NDArray[np.int32], replica: Replica) -> RoundTime:
        taken = round_time(plan, lengths, replica)
        return taken if reward is not None else replace(taken, score=0.0, score_segments=0.0)

    runs = [_run(cell, replica, expected, seed) for seed in range(_SEEDS)]
    shortest = np.mean([_run(cell, replica, least, seed)[0] for seed in range(_SEEDS)])
    seconds, tokens, rounds, rows_mean = np.mean(runs, axis=0).tolist()
    return Prediction(
        tokens / seconds, seconds, rounds, rows_mean, float(shortest) / seconds, dict(phases)
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
    machine: Machine,
    models: Models,
    efficiency: Efficiency,
) -> RoundTime:
    """Return the time of a round at these efficiencies; `plan`, `lengths` as of `round_time`."""
    batch, prompts = plan.draft, plan.prefill.num_tokens
    rows, steps = batch.num_rows, batch.max_new
    cached = int((batch.group_extent - (batch.padding_end - batch.padding_start)).sum())
    slots = int(plan.copies[2].sum())
    drafted = int(lengths.sum())
    own = (steps - 1) / 2  # tokens of the segment before the step, on average
    fork = copy_work(models.step.cost, slots)
    step = models.step.seconds(rows, cached + rows * own, machine, efficiency)
    prefill = models.prefill.seconds(prompts, 0, machine, efficiency)
    score = score_segments = 0.0
    if models.score is not None:
        fork += copy_work(models.score.cost, slots)
        score = models.score.seconds(drafted + prompts, cached, machine, efficiency)
        score_segments = models.score.seconds(drafted, cached, machine, efficiency)
    return RoundTime(
        fork=fork.seconds(machine),
        prefill=prefill if prompts else 0.0,
        draft=steps * step if rows else 0.0,
        score=score if rows or prompts else 0.0,
        overhead=efficiency.host_seconds * (0.3 + 0.7 * rows / 128),
        score_segments=score_segments if rows else 0.0,
    )


def step_milliseconds(machine: Machine, shape: Shape, rows: int, keys: float) -> float:
    """Return the predicted time of a decode step of `rows` rows that reads `keys` cached tokens."""
    cost = ModelCost.of(language_model(shape, device="meta"), torch.bfloat16)
    return 1e3 * Passes.of(cost, shape).seconds(rows, keys, machine, EXPECTED)


def kernel_share(name: str, operations: float) -> float | None:
    """Return the part of the least that a kernel is expected to reach; None: it is not modelled."""
    if name.startswith(("sample", "experts")):
        return None
    return EXPECTED.attention if operations else EXPECTED.small


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


# The page of docs


def table(machine: Machine) -> str:
    """Return what is predicted of the centre and of longer segments, as a table in Markdown.

    Seconds by phase, and the share of the roofline if a part alone were at its ceiling.
    """
    settings = [CENTRE, replace(CENTRE, segment_length=30)]
    found = [predict(machine, cell, LLAMA_2_7B, LLAMA_2_7B) for cell in settings]
    rows = [
        ["accepted tokens/s", *(f"{x.accepted_tokens_per_second:,.0f}" for x in found)],
        ["share of the roofline", *map(_share, found)],
        *([f"{name}, s", *(f"{x.phases[name]:.2f}" for x in found)] for name in found[0].phases),
    ]
    for part, name in _PARTS.items():
        ideal = replace(EXPECTED, **{name: getattr(PERFECT, name)})
        best = [predict(machine, cell, LLAMA_2_7B, LLAMA_2_7B, ideal) for cell in settings]
        rows.append([f"share if nothing is lost in {part}", *map(_share, best)])
    return markdown_table([machine.name, *(f"K = {x.segment_length}" for x in settings)], rows)


def _share(found: Prediction) -> str:
    return f"{100 * found.share_of_the_least:.0f} %"


if __name__ == "__main__":
    sys.stdout.write("\n\n".join(table(machine) for machine in CARDS) + "\n")
