"""Sampling beside vLLM's Triton kernel and FlashInfer: times, and what each keeps."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stars_fast.benchmarks import sampler_peers
from stars_fast.benchmarks.gpu_stages.kernels import DEVICE, line, time_case
from stars_fast.benchmarks.interpreter import ON_GPU
from stars_fast.benchmarks.kernel_cases import FILTERS, FULL, TINY, drawing, sampling_cases
from stars_fast.benchmarks.measure import ceilings
from stars_fast.kernels.sample import sample

# Sorts of 4,096 rows of a vocabulary take minutes and say nothing that 512 rows do not.
_SIZE = (
    replace(FULL, sample_rows=tuple(x for x in FULL.sample_rows if x <= 512)) if ON_GPU else TINY
)
#: Log-probabilities of what is kept count as equal below this.
_EQUAL = 1e-4


def time_samplers() -> dict[str, Any]:
    """Check and time each filter and number of rows, and compare what is kept.

    Returns
    -------
    dict
        ``times``, rows as of the item "kernels"; ``kept``, see `compare_kept`; ``missing``, the
        packages that are not installed.
    """
    machine = ceilings(DEVICE, torch.bfloat16, quick=not ON_GPU)
    found: dict[str, Any] = {"missing": sampler_peers.missing(), "kept": [], "times": []}
    for name, reason in found["missing"].items():
        print(f"{name}: {reason}")
    if ON_GPU and "vllm" not in found["missing"]:
        found["kept"] = [compare_kept(name) for name, (t, *_) in FILTERS.items() if t]
    for case in sampling_cases(_SIZE, DEVICE):
        case.check()
        found["times"].append(time_case(case, machine))
        print(line(found["times"][-1]), flush=True)
        del case
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()
    return found


def compare_kept(name: str, rows: int = 256) -> dict[str, Any]:
    """Compare what a filter keeps with what vLLM's kernel keeps, in float32.

    Where tokens are equally likely the two differ by intention: vLLM keeps exactly k, and of the
    last of top-p the first ones.

    Returns
    -------
    dict
        ``rows``; ``same_mass``, the share of rows in which the kept probability is equal;
        ``drawn_is_kept``, that in which vLLM keeps the token that was drawn here.
    """
    temperature, top_k, top_p = FILTERS[name]
    try:
        generator = torch.Generator(DEVICE).manual_seed(0)
        logits = 3.0 * torch.randn((rows, FULL.vocab_size), generator=generator, device=DEVICE)
        token, _, truncated, _, _ = sample(
            logits, *drawing(rows, temperature, top_k, top_p, DEVICE)
        )
        scaled = logits / temperature
        masked: Tensor = scaled.clone()
        if top_k or top_p < 1:
            masked = sampler_peers.vllm_mask(rows, top_k, top_p)(masked)
        at = token[:, None]
        ours = (scaled.gather(1, at)[:, 0] - truncated).double()
        theirs = masked.double().logsumexp(dim=1)
        found: dict[str, Any] = {
            "filter": name,
            "rows": rows,
            "same_mass": float(((ours - theirs).abs() < _EQUAL).float().mean()),
            "drawn_is_kept": float((masked.gather(1, at) > -torch.inf).float().mean()),
        }
    except Exception as error:  # noqa: BLE001 - the times are worth having
        found = {"filter": name, "failed": f"{type(error).__name__}: {error}"[:1000]}
    print(found, flush=True)
    return found
