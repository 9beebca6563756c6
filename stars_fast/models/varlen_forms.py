"""Who attends in passes of many tokens on the Triton backend, see `Attention` in the options.

A form is asked at load for a few random tokens and compared with PyTorch: packages may be built for
another GPU, another release may order its results otherwise.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from stars_fast.config import Attention, check_attention
from stars_fast.models.probe import LayerLayout
from stars_fast.ops.attention import AttentionOptions
from stars_fast.ops.varlen import varlen_attention

_log = logging.getLogger(__name__)

#: Texts of the tokens that a form is asked for; together they are as many as no model's heads.
_TRIAL = (5, 1, 37)
_HALF = (torch.bfloat16, torch.float16)
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3}  # else 1e-4


class Texts(NamedTuple):
    """Texts of packed tokens.

    Attributes
    ----------
    lengths : list of int
        Tokens of each, at least 1.
    ends : Tensor
        int32 ``[texts + 1]``, 0 and where each ends, on the tokens' device.
    """

    lengths: list[int]
    ends: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Texts:
        """Put lengths on a device."""
        ends = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        torch.cumsum(torch.tensor(lengths, dtype=torch.int32), 0, out=ends[1:])
        return cls([int(x) for x in lengths], ends.to(device))

    @property
    def longest(self) -> int:
        """A bound on their lengths."""
        # Never 1: both packages take another path then, and a text's sums depend on its batch.
        return max([2, *self.lengths])


class VarlenForm(Protocol):
    """Causal attention within texts, as `stars_fast.ops.varlen.varlen_attention` has it."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, texts: Texts, options: AttentionOptions
    ) -> tuple[Tensor, Tensor]:
        """Return ``[T, heads, Dv]`` and natural log-sum-exps, float32 ``[heads, T]``."""


class Chosen(NamedTuple):
    """What runs where the kernels could.

    Attributes
    ----------
    form
        None: the kernels do everything.
    cascades
        Whether it also attends where texts have a prefix on the pages, by log-sum-exp.
    """

    form: VarlenForm | None = None
    cascades: bool = False


def choose_attention(
    attention: Attention,
    layouts: Sequence[LayerLayout],
    *,
    on_kernels: bool,
    device: torch.device,
    stored: torch.dtype,
) -> Chosen:
    """Return who attends in passes of many tokens.

    Parameters
    ----------
    attention
        As the user asked for it.
    layouts
        The model's layers.
    on_kernels
        Whether it runs on the Triton backend.
    device
        Its own.
    stored
        Dtype of the pages.

    Raises
    ------
    ValueError
        If what is asked for is not there or does not suit the model.
    """
    check_attention(attention)
    if not on_kernels:
        if attention not in ("auto", "torch"):
            raise _refused(
                attention,
                ("auto", "torch"),
                f"the model is on {device} and not on the Triton backend",
            )
        return Chosen()
    if attention == "triton" or (attention == "auto" and device.type != "cuda"):
        return Chosen()
    names = ("flash", "torch") if attention == "auto" else (attention,)
    for name in names:
        form, reason = _form(name, device)
        if form is not None:
            reason = _unfit(name, layouts, device, stored) or _fault(form, layouts, device)
        if not reason:
            _log.info("attention=%r: prompts are read by %s", attention, name)
            return Chosen(form, cascades=attention != "auto")
        if attention != "auto":
            raise _refused(attention, get_args(Attention), reason)
        _log.info("attention='auto' passes over %s: %s", name, reason)
    return Chosen()


def _refused(attention: str, choices: Sequence[str], reason: str) -> ValueError:
    return ValueError(
        f"attention must be one of {', '.join(choices)} here, got {attention!r}: {reason}"
    )


def _form(name: str, device: torch.device) -> tuple[VarlenForm | None, str]:
    """Return a form, or why there is none."""
    if name == "torch":
        return (by_torch if device.type == "cuda" else by_operators), ""
    if device.type != "cuda":
        return None, f"flash-attn runs on CUDA devices, and the model is on {device}"
    if importlib.util.find_spec("flash_attn") is None:
        return None, "the package flash-attn is not installed"
    return by_flash, ""


