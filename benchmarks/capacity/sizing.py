"""Pages and rows of a replica: what a GPU holds of two models, and how many requests at once.

    python benchmarks/capacity/sizing.py --gpu h200 --model llama-3.1-8b --prompt 512 --response 256

By the rules of the engine (`default_num_pages`), from shapes and data sheets; nothing is measured.
What it prints is explained in docs/scaling.md. How many replicas a load needs: simulate.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from stars_fast.benchmarks.capacity.replica import GPUS, MODELS, Gpu
from stars_fast.benchmarks.flags import number
from stars_fast.benchmarks.models import Shape, language_model, reward_model
from stars_fast.config import KvDtype
from stars_fast.engine.engine import LM_POOL_SHARE
from stars_fast.models.pool import enough_pages, page_bytes
from stars_fast.rewards.pool import RM_POOL_SHARE
from stars_fast.tables import markdown_table


@dataclass(frozen=True)
class Pool:
    """What one model takes.

    Attributes
    ----------
    weights
        Bytes.
    page
        Bytes of a page.
    budget
        Bytes that its pages may take.
    num_pages
        That it gets.
    """

    weights: int
    page: int
    budget: int
    num_pages: int


def pools(
    gpu: Gpu,
    language: Shape,
    reward: Shape,
    *,
    page_size: int = 16,
    max_rows: int = 256,
    kv_dtype: KvDtype = "auto",
    reserved: float = 1e9,
) -> tuple[Pool, Pool]:
    """Return the pools of both models in bfloat16 on one GPU, as the engine would make them.

    Parameters
    ----------
    gpu
        That holds both.
    language, reward
        Shapes of the models.
    page_size, max_rows, kv_dtype
        Of the engine.
    reserved
        Bytes that CUDA and PyTorch keep for themselves.

    Raises
    ------
    ValueError
        If the weights leave no room.
    """
    free = gpu.memory_bytes - reserved
    found = []
    models = (
        (language_model(language, device="meta", dtype=torch.bfloat16), LM_POOL_SHARE),
        (
            reward_model(reward, device="meta", dtype=torch.bfloat16),
            RM_POOL_SHARE,
        ),
    )
    for model, share in models:
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        free -= weights
        if free <= 0:
            raise ValueError(f"the weights do not fit into the memory of {gpu.machine.name}")
        pool = _pool(model, weights, int(free * share), page_size, max_rows, kv_dtype)
        free -= pool.num_pages * pool.page
        found.append(pool)
    return found[0], found[1]


def _pool(
    model: PreTrainedModel,
    weights: int,
    budget: int,
    page_size: int,
    max_rows: int,
    kv_dtype: KvDtype,
) -> Pool:
    page = page_bytes(model, page_size, kv_dtype)
    enough = enough_pages(model, page_size=page_size, max_rows=max_rows)
    return Pool(weights, page, budget, min(enough, budget // page))


def request_pages(
    prompt: int, response: int, *, candidates: int, segment: int, page_size: int = 16
) -> int:
    """Return the pages of a request in the round in which it has most.

    Its prompt's, those of its response so far, and for each further candidate those of a segment.
    The prompt's last token is fed with the first segment, and belongs to it. Segments start on
    pages of their own where `page_size` divides their length.

    Parameters
    ----------
    prompt, response, segment
        Tokens; `response` is the longest.
    candidates
        Rows of the request in a round.
    page_size
        Divides `segment`.

    Raises
    ------
    ValueError
        If it does not.
    """
    if segment % page_size:
        raise ValueError(f"page_size must divide segment, {segment}, got {page_size}")

    def pages(tokens: int) -> int:
        return -(-tokens // page_size)

    rest = response % segment
    whole = response - rest
    in_last_whole = pages(whole) + (candidates - 1) * pages(segment) if whole else 0
    in_rest = pages(response) + (candidates - 1) * pages(rest)
    return pages(prompt - 1) + max(in_last_whole, in_rest)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of a case."""
    options = _parser().parse_args(arguments)
    reward = options.reward_model or options.model
    try:
        both = pools(
            GPUS[options.gpu],
            MODELS[options.model],
            MODELS[reward],
            page_size=options.page_size,
            max_rows=options.max_rows,
            kv_dtype=options.kv_dtype,
            reserved=options.reserved_gb * 1e9,
        )
        each = request_pages(
            options.prompt,
            options.response,
            candidates=options.candidates,
            segment=options.segment_length,
            page_size=options.page_size,
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    name = GPUS[options.gpu].machine.name
    print(f"{options.model} with {reward} as reward model on {name}; computed, not measured")
    rows = [
        ["weights (GB)", *(f"{pool.weights / 1e9:.2f}" for pool in both)],
        ["bytes of a page", *(f"{pool.page:,}" for pool in both)],
        ["memory for pages (GB)", *(f"{pool.budget / 1e9:.2f}" for pool in both)],
        ["pages", *(f"{pool.num_pages:,}" for pool in both)],
        ["tokens in them", *(f"{(pool.num_pages - 1) * options.page_size:,}" for pool in both)],
        ["requests that they hold", *(f"{(pool.num_pages - 1) // each:,}" for pool in both)],
    ]
    print(markdown_table(["", "language model", "reward model"], rows))
    by_rows = options.max_rows // options.candidates
    print(f"pages of a request, at most: {each}")
    print(
        f"requests of {options.candidates} candidates that {options.max_rows} rows hold: {by_rows}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    whole = number(int, low=1)
    add = parser.add_argument
    add("--gpu", choices=list(GPUS), default="h200", help="(%(default)s)")
    add("--model", choices=list(MODELS), default="llama-3.1-8b", help="(%(default)s)")
    add("--reward-model", choices=list(MODELS), help="(the same as --model)")
    add("--reserved-gb", type=number(float, low=0), default=1.0, help="of CUDA (%(default)s)")
    add("--kv-dtype", choices=["auto", "fp8"], default="auto", help="(%(default)s)")
    for flag, default, what in (
        ("--page-size", 16, "tokens of a page"),
        ("--max-rows", 256, "rows of a round"),
        ("--prompt", 512, "tokens of a prompt"),
        ("--response", 256, "tokens of a response at most"),
        ("--segment-length", 32, "tokens of a segment"),
        ("--candidates", 4, "rows of a request"),
    ):
        add(flag, type=whole, default=default, help=f"{what} (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
