"""Attention of the decode steps of one round in C++, straight from the pages.

What `stars_fast.models.decode` computes in PyTorch, for float32 pages on a CPU: one call a layer,
which turns queries and keys, stores the new keys and values and attends.
"""

from __future__ import annotations

from torch import Tensor

from stars_fast.models.pool import Pools
from stars_fast.ops.batch import BatchLike
from stars_fast.ops.cpu import attend_step, decode_round, runs_on
from stars_fast.ops.fused import Rotary


class NativeDecode:
    """The `LayerAttention` of one round; call `begin_step` before each step's forward.

    Parameters
    ----------
    batch : BatchLike
        Not read after construction.
    pools : Pools
        In float32 on a CPU.
    """

    def __init__(self, batch: BatchLike, pools: Pools) -> None:
        self._pools = pools
        self._round = decode_round(batch, pools.k_pages[0].shape[1])
        self._step = 0
        self._layer = 0

    @staticmethod
    def fits(pools: Pools) -> bool:
        """Whether the pages can be read so, on the backend that is chosen."""
        return all(runs_on(pages) for pages in (*pools.k_pages, *pools.v_pages))

    def begin_step(self, step: int) -> None:
        """Start step `step`, counted from 0, of the round; steps run in order."""
        self._step = step
        self._layer = 0

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        softcap: float,
        sinks: Tensor | None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """Attention of the next layer, see `LayerAttention`; one query per row."""
        layer, pools = self._layer, self._pools
        self._layer += 1
        out = query.new_empty((*query.shape[:2], value.shape[2]))
        attend_step(
            self._round,
            self._step,
            (query, key, value, out),
            (pools.k_pages[layer], pools.v_pages[layer]),
            scaling=scaling,
            softcap=softcap,
            window=pools.layouts[layer].window,
            sinks=sinks,
            rotary=rotary,
        )
        return out
