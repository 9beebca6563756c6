"""Who attends to prompts: what is chosen, what is refused, and the same results from each."""

from __future__ import annotations

import inspect
import itertools
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.backends import device_of
from helpers.page_driver import PageDriver, Sequence
from helpers.tiny_architectures import tiny_lm
from torch import Tensor
from torch.nn.attention import varlen

from stars_fast import Engine
from stars_fast.config import EngineConfig
from stars_fast.models import varlen_forms
from stars_fast.models.probe import LayerLayout, attention_layout
from stars_fast.models.varlen_forms import Chosen, Texts, by_flash, by_operators, by_torch
from stars_fast.ops.attention import AttentionOptions
from stars_fast.ops.varlen import varlen_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIGNATURE = inspect.signature(varlen.varlen_attn)
LAYER = LayerLayout(4, 2, 8, 8, 0, torch.bfloat16)


def choose(
    attention: Any, *layers: LayerLayout, device: torch.device = CUDA, **options: Any
) -> Any:
    settings = {"on_kernels": True, "stored": layers[0].dtype if layers else LAYER.dtype, **options}
    return varlen_forms.choose_attention(attention, layers or (LAYER,), device=device, **settings)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_cascades_agree_with_eager_attention(name: str) -> None:
    """Fresh texts, then forks behind them; with windows, soft caps, sinks and rotated keys."""
    pytest.importorskip("triton", reason="Triton is for Linux only")
    changes: dict[str, Any] = {"num_hidden_layers": 1}
    if name != "llama":
        changes |= {"layer_types": ["sliding_attention"], "sliding_window": 3}
    tolerance = 1e-5
    if device_of("triton").type == "cuda":  # PyTorch's form, which takes no float32
        changes["dtype"], tolerance = torch.bfloat16, 0.15
    model = tiny_lm(name, **changes).to(device_of("triton"))
    driver = PageDriver(
        model, page_size=4, num_pages=32, tolerance=tolerance, backend="triton", attention="torch"
    )
    assert driver.paged._chosen.cascades
    rng = random.Random(name)
    long, short = Sequence(), Sequence()
    prompts = [driver.random_tokens(rng, n) for n in (6, 1)]
    rows = driver.extend([(long, [prompts[0]]), (short, [prompts[1]])])
    driver.commit(long, rows[0], 0, 6)
    driver.seal(long)
    driver.extend([(long, [[20, 21, 22], [23]]), (Sequence(), [[24, 25]])])
    assert driver.compared == 5


@pytest.mark.parametrize("attention", ["auto", "torch"])
def test_without_kernels_pytorch_is_all_there_is(attention: Any) -> None:
    assert choose(attention, on_kernels=False, device=CPU) == Chosen()
    assert choose("auto", device=CPU) == choose("triton") == Chosen()


