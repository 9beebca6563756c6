"""The draws of others from filtered logits on a GPU: vLLM's Triton kernel (Qrita), FlashInfer.

Packages are imported by the first call: that takes seconds, and most runs make none.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

#: Draws tokens from logits ``[R, V]``.
Draw = Callable[[Tensor], Tensor]
_MODULES = {"vllm": "vllm", "flashinfer": "flashinfer"}


def missing() -> dict[str, str]:
    """Say which packages are not installed."""
    return {
        name: f"{module} is not installed"
        for name, module in _MODULES.items()
        if importlib.util.find_spec(module) is None
    }


def peers(rows: int, temperature: float, top_k: int, top_p: float) -> dict[str, Draw]:
    """Return the draws of the packages that are installed.

    Parameters
    ----------
    rows
        Of the logits.
    temperature, top_k, top_p
        Of all rows; `temperature` is above 0, and 0 and 1 switch the others off.
    """
    absent = missing()
    found: dict[str, Draw] = {}
    if "flashinfer" not in absent:
        found["flashinfer"] = _by_flashinfer(temperature, top_k, top_p)
    if "vllm" not in absent and (top_k or top_p < 1):
        mask = vllm_mask(rows, top_k, top_p)
        found["vllm"] = lambda logits: _race(mask(logits.float() / temperature))
        found["vllm, the mask alone"] = lambda logits: mask(logits.float() / temperature)
    return found


def vllm_mask(rows: int, top_k: int, top_p: float) -> Draw:
    """Return vLLM's kernel: -inf in place of what top-k and top-p remove from scaled logits."""
    device = torch.device("cuda")
    k = torch.full((rows,), top_k, dtype=torch.int32, device=device) if top_k else None
    p = torch.full((rows,), top_p, device=device) if top_p < 1 else None

    def mask(scaled: Tensor) -> Tensor:
        from vllm.v1.sample.ops.topk_topp_triton import apply_top_k_top_p_triton

        masked: Tensor = apply_top_k_top_p_triton(scaled, k, p)
        return masked

    return mask


def _race(masked: Tensor) -> Tensor:
    """As vLLM draws: the arg max of probabilities over exponential noise."""
    p = masked.softmax(dim=-1)
    return p.div_(torch.empty_like(p).exponential_()).argmax(dim=-1)


def _by_flashinfer(temperature: float, top_k: int, top_p: float) -> Draw:
    def draw(logits: Tensor) -> Tensor:
        from flashinfer import sampling

        scaled = logits.float() / temperature
        if top_k and top_p < 1:
            drawn = sampling.top_k_top_p_sampling_from_logits(scaled, top_k, top_p)
        elif top_k:
            drawn = sampling.top_k_sampling_from_probs(scaled.softmax(dim=-1), top_k)
        elif top_p < 1:
            drawn = sampling.top_p_sampling_from_probs(scaled.softmax(dim=-1), top_p)
        else:
            drawn = sampling.sampling_from_logits(scaled)
        token: Tensor = drawn
        return token

    return draw