def _unfit(
    name: str, layouts: Sequence[LayerLayout], device: torch.device, stored: torch.dtype
) -> str:
    """Say why a form cannot serve a model; nothing if it can."""
    for layer in layouts:
        if layer.dtype != stored:
            return f"pages of {stored} round a text's own keys and values, which it would not see"
        if device.type != "cuda":
            continue
        if layer.dtype not in _HALF:
            return f"it takes bfloat16 and float16, and the model is in {layer.dtype}"
        if layer.key_dim != layer.value_dim:
            return (
                "it needs keys and values of one size, and the model has "
                f"{layer.key_dim} and {layer.value_dim}"
            )
        if name == "torch" and layer.softcap:
            return f"it has no soft cap on scores, and the model has one of {layer.softcap:g}"
    return ""


def _fault(form: VarlenForm, layouts: Sequence[LayerLayout], device: torch.device) -> str:
    """Say what goes wrong with a few random tokens; nothing if a form agrees with PyTorch."""
    texts = Texts.of(_TRIAL, device)
    generator = torch.Generator().manual_seed(0)
    for layer in dict.fromkeys(layouts):

        def drawn(heads: int, dim: int, dtype: torch.dtype = layer.dtype) -> Tensor:
            x = torch.randn((sum(_TRIAL), heads, dim), generator=generator)
            return x.to(device, dtype)

        query = drawn(layer.heads, layer.key_dim)
        key = drawn(layer.kv_heads, layer.key_dim)
        value = drawn(layer.kv_heads, layer.value_dim)
        options = AttentionOptions(layer.key_dim**-0.5, min(layer.window, 9), layer.softcap)
        want = varlen_attention(query.float(), key.float(), value.float(), texts.lengths, options)
        try:
            with torch.inference_mode():
                got = form(query, key, value, texts, options)
                differs = max(_distance(*pair) for pair in zip(got, want, strict=True))
        except Exception as error:  # noqa: BLE001 - a package may fail in any way
            return f"it fails at load: {type(error).__name__}: {error}"[:500]
        if not differs <= _TOLERANCE.get(layer.dtype, 1e-4):
            return f"it differs from PyTorch by {differs:.3g} at load"
    return ""


def _distance(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        raise ValueError(f"the result should have shape {tuple(want.shape)}, got {got.shape}")
    return float((got.float() - want).abs().max())


def by_flash(
    query: Tensor, key: Tensor, value: Tensor, texts: Texts, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Attend by the package flash-attn."""
    from flash_attn import flash_attn_varlen_func

    out, lse, _ = flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=texts.ends,
        cu_seqlens_k=texts.ends,
        max_seqlen_q=texts.longest,
        max_seqlen_k=texts.longest,
        softmax_scale=options.scaling,
        causal=True,
        window_size=_window(options),
        softcap=options.softcap,
        return_attn_probs=True,
    )
    return out.contiguous(), lse


def by_torch(
    query: Tensor, key: Tensor, value: Tensor, texts: Texts, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Attend by PyTorch on a GPU."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    out, lse = varlen_attn(
        query,
        key,
        value,
        cu_seq_q=texts.ends,
        cu_seq_k=texts.ends,
        max_q=texts.longest,
        max_k=texts.longest,
        return_aux=AuxRequest(lse=True),
        scale=options.scaling,
        window_size=_window(options),
        **_grouped(shared=query.shape[1] != key.shape[1]),
    )
    return out.contiguous(), lse


@functools.cache
def _grouped(*, shared: bool) -> dict[str, Any]:
    """Ask for query heads that share keys; torch 2.11 takes them without being asked."""
    from torch.nn.attention.varlen import varlen_attn

    asked = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return {"enable_gqa": True} if shared and asked else {}


def by_operators(
    query: Tensor, key: Tensor, value: Tensor, texts: Texts, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Attend by PyTorch's operators, where kernels are interpreted."""
    return varlen_attention(query, key, value, texts.lengths, options)


def _window(options: AttentionOptions) -> tuple[int, int]:
    """Tokens that a query sees to its left and right; -1 on the left is all of them."""
    return (options.window - 1 if options.window > 0 else -1, 0)
