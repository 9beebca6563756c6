"""Attention of a round of decode steps over shared prefixes, in one layer.

Against a transformers cache in which every candidate has a copy of its prefix: append, then
PyTorch's fused attention over all of it. Both sides run all steps of a segment, and the gathering
of prefixes that the PyTorch form does once a round is counted.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from stars_fast.benchmarks.cached_text import PAGE_SIZE, CachedTexts
from stars_fast.benchmarks.compare import Compare
from stars_fast.models.paged import PagedModel

REQUESTS = 4
STEPS = 16
CANDIDATES = [(n, 1024) for n in (1, 2, 4, 8, 16)]
PREFIX = [(4, tokens) for tokens in (128, 512, 2048, 4096)]


@pytest.mark.sizes(("candidates", "prefix"), full=[*CANDIDATES, *PREFIX], small=[(3, 40)])
def test_decode(
    compare: Compare, device: torch.device, full: bool, candidates: int, prefix: int
) -> None:
    """4 requests, 16 steps, 8 query heads over 2 KV heads of 64."""
    heads, kv_heads, head_dim = (8, 2, 64) if full else (4, 2, 16)
    steps = STEPS if full else 3
    rows = REQUESTS * candidates
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    texts = CachedTexts(
        1, kv_heads, head_dim, [prefix] * REQUESTS, rows * (-(-STEPS // PAGE_SIZE) + 1),
        device, dtype,
    )  # fmt: skip
    model = PagedModel(
        _one_layer(heads, kv_heads, head_dim).to(device, dtype),  # type: ignore[arg-type]
        num_pages=len(texts.k_pages[0]),
        page_size=PAGE_SIZE,
    )
    model._pools.k_pages[0].copy_(texts.k_pages[0])
    model._pools.v_pages[0].copy_(texts.v_pages[0])
    owner = [request for request in range(REQUESTS) for _ in range(candidates)]
    batch = texts.branch(owner, [prefix] * rows, steps)
    generator = torch.Generator(device).manual_seed(1)
    query, key, value = (
        torch.randn((steps, rows, n, head_dim), generator=generator, device=device).to(dtype)
        for n in (heads, kv_heads, kv_heads)
    )
    scaling = head_dim**-0.5

    def ours() -> Tensor:
        with torch.inference_mode(), model.on_backend():
            out = query[0]
            state = model.begin_decode(batch)
            for step in range(steps):
                state.begin_step(step)
                out = state.attention(
                    query[step], key[step], value[step], scaling=scaling, softcap=0.0, sinks=None
                )
        return out

    whole = _one_cache(texts, candidates)

    def by_transformers() -> Tensor:
        with torch.inference_mode():
            out, cache = query[0], copy.copy(whole)
            cache.layers = [copy.copy(layer) for layer in cache.layers]
            for step in range(steps):
                k, v = cache.update(key[step].unsqueeze(2), value[step].unsqueeze(2), 0)
                out = F.scaled_dot_product_attention(
                    query[step].unsqueeze(2), k, v, scale=scaling, enable_gqa=True
                )
        return out.squeeze(2)

    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        ours().view(rows, heads, head_dim), by_transformers(), rtol=tolerance, atol=tolerance
    )
    compare(
        ours,
        {"a copy per candidate": by_transformers},
        work={"candidates": candidates, "prefix": prefix},
        requests=REQUESTS,
        steps=steps,
    )


def _one_layer(heads: int, kv_heads: int, head_dim: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=heads * head_dim,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1 << 16,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    return model


def _one_cache(texts: CachedTexts, candidates: int) -> DynamicCache:
    """Every text `candidates` times, as a batch."""
    whole = DynamicCache()
    keys, values = (
        torch.cat([getattr(cache.layers[0], name) for cache in texts.caches])
        for name in ("keys", "values")
    )
    whole.update(keys.repeat_interleave(candidates, 0), values.repeat_interleave(candidates, 0), 0)
    return whole
