"""Attention of a forward on the Triton backend: append to the pages, then attend over them.

A plan holds the batch on the device, see `stars_fast.kernels.attention_plan`. Layers differ in
their number of query heads per KV head only rarely, but they may, so there is a plan for each.

In passes of many tokens others may attend within each row's own tokens (`varlen_forms.py`). The
kernels then read the prefixes, and the two parts are joined by their log-sum-exps: a cascade.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stars_fast.kernels.attention import OwnPart, Tiles, attention, choose_tiles
from stars_fast.kernels.attention_plan import AttentionPlan, PlanCapacity
from stars_fast.kernels.pages import kv_append
from stars_fast.models.pool import Pools
from stars_fast.models.varlen_forms import Chosen, Texts, VarlenForm
from stars_fast.ops.attention import AttentionOptions
from stars_fast.ops.batch import BatchLike
from stars_fast.ops.fused import Rotary, rotate_append


class KernelAttention:
    """The `LayerAttention` of one forward, or of many that rewrite their plans and slots.

    Parameters
    ----------
    pools
        The model's pools.
    plans
        By query heads per KV head.
    """

    def __init__(self, pools: Pools, plans: Mapping[int, AttentionPlan]) -> None:
        self._pools = pools
        self._plans = plans
        self._slots = torch.zeros(0, dtype=torch.int64, device=pools.device)
        self._layer = 0

    def begin(self, slots: Tensor) -> None:
        """Start a forward whose new tokens go to `slots`, int64 ``[T]``."""
        self._slots = slots
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
        """Attention of the next layer, see `LayerAttention`."""
        layer, pools = self._layer, self._pools
        self._layer += 1
        pages = pools.k_pages[layer], pools.v_pages[layer]
        scales = pools.k_scales[layer], pools.v_scales[layer]
        query, key, value = _inner(query), _inner(key), _inner(value)
        if rotary is None:
            kv_append(*pages, key, value, self._slots, *scales)
        else:
            query = rotate_append(query, key, value, rotary, *pages, self._slots, *scales)
            if self._rereads:
                key = pages[0].flatten(0, 1).index_select(0, self._slots)
        options = AttentionOptions(scaling, pools.layouts[layer].window, softcap, sinks)
        return self._attend(layer, _inner(query), key, value, options)

    #: Whether `_attend` looks at the keys; those that `rotate_append` turns are on the pages alone.
    _rereads = False

    def _attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        return self._by_kernel(layer, query, options)

    def _by_kernel(
        self, layer: int, query: Tensor, options: AttentionOptions, own: OwnPart | None = None
    ) -> Tensor:
        pools = self._pools
        layout = pools.layouts[layer]
        return attention(
            query,
            pools.k_pages[layer],
            pools.v_pages[layer],
            self._plans[layout.heads // layout.kv_heads],
            options,
            k_scale=pools.k_scales[layer],
            v_scale=pools.v_scales[layer],
            own=own,
        )


class VarlenAttention(KernelAttention):
    """The same, with each row's own tokens attended to by a form of `varlen_forms.py`.

    Parameters
    ----------
    pools, plans
        As `KernelAttention`; the plans are of the prefixes alone.
    form
        Attends to the rows' own tokens.
    texts
        The rows' new tokens.
    prefixed
        Whether a row has a prefix.
    """

    _rereads = True

    def __init__(
        self,
        pools: Pools,
        plans: Mapping[int, AttentionPlan],
        form: VarlenForm,
        texts: Texts,
        *,
        prefixed: bool,
    ) -> None:
        super().__init__(pools, plans)
        self._form = form
        self._texts = texts
        self._prefixed = prefixed

    def _attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        own = OwnPart(*self._form(query, key, value, self._texts, options))
        if not self._prefixed and options.sinks is None:
            return own.out
        return self._by_kernel(layer, query, options, own)


def tiles_of(pools: Pools, queries_per_group: int) -> dict[int, Tiles]:
    """Return the tiles, by query heads per KV head, for groups with about that many queries."""
    return {
        heads: choose_tiles(queries_per_group, heads, pools.head_dim, pools.layouts[0].dtype)
        for heads in sorted(pools.heads_per_kv)
    }


def extend_attention(
    pools: Pools, batch: BatchLike, slots: Tensor, chosen: Chosen
) -> KernelAttention:
    """Return the attention of one extend; `slots` are those of its packed tokens."""
    prefixed = bool(batch.row_start.any())
    varlen = chosen.form is not None and (chosen.cascades or not prefixed) and batch.num_rows > 0
    most = max(1, batch.num_tokens // max(1, batch.num_groups))
    plans = {}
    for heads, tiles in tiles_of(pools, most).items():
        plans[heads] = AttentionPlan.build(
            batch,
            batch.new_lengths,
            heads_per_kv=heads,
            device=pools.device,
            prefix_only=varlen,
            **tiles._asdict(),
        )
    attending = KernelAttention(pools, plans)
    if varlen:
        assert chosen.form is not None
        texts = Texts.of(batch.new_lengths.tolist(), pools.device)
        attending = VarlenAttention(pools, plans, chosen.form, texts, prefixed=prefixed)
    attending.begin(slots)
    return attending


@dataclass(frozen=True)
class DecodeCapacity:
    """The largest round that a `KernelDecode` can hold.

    Attributes
    ----------
    rows
        Candidates; each may be a group of its own.
    page_entries
        Entries of all groups' page tables together.
    new_tokens
        New tokens per row.
    prefix_tokens
        Prefix tokens per group.
    """

    rows: int
    page_entries: int
    new_tokens: int
    prefix_tokens: int

    @classmethod
    def of(cls, batch: BatchLike) -> DecodeCapacity:
        """Return what a batch needs."""
        return cls(
            rows=batch.num_rows,
            page_entries=batch.group_pages.size,
            new_tokens=batch.max_new,
            prefix_tokens=int(batch.row_start.max()),
        )

    def holds(self, other: DecodeCapacity) -> bool:
        """Whether rounds of another capacity fit."""
        return all(mine >= getattr(other, name) for name, mine in vars(self).items())


class KernelDecode:
    """The attention of the decode steps of round after round, on tensors that never move.

    Parameters
    ----------
    pools
        The model's pools.
    capacity
        The largest round.
    tiles
        From `tiles_of`, for about as many queries as rows that share a prefix.
    """

    def __init__(
        self,
        pools: Pools,
        capacity: DecodeCapacity,
        tiles: Mapping[int, Tiles],
    ) -> None:
        self._plans: dict[int, AttentionPlan] = {}
        for heads, tile in tiles.items():
            self._plans[heads] = AttentionPlan.allocate(
                PlanCapacity.of_decode(
                    rows=capacity.rows,
                    groups=capacity.rows,
                    pages=capacity.page_entries,
                    own=capacity.new_tokens,
                    max_prefix=capacity.prefix_tokens,
                    heads_per_kv=heads,
                    **tile._asdict(),
                ),
                heads_per_kv=heads,
                device=pools.device,
                **tile._asdict(),
            )
        self._one = next(iter(self._plans.values()))
        self.attention = KernelAttention(pools, self._plans)

    @property
    def step(self) -> Tensor:
        """int32 ``[rows]``: the tokens of the round that have been run."""
        return self._one.query_own

    def write(self, batch: BatchLike) -> None:
        """Start a round; rows of the capacity past those of the batch run on the null page."""
        for plan in self._plans.values():
            plan.write(
                batch,
                np.ones(batch.num_rows, np.int32),
                query_own=np.zeros(batch.num_rows, np.int32),
            )

    def seek(self, step: int) -> None:
        """Start the forward of every row's token number `step`, counted from 0."""
        for plan in self._plans.values():
            plan.query_own.fill_(step)
        self.begin_step()

    def begin_step(self) -> None:
        """Start the forward of the next token of every row."""
        own = self.step.to(torch.int64).unsqueeze(1)
        self.attention.begin(self._one.slots.gather(1, own).squeeze(1))

    def end_step(self) -> None:
        """Move every row on by one token."""
        for plan in self._plans.values():
            plan.query_own.add_(1)


def _inner(x: Tensor) -> Tensor:
    """Return the tensor with a last stride of 1, as the kernels need it."""
    return x if x.stride(-1) == 1 else x.contiguous()
