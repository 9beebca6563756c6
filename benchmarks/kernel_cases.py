"""What the kernels are measured on: inputs, the same job done by others, and the least bytes.

Each case checks its result before it is timed. Inputs come in several sets that are used in turn,
together larger than a GPU's cache, so that none is found there.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, MixtralConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from stars_fast import ops
from stars_fast.benchmarks.sampler_peers import Draw, peers
from stars_fast.kernels import experts as expert_kernels
from stars_fast.kernels import gated as gate_kernel
from stars_fast.kernels import norm as norm_kernels
from stars_fast.kernels import pages as page_kernels
from stars_fast.kernels import rotary as rotary_kernels
from stars_fast.kernels.attention import attention, choose_tiles
from stars_fast.kernels.attention_plan import AttentionPlan
from stars_fast.kernels.sample import sample
from stars_fast.ops import fused
from stars_fast.ops.attention import AttentionOptions
from stars_fast.ops.batch import RowBatch
from stars_fast.ops.experts import Experts, choose_experts, run_experts
from stars_fast.ops.fused import Norm, Rotary

Job = Callable[[int], Any]  # takes the number of an input set


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes
    ----------
    name
        Operator and shape.
    ours
        The kernel, through its launcher.
    check
        Raises AssertionError unless the kernel's result is right.
    least_bytes
        What has to be read and written at the least.
    operations
        Floating-point operations, where those may be the bound; 0 otherwise.
    others
        The same job done otherwise, by name.
    sets
        Input sets.
    """

    name: str
    ours: Job
    check: Callable[[], None]
    least_bytes: int
    operations: int = 0
    others: dict[str, Job] = field(default_factory=dict)
    sets: int = 1


