"""Decoder layers with few calls: which modules are known, and that they compute the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from helpers.tiny_architectures import CONFIGS, tiny_lm
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from stars_fast.models.fusion import FusedLayers
from stars_fast.models.interface import (
    STARS_PAGED,
    attention_configs,
    attention_implementation,
)
from stars_fast.models.linear import OneDnnLinears
from stars_fast.models.probe import attention_layout
from stars_fast.ops.backend import backend
from stars_fast.ops.fused import Rotary, rotate

#: Modules replaced in three layers: whole layers, or what is known of them.
WHOLE = {"layer": 3, "norm": 1}
REPLACED = {
    "llama": WHOLE,
    "mistral": WHOLE,
    "qwen2": WHOLE,
    "qwen3": WHOLE,
    "gemma2": WHOLE,
    "gemma3": WHOLE,
    "phi3": WHOLE,
    "smollm3": WHOLE,
    "glm4": WHOLE,
    "olmo2": {"norm": 13, "attention": 3, "mlp": 3},
    "granite": {"norm": 7, "attention": 3, "mlp": 3},
    "cohere2": {"attention": 3, "mlp": 3},
    "gpt_oss": WHOLE,
    "mixtral": WHOLE,
    "starcoder2": {"attention": 3},
    "deepseek_v3": {"norm": 13, "mlp": 3},
    "opt": {},
    "gpt2": {},
    "gpt_neox": {},
}


#: Layers, routers and experts replaced where kernels run, of architectures with experts.
EXPERTS = {"gpt_oss": (3, 3, 3), "mixtral": (3, 3, 3), "deepseek_v3": (3, 0, 1)}


def part(module: nn.Module) -> str:
    name = type(module).__name__.lower()
    parts = ("layer", "norm", "attention", "mlp", "router", "experts")
    return next((part for part in parts if name.endswith(part)), name)


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float, **options: object
) -> Tensor:
    """Stands in for attention: depends on all it is given, and rotates as models do."""
    rotary = options.get("rotary")
    if isinstance(rotary, Rotary):
        query, key = rotate(query, rotary), rotate(key, rotary)
    group = query.shape[1] // key.shape[1]
    score = (scaling * query * key.repeat_interleave(group, dim=1)).sum(-1, keepdim=True)
    return value.repeat_interleave(group, dim=1) * torch.tanh(score)


def hidden_states(model: PreTrainedModel, tokens: int = 4) -> Tensor:
    ids = torch.arange(3, 3 + tokens).unsqueeze(0)
    with (
        torch.inference_mode(),
        attention_implementation(attention_configs(model), STARS_PAGED),
    ):
        result: Tensor = model.base_model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=ids + 4,
            use_cache=False,
            stars_attention=plain_attention,
        )[0]
    return result


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_known_computes_the_same(name: str) -> None:
    model = tiny_lm(name)
    want = hidden_states(model)
    fused = FusedLayers(model, attention_layout(model))
    assert Counter(part(module) for module in fused.replaced) == REPLACED[name]
    with fused.active():
        torch.testing.assert_close(hidden_states(model), want, atol=1e-5, rtol=1e-5)
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in ("qwen2", "gemma3")),
        *((name, torch.float32) for name in REPLACED if name not in ("llama", "mistral", "qwen2")),
    ],
)
def test_kernels_compute_the_same(name: str, dtype: torch.dtype) -> None:
    """In Triton's interpreter: what is found on a copy in float32 holds in any dtype."""
    pytest.importorskip("triton", reason="Triton is for Linux only")
    model = tiny_lm(name, dtype=dtype)
    want = hidden_states(model, tokens=2)
    with backend("triton"):
        fused = FusedLayers(model, attention_layout(model))
        assert fused.replaced
        found = Counter(part(module) for module in fused.replaced)
        parts = found["layer"], found["router"], found["experts"]
        assert parts == EXPERTS.get(name, (found["layer"], 0, 0))
        with fused.active():
            got = hidden_states(model, tokens=2)
    tolerance = 1e-5 if dtype == torch.float32 else 0.06
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Qwen3Moe", {"norm_topk_prob": True}),
        ("Qwen3Moe", {"norm_topk_prob": False}),
        ("Qwen2Moe", {"shared_expert_intermediate_size": 40}),
        ("Olmoe", {}),
    ],
)
def test_other_mixtures_of_experts(kind: str, fields: dict[str, object]) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux only")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=60, hidden_size=32, intermediate_size=48, moe_intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_experts=6, num_experts_per_tok=2, max_position_embeddings=64, **fields,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    want = hidden_states(model)
    with backend("triton"):
        fused = FusedLayers(model, attention_layout(model))
        assert Counter(part(module) for module in fused.replaced) == {
            "layer": 2, "norm": 1, "router": 2, "experts": 2,
        }  # fmt: skip
        with fused.active():
            torch.testing.assert_close(hidden_states(model), want, atol=1e-5, rtol=1e-5)


