"""Some rows of a round, as a round of their own, and drafts of parts of a round as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stars_fast.drafting.base import Draft, RowSampling
from stars_fast.ops.batch import BatchLike, RowBatch


class RowPlan(Protocol):
    """What drafters on models that are here read of a plan."""

    @property
    def draft(self) -> BatchLike:
        """The rows."""
        ...

    @property
    def first_token(self) -> npt.NDArray[np.int64]:
        """The token before the first new one ``[R]``, fed first."""
        ...

    @property
    def seed(self) -> npt.NDArray[np.int64]:
        """The bits of the key ``[R]``."""
        ...

    @property
    def position(self) -> npt.NDArray[np.int32]:
        """Response position of the first new token ``[R]``."""
        ...

    @property
    def attempt(self) -> npt.NDArray[np.int32]:
        """Number of the attempt within its segment ``[R]``."""
        ...

    @property
    def stream(self) -> npt.NDArray[np.int32]:
        """Stream that names the row's draws ``[R]``."""
        ...


class RowDrafter(Protocol):
    """A `Drafter` that can draw some rows of a plan."""

    def draft(self, plan: RowPlan, sampling: Sequence[RowSampling]) -> Draft:
        """Draw them; see `Drafter.draft`."""
        ...


@dataclass(frozen=True)
class PlanRows:
    """Some rows of a plan; a `RowPlan`."""

    draft: BatchLike
    first_token: npt.NDArray[np.int64]
    seed: npt.NDArray[np.int64]
    position: npt.NDArray[np.int32]
    attempt: npt.NDArray[np.int32]
    stream: npt.NDArray[np.int32]

    @classmethod
    def of(cls, plan: RowPlan, rows: Sequence[int]) -> RowPlan:
        """Return these rows, in ascending order; the plan itself if they are all."""
        if len(rows) == plan.draft.num_rows:
            return plan
        at = np.array(rows, np.int64)
        return cls(
            some_rows(plan.draft, at, plan.draft.new_lengths[at]),
            plan.first_token[at],
            plan.seed[at],
            plan.position[at],
            plan.attempt[at],
            plan.stream[at],
        )


def some_rows(
    batch: BatchLike, rows: npt.NDArray[np.int64], lengths: npt.NDArray[np.int32]
) -> RowBatch:
    """Return rows of a batch, ascending, with the first so many of their new tokens."""
    groups, of_row = np.unique(batch.row_group[rows], return_inverse=True)
    return RowBatch(
        group_pages=np.ascontiguousarray(batch.group_pages[groups]),
        padding_start=batch.padding_start[groups],
        padding_end=batch.padding_end[groups],
        row_group=of_row.astype(np.int32),
        row_start=batch.row_start[rows],
        new_lengths=lengths.astype(np.int32),
        slots=np.ascontiguousarray(batch.slots[rows, : int(lengths.max())]),
    )


def joined(parts: Sequence[tuple[Sequence[int], Draft]]) -> Draft:
    """Return the draft of a round whose rows have been drafted in parts, each with its rows."""
    if len(parts) == 1:
        return parts[0][1]
    drafts = [draft for _, draft in parts]
    rows = sum(len(draft.lengths) for draft in drafts)
    steps = max(draft.tokens.shape[1] for draft in drafts)

    def table(name: str, fill: float = 0) -> npt.NDArray[np.generic] | None:
        found = [getattr(draft, name) for draft in drafts]
        known = [one for one in found if one is not None]
        if not known:
            return None
        depth = max(one.shape[2:] for one in known)
        out = np.full((rows, steps, *depth)[: known[0].ndim], fill, known[0].dtype)
        for (places, _), one in zip(parts, found, strict=True):
            if one is not None:
                out[np.ix_(places, *map(range, one.shape[1:]))] = one
        return out

    calls = [draft.steps if draft.lm_calls is None else draft.lm_calls for draft in drafts]
    names = ("tokens", "lengths", "stopped", "logprobs", "top_tokens", "top_logprobs")
    tables = {name: table(name) for name in (*names, "log_ratios", "discarded", "unfinished")}
    return Draft(
        **tables,  # type: ignore[arg-type]
        adjusted_logprobs=_adjusted(parts, rows, steps),
        nan_step=table("nan_step", -1),  # type: ignore[arg-type]
        steps=max(draft.steps for draft in drafts),
        row_steps=sum(draft.row_steps for draft in drafts),
        lm_calls=sum(calls),
        errors={places[row]: why for places, d in parts for row, why in d.errors.items()},
    )


def _adjusted(
    parts: Sequence[tuple[Sequence[int], Draft]], rows: int, steps: int
) -> npt.NDArray[np.float32] | None:
    """Those of ranked tokens; of the rows of other parts the raw ones."""
    if all(draft.adjusted_logprobs is None for _, draft in parts):
        return None
    out = np.zeros((rows, steps), np.float32)
    for places, draft in parts:
        own = draft.logprobs if draft.adjusted_logprobs is None else draft.adjusted_logprobs
        out[np.ix_(places, range(own.shape[1]))] = own
    return out