@dataclass(frozen=True)
class Size:
    """How large the cases are: for figures, or for a look at whether they run.

    Attributes
    ----------
    sample_rows, vocab_size
        Of the logits.
    layers, kv_heads, heads_per_kv, head_dim
        Of a model.
    forks
        Copies of half-filled pages.
    requests, candidates, prefix
        Of a decode step.
    prompt
        Tokens of a prefill.
    experts
        How many, of how many each token has; channels outside of them and inside.
    dtype
        Of everything; the interpreter has no products of bfloat16.
    cache_bytes
        Input sets together are larger.
    """

    sample_rows: tuple[int, ...]
    vocab_size: int
    layers: int
    kv_heads: int
    heads_per_kv: int
    head_dim: int
    forks: int
    requests: int
    candidates: int
    prefix: int
    prompt: int
    experts: tuple[int, int, int, int]
    dtype: torch.dtype
    cache_bytes: int

    def sets(self, bytes_each: int) -> int:
        """Return how many sets of inputs are larger than the cache, at most 16."""
        return max(1, min(16, -(-2 * self.cache_bytes // max(1, bytes_each))))


FULL = Size(
    sample_rows=(1, 16, 64, 256, 512, 4096),
    vocab_size=128_256,
    layers=32,
    kv_heads=8,
    heads_per_kv=4,
    head_dim=128,
    forks=512,
    requests=64,
    candidates=8,
    prefix=1024,
    prompt=4096,
    experts=(128, 8, 2048, 768),
    dtype=torch.bfloat16,
    cache_bytes=60 << 20,
)
#: Every form that a 7B model's decode step takes, in the dtype and head size of production.
SMOKE = Size(
    sample_rows=(16,),
    vocab_size=32_000,
    layers=2,
    kv_heads=32,
    heads_per_kv=1,
    head_dim=128,
    forks=8,
    requests=3,
    candidates=4,
    prefix=600,
    prompt=200,
    experts=(8, 2, 256, 128),
    dtype=torch.bfloat16,
    cache_bytes=0,
)
TINY = Size(
    sample_rows=(3,),
    vocab_size=1009,
    layers=2,
    kv_heads=2,
    heads_per_kv=2,
    head_dim=16,
    forks=3,
    requests=2,
    candidates=3,
    prefix=40,
    prompt=24,
    experts=(4, 2, 32, 24),
    dtype=torch.float32,
    cache_bytes=0,
)

PAGE_SIZE = 16


def all_cases(size: Size, device: torch.device) -> Iterator[Case]:
    """Every case, made one at a time: some take much of a GPU's memory."""
    yield from sampling_cases(size, device)
    yield from model_cases(size, device)


def sampling_cases(size: Size, device: torch.device) -> Iterator[Case]:
    """Every number of rows, by every filter."""
    for rows in size.sample_rows:
        yield from sample_cases(size, rows, device)


def model_cases(size: Size, device: torch.device) -> Iterator[Case]:
    """Every kernel but those that sample."""
    yield fork_case(size, device)
    yield append_case(size, device)
    yield norm_case(size, device)
    yield gate_case(size, device)
    yield rotation_case(size, device)
    yield choice_case(size, device)
    yield experts_case(size, device)
    yield from decode_cases(size, device)
    yield prefill_case(size, device)
    yield score_case(size, device)


# Sampling

FILTERS = {
    "temperature": (0.8, 0, 1.0),
    "top-k 40": (0.8, 40, 1.0),
    "top-p 0.95": (0.8, 0, 0.95),
    "top-k 40, top-p 0.95": (0.8, 40, 0.95),
    "greedy": (0.0, 0, 1.0),
}


def sample_cases(size: Size, rows: int, device: torch.device) -> Iterator[Case]:
    """Sampling from logits like a language model's: most mass on few of many tokens."""
    bytes_each = rows * size.vocab_size * size.dtype.itemsize
    sets = size.sets(bytes_each)
    generator = torch.Generator(device).manual_seed(rows)
    logits = [
        (3.0 * torch.randn((rows, size.vocab_size), generator=generator, device=device)).to(
            size.dtype
        )
        for _ in range(sets)
    ]
    for name, (temperature, top_k, top_p) in FILTERS.items():
        arguments = drawing(rows, temperature, top_k, top_p, device)

        def check(arguments: tuple[Tensor, ...] = arguments) -> None:
            got = sample(logits[0], *arguments)[0]
            with ops.backend("pytorch"):
                want = ops.sample(logits[0], *arguments)[0]
            # Two roundings of noise and logit may order a near tie differently.
            assert (got == want).float().mean() >= 1 - 2 / max(rows, 64), (got, want)

        yield Case(
            name=f"sample {name} [{rows}, {size.vocab_size}] {_short(size.dtype)}",
            ours=functools.partial(_sample_set, logits, arguments),
            check=check,
            least_bytes=bytes_each,
            others=samplers(logits, temperature, top_k, top_p),
            sets=sets,
        )


def drawing(
    rows: int, temperature: float, top_k: int, top_p: float, device: torch.device
) -> tuple[Tensor, ...]:
    """Return what `sample` takes beside logits, the same filters in every row."""
    return (
        torch.full((rows,), temperature, device=device),
        torch.full((rows,), top_k, dtype=torch.int32, device=device),
        torch.full((rows,), top_p, device=device),
        torch.zeros(rows, device=device),
        torch.arange(rows, device=device),
        torch.full((rows,), 7, device=device),
        torch.zeros(rows, dtype=torch.int64, device=device),
        torch.zeros(rows, dtype=torch.int64, device=device),
    )


def _sample_set(logits: list[Tensor], arguments: tuple[Tensor, ...], number: int) -> Tensor:
    return sample(logits[number], *arguments)[0]


def warped(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Return scaled logits in float32, -inf where transformers' warpers filter."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    no_ids = torch.empty((len(logits), 0), dtype=torch.int64)
    scaled: Tensor = warpers(no_ids, logits.float())  # type: ignore[arg-type]
    return scaled


def samplers(logits: list[Tensor], temperature: float, top_k: int, top_p: float) -> dict[str, Job]:
    """The same draws, from other noise, by PyTorch, transformers and `sampler_peers`."""
    if temperature == 0:
        return {"torch": lambda i: logits[i].argmax(dim=-1)}

    def by_torch(i: int) -> Tensor:
        scaled = logits[i].float() / temperature
        if not top_k and top_p >= 1:
            return torch.multinomial(scaled.softmax(dim=-1), 1)
        values, index = scaled.topk(top_k) if top_k else scaled.sort(dim=-1, descending=True)
        p = values.softmax(dim=-1)
        if top_p < 1:
            p = p.masked_fill(p.cumsum(dim=-1) - p >= top_p, 0.0)
        return index.gather(1, torch.multinomial(p, 1))

    jobs: dict[str, Job] = {
        "torch": by_torch,
        "transformers": lambda i: torch.multinomial(
            warped(logits[i], temperature, top_k, top_p).softmax(dim=-1), 1
        ),
    }
    if logits[0].device.type == "cuda":
        for name, draw in peers(len(logits[0]), temperature, top_k, top_p).items():
            jobs[name] = functools.partial(_draw_set, draw, logits)
    return jobs


def _draw_set(draw: Draw, logits: list[Tensor], number: int) -> Tensor:
    return draw(logits[number])


# Pages


def fork_case(size: Size, device: torch.device) -> Case:
    """Copies of half-filled pages in every layer, against a transformers cache forked alike."""
    pages, shape = 2 * size.forks + 1, (PAGE_SIZE, size.kv_heads, size.head_dim)
    pools = [
        torch.randn((pages, *shape), device=device).to(size.dtype) for _ in range(2 * size.layers)
    ]
    order = torch.randperm(pages - 1, generator=torch.Generator().manual_seed(0)) + 1
    src, dst = (half.to(device, torch.int32) for half in (order[: size.forks], order[size.forks :]))
    half = PAGE_SIZE // 2
    count = torch.full((size.forks,), half, dtype=torch.int32, device=device)
    table = page_kernels.pool_table(pools)

    def check() -> None:
        before = pools[-1].clone()
        page_kernels.copy_pages(table, src, dst, count)
        before[dst.long(), :half] = before[src.long(), :half]
        assert torch.equal(pools[-1], before)

    # The cache has no pages: forking it copies every token, here only as many as a page's half.
    cache = DynamicCache()
    for layer in range(size.layers):
        kv = torch.randn((size.forks, size.kv_heads, half, size.head_dim), device=device)
        cache.update(kv.to(size.dtype), kv.to(size.dtype), layer)
    index = torch.arange(size.forks, device=device)
    return Case(
        name=f"fork {size.forks} half pages, {size.layers} layers {_short(size.dtype)}",
        ours=lambda _: page_kernels.copy_pages(table, src, dst, count),
        check=check,
        least_bytes=2 * size.forks * half * table.token_bytes,
        others={
            "reorder_cache": lambda _: cache.reorder_cache(index),  # type: ignore[arg-type]
            "batch_select_indices": lambda _: cache.batch_select_indices(index),
        },
    )


def append_case(size: Size, device: torch.device) -> Case:
    """One token of every row of a decode step, in one layer."""
    rows = size.requests * size.candidates
    shape = (rows + 1, PAGE_SIZE, size.kv_heads, size.head_dim)
    k, v = (torch.zeros(shape, dtype=size.dtype, device=device) for _ in range(2))
    key, value = (
        torch.randn((size.kv_heads, rows, size.head_dim), device=device)
        .to(size.dtype)
        .transpose(0, 1)
        for _ in range(2)
    )
    slots = (torch.arange(rows, device=device) + 1) * PAGE_SIZE + 3

    def check() -> None:
        page_kernels.kv_append(k, v, key, value, slots)
        assert torch.equal(k.flatten(0, 1)[slots], key)
        assert torch.equal(v.flatten(0, 1)[slots], value)

    def by_torch(_: int) -> None:
        k.flatten(0, 1).index_copy_(0, slots, key)
        v.flatten(0, 1).index_copy_(0, slots, value)

    return Case(
        name=f"append {rows} tokens, 1 layer {_short(size.dtype)}",
        ours=lambda _: page_kernels.kv_append(k, v, key, value, slots),
        check=check,
        least_bytes=2 * 2 * key.numel() * size.dtype.itemsize,
        others={"torch": by_torch},
    )


# Between a layer's products


def norm_case(size: Size, device: torch.device) -> Case:
    """The residual and the norm in front of an MLP, of every row of a decode step."""
    rows, dim = size.requests * size.candidates, size.kv_heads * size.heads_per_kv * size.head_dim
    x, residual = (torch.randn((rows, dim), device=device).to(size.dtype) for _ in range(2))
    norm = Norm(torch.ones(dim, device=device, dtype=size.dtype), 1e-6)
    return _fused_case(
        f"norm {rows} x {dim} {_short(size.dtype)}",
        lambda: norm_kernels.rms_norm(x, norm, residual),
        lambda: fused.rms_norm(x, norm, residual),
        4 * x.nbytes,
    )


def gate_case(size: Size, device: torch.device) -> Case:
    """The gate of an MLP, of every row of a decode step."""
    rows, dim = size.requests * size.candidates, 3 * size.kv_heads * size.head_dim
    both = torch.randn((rows, 2 * dim), device=device).to(size.dtype)
    return _fused_case(
        f"gate {rows} x {dim} {_short(size.dtype)}",
        lambda: gate_kernel.gated(both[:, :dim], both[:, dim:], "silu"),
        lambda: fused.gated(both[:, :dim], both[:, dim:], "silu"),
        both.nbytes * 3 // 2,
    )


def rotation_case(size: Size, device: torch.device) -> Case:
    """Rotation and append of every row of a decode step, in one layer."""
    rows, dim, kv_heads = size.requests * size.candidates, size.head_dim, size.kv_heads
    heads = (kv_heads * size.heads_per_kv, kv_heads, kv_heads)
    query, key, value = (
        torch.randn((rows, count, dim), device=device).to(size.dtype) for count in heads
    )
    cos, sin = torch.randn((2, rows, dim), device=device).to(size.dtype)
    rotary = Rotary(cos, sin)
    shape = (rows + 1, PAGE_SIZE, kv_heads, dim)
    k, v = (torch.zeros(shape, dtype=size.dtype, device=device) for _ in range(2))
    slots = (torch.arange(rows, device=device) + 1) * PAGE_SIZE + 3

    arguments = (query, key, value, rotary, k, v, slots)

    def written(turned: Tensor) -> tuple[Tensor, ...]:
        return turned, k.flatten(0, 1)[slots], v.flatten(0, 1)[slots]

    return _fused_case(
        f"rotate and append {rows} tokens, 1 layer {_short(size.dtype)}",
        lambda: rotary_kernels.rotate_append(*arguments),
        lambda: fused.rotate_append(*arguments),
        2 * sum(x.nbytes for x in (query, key, value, cos)),
        written,
    )


def choice_case(size: Size, device: torch.device) -> Case:
    """The experts of every row of a decode step, by its router's logits."""
    rows, (count, top_k, _, _) = size.requests * size.candidates, size.experts
    logits = torch.rand((rows, count), device=device).argsort(dim=1).to(size.dtype) / 16
    return _fused_case(
        f"choose {top_k} of {count} experts {rows} {_short(size.dtype)}",
        lambda: expert_kernels.choose_experts(logits, top_k, share=True),
        lambda: choose_experts(logits, top_k, share=True),
        logits.nbytes + rows * top_k * 12,
    )


def experts_case(size: Size, device: torch.device) -> Case:
    """Experts of every row of a decode step, chosen at random; beside transformers' grouped_mm."""
    rows, (count, top_k, hidden, inner) = size.requests * size.candidates, size.experts
    config = MixtralConfig(
        num_local_experts=count, hidden_size=hidden, intermediate_size=inner, hidden_act="silu"
    )
    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        theirs = MixtralExperts(config).to(size.dtype)
        for weight in theirs.parameters():
            torch.nn.init.normal_(weight, std=0.03)
        x = torch.randn((rows, hidden)).to(size.dtype)
        weights, index = torch.rand((rows, count)).topk(top_k, dim=1)
    mine = Experts(theirs.gate_up_proj.detach(), theirs.down_proj.detach())
    case = _fused_case(
        f"experts {rows} x {top_k} of {count} {_short(size.dtype)}",
        lambda: expert_kernels.run_experts(x, index, weights, mine),
        lambda: run_experts(x, index, weights, mine),
        mine.gate_up.nbytes + mine.down.nbytes + 2 * x.nbytes,
    )
    operations = 2 * rows * top_k * 3 * hidden * inner

    @torch.inference_mode()
    def by_transformers(_: int) -> Tensor:
        found: Tensor = theirs(x, index, weights)
        return found

    return replace(case, operations=operations, others={"transformers": by_transformers})


def _fused_case(
    name: str,
    ours: Callable[[], Any],
    by_operator: Callable[[], Any],
    least_bytes: int,
    results: Callable[[Any], Any] = lambda found: found,
) -> Case:
    """A kernel against its operator in PyTorch; `results` is what both must agree in."""

    def by_torch() -> Any:  # noqa: ANN401
        with ops.backend("pytorch"):
            return by_operator()

    def check() -> None:
        got, want = results(ours()), results(by_torch())
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)

    return Case(
        name=name,
        ours=lambda _: ours(),
        check=check,
        least_bytes=least_bytes,
        others={"torch": lambda _: by_torch()},
    )


# Attention


@dataclass(frozen=True)
class Rows:
    """Tables of a batch: groups with a prefix on pages, rows with new tokens of their own."""

    group_pages: np.ndarray
    row_group: np.ndarray
    row_start: np.ndarray
    new_lengths: np.ndarray
    slots: np.ndarray

    @property
    def num_pages(self) -> int:
        """Pages that the tables reach, the null page included."""
        return 1 + int(max(self.group_pages.max(initial=0), self.slots.max() // PAGE_SIZE))

    def plan(
        self,
        heads_per_kv: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        queries: int,
    ) -> AttentionPlan:
        """Plan attention of the last `queries` new tokens of every row."""
        asked = np.full_like(self.new_lengths, queries)
        groups = len(self.group_pages)
        per_group = int(asked.sum()) // groups
        no_padding = np.zeros(groups, np.int32)
        tiles = choose_tiles(per_group, heads_per_kv, head_dim, dtype)
        return AttentionPlan.build(
            RowBatch(
                self.group_pages,
                no_padding,
                no_padding,
                self.row_group,
                self.row_start,
                self.new_lengths,
                self.slots,
            ),
            asked,
            heads_per_kv=heads_per_kv,
            device=device,
            **tiles._asdict(),
        )


def make_rows(groups: int, per_group: int, prefix: int, new: int) -> Rows:
    """Groups of rows on shuffled pages."""
    rows = groups * per_group
    prefix_pages, own_pages = -(-prefix // PAGE_SIZE), -(-new // PAGE_SIZE)
    total = groups * prefix_pages + rows * own_pages
    pages = np.random.default_rng(0).permutation(total).astype(np.int64) + 1
    table = pages[: groups * prefix_pages].reshape(groups, -1).astype(np.int32)
    own = pages[groups * prefix_pages :].reshape(rows, own_pages)
    at = np.arange(new)
    return Rows(
        group_pages=table if prefix else np.zeros((groups, 1), np.int32),
        row_group=np.repeat(np.arange(groups, dtype=np.int32), per_group),
        row_start=np.full(rows, prefix, np.int32),
        new_lengths=np.full(rows, new, np.int32),
        slots=own[:, at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE,
    )


def decode_cases(size: Size, device: torch.device) -> Iterator[Case]:
    """One query per candidate, half a segment of 32 behind it, against reading prefixes apart."""
    new = min(16, size.prefix)
    for requests, candidates, prefix in (
        (size.requests, size.candidates, size.prefix),
        (1, 1, 8 * size.prefix),
        (size.requests, 1, size.prefix),
    ):
        yield _attention_case(
            f"decode {requests} x {candidates} rows, prefix {prefix}",
            size, device, make_rows(requests, candidates, prefix, new), queries=1, apart=True,
        )  # fmt: skip


def prefill_case(size: Size, device: torch.device) -> Case:
    """A prompt, nothing cached: what PyTorch's fused attention (and flash-attn) does as well."""
    rows = make_rows(1, 1, 0, size.prompt)
    case = _attention_case(
        f"prefill {size.prompt} tokens", size, device, rows, queries=size.prompt, apart=False
    )
    heads = size.kv_heads * size.heads_per_kv
    q, k, v = (
        torch.randn((1, n, size.prompt, size.head_dim), device=device).to(size.dtype)
        for n in (heads, size.kv_heads, size.kv_heads)
    )
    case.others["torch sdpa"] = lambda _: F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_func

        case.others["flash_attn"] = lambda _: flash_attn_func(
            *(x.transpose(1, 2) for x in (q, k, v)), causal=True
        )
    return case


def score_case(size: Size, device: torch.device) -> Case:
    """New segments of all candidates against their prefix, as the reward model reads them."""
    new = min(32, size.prefix)
    rows = make_rows(size.requests, size.candidates, size.prefix, new)
    return _attention_case(
        f"score {size.requests} x {size.candidates} segments of {new}, prefix {size.prefix}",
        size, device, rows, queries=new, apart=True,
    )  # fmt: skip


def _attention_case(
    name: str, size: Size, device: torch.device, rows: Rows, *, queries: int, apart: bool
) -> Case:
    """Attention of a batch; with `apart`, also with every row a group of its own."""
    heads = size.kv_heads * size.heads_per_kv
    groups, count = len(rows.group_pages), len(rows.row_group)
    token_bytes = 2 * size.kv_heads * size.head_dim * size.dtype.itemsize
    prefix, new = int(rows.row_start[0]), int(rows.new_lengths[0])
    kv_tokens = groups * prefix + count * new
    sets = size.sets(kv_tokens * token_bytes)
    shape = (rows.num_pages, PAGE_SIZE, size.kv_heads, size.head_dim)
    pools = [
        tuple(torch.randn(shape, device=device).to(size.dtype) for _ in range(2))
        for _ in range(sets)
    ]
    query = torch.randn((count * queries, heads, size.head_dim), device=device).to(size.dtype)
    plan = rows.plan(size.heads_per_kv, size.head_dim, size.dtype, device, queries)
    scaling = size.head_dim**-0.5

    def run(i: int, plan: AttentionPlan = plan) -> Tensor:
        k_pages, v_pages = pools[i]
        return attention(query, k_pages, v_pages, plan, AttentionOptions(scaling))

    def check() -> None:
        # A few rows of the first and last group against PyTorch in float32.
        few = sorted({0, count - 1})
        for row in few:
            group = int(rows.row_group[row])
            position = np.arange(prefix)
            table = rows.group_pages[group]
            seen = table[position // PAGE_SIZE].astype(np.int64) * PAGE_SIZE + position % PAGE_SIZE
            at = torch.from_numpy(np.concatenate((seen, rows.slots[row, :new]))).to(device)
            k, v = (pages.flatten(0, 1)[at].float().transpose(0, 1) for pages in pools[0])
            q = query[row * queries : (row + 1) * queries].float().transpose(0, 1)
            hidden = torch.arange(prefix + new, device=device) > (
                torch.arange(queries, device=device)[:, None] + prefix + new - queries
            )
            mask = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)
            want = F.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=mask, enable_gqa=True
            )[0].transpose(0, 1)
            got = run(0)[row * queries : (row + 1) * queries].float()
            error = float((got - want).norm() / want.norm())
            assert error < (1e-5 if size.dtype == torch.float32 else 1e-2), (name, row, error)

    others: dict[str, Job] = {}
    if apart and count > groups:
        alone = Rows(
            rows.group_pages[rows.row_group],
            np.arange(count, dtype=np.int32),
            rows.row_start,
            rows.new_lengths,
            rows.slots,
        )
        plan_apart = alone.plan(size.heads_per_kv, size.head_dim, size.dtype, device, queries)
        others["prefix read per row"] = lambda i: run(i, plan_apart)
    seen_keys = count * queries * (prefix + new - (queries - 1) / 2)
    return Case(
        name=f"{name} {_short(size.dtype)}",
        ours=run,
        check=check,
        least_bytes=kv_tokens * token_bytes + 2 * query.numel() * size.dtype.itemsize,
        operations=int(4 * heads * size.head_dim * seen_keys),
        others=others,
        sets=sets,
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
