"""Texts on pages, and the same in transformers' caches, for the suites that compare the two."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from stars_fast import _core

PAGE_SIZE = 16


@dataclass
class CachedTexts:
    """Random keys and values of some texts, on pages and in one transformers cache each.

    Attributes
    ----------
    layers, kv_heads, head_dim
        Of a model.
    lengths
        Tokens of each text.
    spare_pages
        For what is forked from them.
    device, dtype
        Of keys and values.
    """

    layers: int
    kv_heads: int
    head_dim: int
    lengths: list[int]
    spare_pages: int
    device: torch.device
    dtype: torch.dtype
    k_pages: list[Tensor] = field(init=False)
    v_pages: list[Tensor] = field(init=False)
    caches: list[DynamicCache] = field(init=False)

    def __post_init__(self) -> None:
        pages = 1 + self.spare_pages + sum(-(-n // PAGE_SIZE) for n in self.lengths)
        shape = (pages, PAGE_SIZE, self.kv_heads, self.head_dim)
        self.k_pages, self.v_pages = (
            [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(self.layers)]
            for _ in range(2)
        )
        self.index = _core.SequenceCache(num_pages=pages, page_size=PAGE_SIZE)
        self.branches = itertools.count()
        self.caches = []
        generator = torch.Generator(self.device).manual_seed(0)
        for number, length in enumerate(self.lengths):
            self.index.open(number)
            batch = self.branch([number], [0], length)
            slots = torch.from_numpy(batch.slots[0, :length].copy()).to(self.device)
            cache = DynamicCache()
            for layer in range(self.layers):
                k, v = (
                    torch.randn(
                        (length, self.kv_heads, self.head_dim),
                        generator=generator,
                        device=self.device,
                    ).to(self.dtype)
                    for _ in range(2)
                )
                self.k_pages[layer].flatten(0, 1)[slots] = k
                self.v_pages[layer].flatten(0, 1)[slots] = v
                cache.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], layer)
            self.index.promote(self.newest[0], length)
            self.caches.append(cache)

    def branch(self, texts: list[int], starts: list[int], new_tokens: int) -> _core.Batch:
        """Fork rows of `new_tokens` tokens from the first tokens of texts; `newest` are theirs."""
        self.newest = [next(self.branches) for _ in texts]
        return self.index.branch(
            np.array(texts),
            np.array(self.newest),
            np.array(starts, np.int32),
            np.zeros(len(texts) * new_tokens, np.int64),
            np.full(len(texts), new_tokens, np.int32),
        )

    def take_copies(self) -> tuple[Tensor, Tensor, Tensor]:
        """The copies that forks have asked for since the last call, as tensors."""
        source, target, count = (
            torch.from_numpy(x.copy()).to(self.device) for x in self.index.take_copies()
        )
        return source, target, count

    def slots(self, text: int, length: int) -> Tensor:
        """Slots of a text's first `length` tokens, int64 ``[length]``; it ends there."""
        batch = self.branch([text], [length], 1)
        self.index.drop(self.newest[0])
        at = torch.arange(length)
        pages = torch.from_numpy(batch.group_pages[0].astype("int64"))
        return (pages[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE).to(self.device)
