"""A simulated replica: a GPU with a language and a reward model, and the time of its rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from stars_fast import _core
from stars_fast.benchmarks.least import Machine, ModelCost, copy_work, forward_work, seen_keys
from stars_fast.benchmarks.models import (
    LLAMA_2_7B,
    LLAMA_3_1_8B,
    ONE_BILLION,
    Shape,
    language_model,
    reward_model,
)


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet: ceilings of bfloat16, and memory in bytes."""

    machine: Machine
    memory_bytes: float


#: Dense bfloat16, without sparsity. NVIDIA's data sheets of the SXM cards.
GPUS = {
    "h200": Gpu(Machine("H200", 4.8e12, 989e12), 141e9),
    "h100": Gpu(Machine("H100 SXM", 3.35e12, 989e12), 80e9),
    "a100": Gpu(Machine("A100 80GB SXM", 2.04e12, 312e12), 80e9),
}
MODELS = {
    "llama-2-7b": LLAMA_2_7B,
    "llama-3.1-8b": LLAMA_3_1_8B,
    "llama-3.2-1b": ONE_BILLION,
}


@dataclass(frozen=True)
class Replica:
    """A GPU with a language model and a reward model.

    Attributes
    ----------
    machine
        The rates that its rounds reach.
    step, prefill, score
        What a token costs in a decode step of the language model, in its prefill (without the
        head), and in the reward model.
    num_pages
        Of each model's pool; one is never given out.
    page_size
        Tokens.
    max_rows, max_prefill_tokens, fixed_cost_rows
        Of the scheduler; the defaults are the engine's on a GPU.
    overhead
        Seconds of a round that do not depend on its work: the host between launches.
    """

    machine: Machine
    step: ModelCost
    prefill: ModelCost
    score: ModelCost
    num_pages: int
    page_size: int = 16
    max_rows: int = 256
    max_prefill_tokens: int = 8192
    fixed_cost_rows: float = 256.0
    overhead: float = 1e-3

    @classmethod
    def of(
        cls,
        gpu: Gpu,
        language: Shape,
        reward: Shape,
        *,
        efficiency: float = 0.6,
        memory_share: float = 0.9,
        page_size: int = 16,
        max_rows: int = 256,
        max_prefill_tokens: int = 8192,
        overhead: float = 1e-3,
    ) -> Replica:
        """Return a replica whose models are in bfloat16 and whose pages fill the memory left.

        Parameters
        ----------
        gpu
            That holds both models.
        language, reward
            Shapes of the models.
        efficiency
            Part of the GPU's ceilings that rounds reach, in (0, 1].
        memory_share
            Part of the memory that weights and pages take; the rest is for activations.
        page_size, max_rows, max_prefill_tokens, overhead
            See the class.

        Raises
        ------
        ValueError
            If the models leave no room for pages.
        """
        lm, rm = language_model(language, device="meta"), reward_model(reward, device="meta")
        dtype = torch.bfloat16
        step = ModelCost.of(lm, dtype)
        prefill, score = (
            ModelCost.of(cast(PreTrainedModel, model.base_model), dtype) for model in (lm, rm)
        )
        weights = sum(p.numel() for model in (lm, rm) for p in model.parameters()) * dtype.itemsize
        left = gpu.memory_bytes * memory_share - weights
        num_pages = int(left // (page_size * (step.kv_bytes + score.kv_bytes)))
        if num_pages < 2:
            raise ValueError(
                f"the models' weights take {weights / 1e9:.1f} GB, which leaves no pages in "
                f"{memory_share:g} of the {gpu.memory_bytes / 1e9:.0f} GB of {gpu.machine.name}"
            )
        machine = Machine(
            gpu.machine.name,
            gpu.machine.bytes_per_second * efficiency,
            gpu.machine.operations_per_second * efficiency,
        )
        return cls(
            machine,
            step,
            prefill,
            score,
            num_pages,
            page_size=page_size,
            max_rows=max_rows,
            max_prefill_tokens=max_prefill_tokens,
            overhead=overhead,
        )


@dataclass(frozen=True)
class RoundTime:
    """Seconds of a round by phase.

    `score_segments` is what of `score` the segments alone would take: with `draft`, what the engine
    tells the scheduler, which learns from it what rows cost.
    """

    fork: float
    prefill: float
    draft: float
    score: float
    overhead: float
    score_segments: float

    @property
    def total(self) -> float:
        """Seconds of the whole round."""
        return self.fork + self.prefill + self.draft + self.score + self.overhead


def round_time(plan: _core.Plan, lengths: npt.NDArray[np.int32], replica: Replica) -> RoundTime:
    """Return the time of a round on a replica.

    Every row runs in every decode step, as in a captured graph. The prefix of a request is read
    once for all of its rows. A row's own tokens grow from step to step, which counts as their mean.
    The reward model runs the prompts in the pass that scores the segments.

    Parameters
    ----------
    plan
        Of the round.
    lengths
        Tokens of each row that the reward model reads, ``[R]``.
    replica
        That runs it.
    """
    machine = replica.machine
    slots = int(plan.copies[2].sum())
    fork = copy_work(replica.step, slots) + copy_work(replica.score, slots)

    chunk = plan.prefill
    begin, new = chunk.row_start.astype(np.int64), chunk.new_lengths.astype(np.int64)
    prompt_tokens, prompt_prefix = chunk.num_tokens, int(begin.sum())
    prompt_keys = seen_keys(begin, new)
    prefill = forward_work(replica.prefill, prompt_tokens, prompt_prefix, prompt_keys)

    batch = plan.draft
    rows, steps = batch.num_rows, batch.max_new
    cached = int((batch.group_extent - (batch.padding_end - batch.padding_start)).sum())
    start = batch.row_start.astype(np.int64)
    own = (steps - 1) / 2  # tokens of the segment before the step, on average
    step = forward_work(
        replica.step, rows, cached + rows * own, float(start.sum()) + rows * (own + 1)
    )

    # What the first decode step feeds, the last committed token, the reward model has seen already.
    segments = forward_work(
        replica.score,
        int(lengths.sum()),
        cached + batch.num_groups,
        seen_keys(start + 1, lengths.astype(np.int64)),
    )
    read = forward_work(
        replica.score,
        int(lengths.sum()) + prompt_tokens,
        cached + batch.num_groups + prompt_prefix,
        seen_keys(start + 1, lengths.astype(np.int64)) + prompt_keys,
    )
    return RoundTime(
        fork=fork.seconds(machine),
        prefill=prefill.seconds(machine) if prompt_tokens else 0.0,
        draft=steps * step.seconds(machine) if rows else 0.0,
        score=read.seconds(machine) if rows or prompt_tokens else 0.0,
        overhead=replica.overhead,
        score_segments=segments.seconds(machine) if rows else 0.0,
    )
