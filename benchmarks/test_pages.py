"""Fork and prune: N candidates of a text begin, one is accepted, and the others end.

Against what transformers' cache offers for it: a copy of the whole cache for each candidate
(`batch_repeat_interleave`), of which one is kept (`batch_select_indices`).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from stars_fast import _core, ops
from stars_fast.benchmarks.cached_text import PAGE_SIZE, CachedTexts
from stars_fast.benchmarks.compare import Compare

SEGMENT = 32
CANDIDATES = [(n, 1024) for n in (1, 4, 16, 64)]
CONTEXT = [(8, tokens) for tokens in (128, 512, 2048, 8192)]


@pytest.mark.sizes(("candidates", "context"), full=[*CANDIDATES, *CONTEXT], small=[(3, 48)])
@pytest.mark.parametrize("tail", [0, 8], ids=["aligned", "half-page"])
def test_fork_and_prune(
    compare: Compare, device: torch.device, full: bool, candidates: int, context: int, tail: int
) -> None:
    """A model of 16 layers with 8 KV heads of 64; the text ends on a page's edge, or half-way."""
    layers, kv_heads, head_dim = (16, 8, 64) if full else (2, 2, 16)
    length, winner = context + tail, candidates - 1
    spare = (candidates + 1) * (SEGMENT // PAGE_SIZE + 1)
    texts = CachedTexts(layers, kv_heads, head_dim, [length], spare, device, torch.float32)

    def fork() -> _core.Batch:
        return texts.branch([0] * candidates, [length] * candidates, SEGMENT)

    def decide() -> int:
        """Accept the last candidate; returns the copied tokens."""
        texts.index.promote(texts.newest[winner], SEGMENT)
        for row in texts.newest[:winner]:
            texts.index.drop(row)
        copies = texts.take_copies()
        if len(copies[0]):  # none where the text ends on a page's edge
            ops.copy_pages(texts.k_pages, texts.v_pages, *copies)
        return int(copies[2].sum())

    def ours() -> None:
        fork()
        decide()
        texts.index.truncate(0, length)

    def by_transformers() -> DynamicCache:
        cache = copy.copy(texts.caches[0])
        cache.layers = [copy.copy(layer) for layer in cache.layers]  # leave the original as it is
        cache.batch_repeat_interleave(candidates)
        cache.batch_select_indices(torch.zeros(1, dtype=torch.int64, device=device))
        return cache

    # The accepted text: what it was, then what was drafted for the winner.
    batch = fork()
    slots = torch.from_numpy(batch.slots[winner].astype("int64")).to(device)
    drafted = torch.randn((SEGMENT, kv_heads, head_dim), device=device)
    for pages in texts.k_pages:
        pages.flatten(0, 1)[slots] = drafted
    copied = decide()
    assert copied == tail
    for pages, layer in zip(texts.k_pages, _layers(texts.caches[0]), strict=True):
        kept = torch.cat((layer.keys[0].transpose(0, 1), drafted))
        assert torch.equal(pages.flatten(0, 1)[texts.slots(0, length + SEGMENT)], kept)
    texts.index.truncate(0, length)
    assert torch.equal(_layers(by_transformers())[0].keys, _layers(texts.caches[0])[0].keys)
    compare(
        ours,
        {"transformers": by_transformers},
        work={"candidates": candidates, "context": context},
        tail=tail,
        copied_bytes=copied * 2 * layers * kv_heads * head_dim * 4,
    )
    texts.index.check()


def _layers(cache: DynamicCache) -> list[Any]:
    return list(cache.layers)