def test_joined_weights_are_parts_of_one_tensor(tmp_path: Path) -> None:
    """Names, values, later changes, files and ties stay; what is moved apart runs apart."""
    model = tiny_lm("qwen2", tie_word_embeddings=True)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with backend("triton"):
        fused = FusedLayers(model, attention_layout(model))
        again = FusedLayers(model, attention_layout(model), fused.known)
    attention = model.model.layers[1].self_attn
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    places = {part.weight.untyped_storage().data_ptr() for part in parts}
    assert len(places) == 1
    storage = parts[0].weight.untyped_storage()
    assert storage.nbytes() == sum(part.weight.nbytes for part in parts)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], x) for name, x in before.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in before.items())

    with torch.no_grad():
        attention.k_proj.weight.mul_(-1)
        attention.v_proj.bias.add_(0.5)
    for moved in (False, True):
        if moved:  # as by `model.to`, or a weight of another place
            attention.q_proj.weight.data = attention.q_proj.weight.data.flip(0).clone()
        want = hidden_states(model)
        for layers in (fused, again):
            with backend("pytorch"), layers.active():
                torch.testing.assert_close(hidden_states(model), want, atol=1e-5, rtol=1e-5)


def test_modules_that_compute_something_else_stay() -> None:
    """One layer's MLP scales its result: that layer keeps its forward, its neighbours do not."""
    model = tiny_lm("llama")

    class Scaled(type(model.model.layers[1].mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = super().forward(x) * 1.01
            return result

    model.model.layers[1].mlp.__class__ = Scaled
    want = hidden_states(model)
    fused = FusedLayers(model, attention_layout(model))
    layers = model.model.layers
    assert layers[1].mlp not in fused.replaced
    assert {layers[0], layers[2]} <= set(fused.replaced)
    with fused.active():
        torch.testing.assert_close(hidden_states(model), want, atol=1e-5, rtol=1e-5)


def test_weights_changed_in_place_are_seen() -> None:
    model = tiny_lm("qwen2")
    fused = FusedLayers(model, attention_layout(model))
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(-1)
        model.model.layers[1].mlp.up_proj.weight.add_(0.1)
        model.model.norm.weight.mul_(2)
    want = hidden_states(model)
    with fused.active():
        torch.testing.assert_close(hidden_states(model), want, atol=1e-5, rtol=1e-5)


def test_hooks_and_patches_are_kept() -> None:
    """What somebody has hung on a module runs, so the model runs as it is."""
    model = tiny_lm("llama")
    fused = FusedLayers(model, attention_layout(model))
    mlp = model.model.layers[1].mlp
    handle = mlp.register_forward_hook(lambda module, args, output: output * 2)
    want = hidden_states(model)
    with fused.active():
        assert torch.equal(hidden_states(model), want)
    handle.remove()
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) * 3
    want = hidden_states(model)
    with fused.active():
        assert torch.equal(hidden_states(model), want)
    del mlp.forward
    assert not torch.equal(hidden_states(model), want)


class _Counted(TorchDispatchMode):
    """Counts the operators that PyTorch runs, views left out."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        if not func.is_view and "empty" not in str(func):
            self.calls += 1
        return func(*args, **(kwargs or {}))


def test_calls_of_a_layer() -> None:
    """Of PyTorch's operators, four products and one sum are left; norms and gates are C++."""
    model = tiny_lm("llama")
    fused = FusedLayers(model, attention_layout(model))
    linears = OneDnnLinears(model)
    counts = []
    for layers in (3, 3, 2):  # weights are packed in the first pass
        model.config.num_hidden_layers = layers
        with fused.active(), linears.active(), _Counted() as counted:
            hidden_states(model)
        counts.append(counted.calls)
    attention = 7  # of `plain_attention`
    assert counts[1] - counts[2] - attention == 5