@pytest.mark.parametrize(
    ("attention", "options", "message"),
    [
        ("sdpa", {}, "attention must be one of auto, triton, flash, torch, got 'sdpa'"),
        (
            "triton",
            {"on_kernels": False},
            "attention must be one of auto, torch here, got 'triton': the model is on cpu and not",
        ),
        ("flash", {"on_kernels": False}, "attention must be one of auto, torch here, got 'flash'"),
        (
            "flash",
            {},
            "here, got 'flash': flash-attn runs on CUDA devices, and the model is on cpu",
        ),
    ],
)
def test_what_is_not_here_is_refused(attention: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(attention, device=CPU, **options)


def test_an_engine_asks_at_load() -> None:
    with pytest.raises(ValueError, match="attention must be one of .*, got 'xformers'"):
        EngineConfig(attention="xformers")  # type: ignore[arg-type]
    model = tiny_lm("llama", num_hidden_layers=1)
    for attention in ("flash", "triton"):
        with pytest.raises(ValueError, match=f"one of auto, torch here, got '{attention}'"):
            Engine(model, device="cpu", num_pages=8, attention=attention)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Say what goes wrong with each form on a GPU that is not here; flash-attn is installed."""
    found: dict[str, str] = {}
    names = {by_flash: "flash", by_torch: "torch"}
    monkeypatch.setattr(varlen_forms, "_fault", lambda form, *_: found.get(names[form], ""))
    monkeypatch.setattr(varlen_forms.importlib.util, "find_spec", lambda _: object())
    return found


def test_auto_takes_the_first_that_works(
    faults: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose("auto") == Chosen(by_flash, cascades=False)
    assert choose("flash") == Chosen(by_flash, cascades=True)
    faults["flash"] = "it fails at load: ImportError: undefined symbol"
    assert choose("auto") == Chosen(by_torch, cascades=False)
    with pytest.raises(ValueError, match="got 'flash': it fails at load: ImportError"):
        choose("flash")
    faults["torch"] = "it differs from PyTorch by 0.7 at load"
    assert choose("auto") == Chosen()
    del faults["flash"]
    monkeypatch.setattr(varlen_forms.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="got 'flash': the package flash-attn is not installed"):
        choose("flash")


@pytest.mark.parametrize(
    ("attention", "layer", "message"),
    [
        ("flash", replace(LAYER, dtype=torch.float32), "it takes bfloat16 and float16"),
        ("torch", replace(LAYER, dtype=torch.float32), "it takes bfloat16 and float16"),
        ("flash", replace(LAYER, key_dim=24), "the model has 24 and 8"),
        ("torch", replace(LAYER, softcap=50.0), "the model has one of 50"),
    ],
)
@pytest.mark.usefixtures("faults")
def test_models_that_a_form_cannot_serve(attention: str, layer: LayerLayout, message: str) -> None:
    with pytest.raises(ValueError, match=f"got '{attention}': .*{message}"):
        choose(attention, layer)
    assert choose("auto", layer) in (Chosen(), Chosen(by_flash))


@pytest.mark.usefixtures("faults")
def test_pages_that_round_are_for_the_kernels() -> None:
    with pytest.raises(ValueError, match=r"got 'flash': pages of torch.float8_e4m3fn round"):
        choose("flash", stored=torch.float8_e4m3fn)
    assert choose("auto", stored=torch.float8_e4m3fn) == Chosen()


def test_soft_caps_are_found() -> None:
    assert [x.softcap for x in attention_layout(tiny_lm("gemma2"))] == [2.0] * 3
    assert {x.softcap for x in attention_layout(tiny_lm("llama"))} == {0.0}


def wrong_base(*arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse = by_operators(*arguments)
    return out, lse * 1.4427


def wrong_order(*arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse = by_operators(*arguments)
    return out, lse.T


def broken(*_: Any) -> tuple[Tensor, Tensor]:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


@pytest.mark.parametrize(
    ("form", "fault"),
    [
        (by_operators, ""),
        (wrong_base, "it differs from PyTorch by"),
        (wrong_order, "it fails at load: ValueError: the result should have shape (4, 43)"),
        (broken, "it fails at load: RuntimeError: FlashAttention only supports Ampere"),
    ],
)
def test_a_form_is_tried_at_load(form: Any, fault: str) -> None:
    layers = [replace(LAYER, window=3, softcap=2.0), replace(LAYER, dtype=torch.float32)]
    found = varlen_forms._fault(form, layers, CPU)
    assert found.startswith(fault)
    assert bool(found) == bool(fault)


def documented(
    query: Tensor, key: Tensor, value: Tensor, ends: list[int], scale: float, left: int,
    right: int, softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What both packages document: keys from i - left to i + right, -1 being no bound."""
    out, lse = torch.empty_like(query), torch.empty(query.shape[1], len(query))
    for begin, end in itertools.pairwise(ends):
        for i in range(begin, end):
            low = begin if left < 0 else max(begin, i - left)
            high = end if right < 0 else min(end, i + right + 1)
            for head in range(query.shape[1]):
                at = head * key.shape[1] // query.shape[1]
                scores = key[low:high, at] @ query[i, head] * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                out[i, head] = scores.softmax(0) @ value[low:high, at]
                lse[head, i] = scores.logsumexp(0)
    return out, lse


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, **asked: Any
) -> tuple[Tensor, Tensor, None]:
    """Stands in for flash-attn's, see `test_varlen_signatures.py`."""
    ends, longest = asked["cu_seqlens_q"], asked["max_seqlen_q"]
    assert (asked["cu_seqlens_k"], asked["max_seqlen_k"]) == (ends, longest)
    assert (asked["causal"], asked["return_attn_probs"]) == (True, True)
    assert ends.dtype == torch.int32
    assert longest >= max(ends.diff().tolist())
    left, _ = asked["window_size"]  # causal: nothing to the right
    scale, softcap = asked["softmax_scale"], asked["softcap"]
    return (*documented(q, k, v, ends.tolist(), scale, left, 0, softcap), None)


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool = False, **asked: Any
) -> tuple[Tensor, Tensor]:
    """Stands in for PyTorch's, which has no form for a CPU."""
    has_flag = "enable_gqa" in SIGNATURE.parameters  # torch 2.11 needs none
    assert enable_gqa == (has_flag and query.shape[1] != key.shape[1])
    ends, longest = asked["cu_seq_q"], asked["max_q"]
    assert (asked["cu_seq_k"], asked["max_k"]) == (ends, longest)
    assert asked["return_aux"].lse
    assert ends.dtype == torch.int32
    assert longest >= max(ends.diff().tolist())
    return documented(query, key, value, ends.tolist(), asked["scale"], *asked["window_size"])


varlen_attn.__signature__ = SIGNATURE  # type: ignore[attr-defined]


@pytest.mark.parametrize("form", [by_flash, by_torch])
@pytest.mark.parametrize(
    ("lengths", "kv_heads", "window", "softcap"),
    [((5, 1, 3), 2, 0, 0.0), ((1, 1), 4, 0, 0.0), ((6, 2), 1, 3, 0.0), ((4,), 2, 0, 1.5)],
)
def test_calls_ask_for_what_is_meant(
    form: Callable[..., tuple[Tensor, Tensor]],
    lengths: tuple[int, ...],
    kv_heads: int,
    window: int,
    softcap: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if form is by_torch and softcap:
        pytest.skip("PyTorch's has no soft cap, and models with one are refused")
    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn((sum(lengths), n, 8), generator=generator) for n in (4, kv_heads, kv_heads)
    )
    texts = Texts.of(lengths, CPU)
    assert texts.longest >= 2  # of 1, both packages take another path
    options = AttentionOptions(0.3, window, softcap)
    got = form(query, key, value, texts, options)
    for one, other in zip(got, varlen_attention(query, key, value, lengths, options), strict=True):
        torch.testing.assert_close(one, other)
