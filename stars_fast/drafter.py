"""The draft phase of a round: K decode steps for all rows, token ids staying on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stars_fast import _core, ops
from stars_fast.models.paged import PagedModel


@dataclass(frozen=True)
class RowSampling:
    """How a row is sampled; one object a request, shared by its rows."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Draft:
    """Segments drawn in a round, on the host.

    Attributes
    ----------
    tokens
        int64 ``[R, L]``; entries from a row's length on are meaningless.
    lengths
        int32 ``[R]``, the stop token that ended a row included.
    stopped
        bool ``[R]``: the row's last token is one of its stop tokens.
    logprobs
        float32 ``[R, L]`` under the raw distribution.
    bad_step
        int64 ``[R]``: the first step whose logits were NaN, +inf or all -inf; -1 if none.
    """

    tokens: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int32]
    stopped: npt.NDArray[np.bool_]
    logprobs: npt.NDArray[np.float32]
    bad_step: npt.NDArray[np.int64]


def draft(model: PagedModel, plan: _core.Plan, sampling: Sequence[RowSampling]) -> Draft:
    """Draw the segment of every row of the plan.

    Parameters
    ----------
    model
        The language model; the KV of the drawn tokens is written to its pages.
    plan
        The round; its prefill must have run.
    sampling
        One entry per row of ``plan.draft``.
    """
    batch = plan.draft
    rows, steps = batch.num_rows, batch.max_new
    device = model.device
    if rows == 0:  # every request of the round is still in its prefill
        nothing = np.zeros(0, np.int64)
        return Draft(
            np.zeros((0, 0), np.int64),
            nothing.astype(np.int32),
            nothing.astype(np.bool_),
            np.zeros((0, 0), np.float32),
            nothing,
        )
    lengths = torch.from_numpy(batch.new_lengths).to(device)
    temperature, top_k, top_p, min_p = _parameter_tensors(sampling, device)
    stop_ids = _stop_tensor(sampling, device)
    seed = torch.from_numpy(plan.seed).to(device)
    position = torch.from_numpy(plan.position).to(device)
    attempt = torch.from_numpy(plan.attempt).to(device)

    tokens = torch.zeros((rows, steps), dtype=torch.int64, device=device)
    logprobs = torch.zeros((rows, steps), dtype=torch.float32, device=device)
    ended_at = lengths.clone()  # tokens of the row once it is over
    stopped = torch.zeros(rows, dtype=torch.bool, device=device)
    bad_step = torch.full((rows,), -1, dtype=torch.int64, device=device)
    ids = torch.from_numpy(plan.first_token).to(device)
    state = model.begin_decode(batch)
    for step in range(steps):
        logits = model.decode_step(state, step, ids)
        ids, logprob, _, ok = ops.sample(
            logits, temperature, top_k, top_p, min_p, seed, position + step, attempt
        )
        tokens[:, step] = ids
        logprobs[:, step] = logprob
        live = ended_at > step
        bad_step = torch.where(live & ~ok & (bad_step < 0), step, bad_step)
        stops = live & (ids.unsqueeze(1) == stop_ids).any(dim=1)
        stopped |= stops
        ended_at = torch.where(stops, step + 1, ended_at)
        # On the CPU a look at the rows is free, on a GPU it would be a host sync.
        if device.type == "cpu" and bool((ended_at <= step + 1).all()):
            break
    return Draft(
        tokens.cpu().numpy(),
        ended_at.cpu().numpy(),
        stopped.cpu().numpy(),
        logprobs.cpu().numpy(),
        bad_step.cpu().numpy(),
    )


def _parameter_tensors(
    sampling: Sequence[RowSampling], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values = np.array([(s.temperature, s.top_k, s.top_p, s.min_p) for s in sampling], np.float64)
    table = torch.from_numpy(values).to(device)
    floats = table.to(torch.float32)
    return floats[:, 0], table[:, 1].to(torch.int32), floats[:, 2], floats[:, 3]


def _stop_tensor(sampling: Sequence[RowSampling], device: torch.device) -> Tensor:
    """Return int64 ``[R, S]``, padded with -1, which no token is."""
    width = max(1, *(len(s.stop_token_ids) for s in sampling))
    table = np.full((len(sampling), width), -1, np.int64)
    for row, s in enumerate(sampling):
        table[row, : len(s.stop_token_ids)] = s.stop_token_ids
    return torch.from_numpy(table).to(device)
