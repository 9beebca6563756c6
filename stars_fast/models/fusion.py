"""Decoder layers with few calls: what lies between their products, in the operators of `ops.fused`.

transformers writes a layer as some forty small operators. Here a module is known by what it
computes: one that has the parts of a known form is run both ways on what it got in a forward of the
model, and replaced only if the results agree. The rest stays as it is. Replacements take the place
of `forward` while a forward of ours runs; on a GPU, the weights of products that are joined become
parts of one tensor for good.

Where the operators are kernels, modules are compared in float32 on the CPU, in PyTorch's form of
the operators: rounding hides no difference there, and whether a kernel is right is for its own
tests, and for the check of the whole model at load.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from stars_fast.models.expert_forms import experts_forms, router_forms
from stars_fast.models.first_layers import first_layers
from stars_fast.models.interface import (
    STARS_PAGED,
    attention_configs,
    attention_implementation,
)
from stars_fast.models.joined import JoinedLinears, Joining
from stars_fast.models.latent_forms import latent_product, latent_turns
from stars_fast.models.linear import may_pack
from stars_fast.models.machine import memory_bytes
from stars_fast.models.packed import GATE_UP, QKV
from stars_fast.models.probe import LayerLayout
from stars_fast.models.quantize import Int8Linear, joined
from stars_fast.ops.backend import backend, plain, uses_triton
from stars_fast.ops.cpu import runs_on
from stars_fast.ops.fused import (
    Activation,
    Norm,
    Rotary,
    gated,
    norm_add,
    norm_heads,
    rms_norm,
    rotate,
)

_log = logging.getLogger(__name__)

Forward: TypeAlias = Callable[..., Any]
MlpForward: TypeAlias = Callable[[Tensor], Tensor]
Product: TypeAlias = Callable[[Tensor], Sequence[Tensor]]
Turn: TypeAlias = Callable[[Tensor, Tensor], Rotary]

_TOKENS = 3  # of the forward on which modules are compared
_FIRST = 5  # their first position, where rotary embeddings turn
_TOLERANCE = 1e-4  # largest difference over the standard deviation of the result
_ROUNDED_TOLERANCE = 3e-3  # likewise of modules that round their activations
_MEMORY_SHARE = 1 / 4  # of the machine's, for a copy of the first layers
_TABLE_ROWS = 64  # of the embeddings there: more than the tokens ask for


def _repeated(table: Tensor) -> Tensor:
    return table[..., : table.shape[-1] // 2].repeat_interleave(2, dim=-1)


# How models give their tables of cosines and sines: a column for each channel, ...
_TURNS: tuple[Turn, ...] = (
    Rotary,
    lambda cos, sin: Rotary(cos, sin, interleaved=True),
    # ... twice those of the pairs (GLM), or once (GPT-OSS).
    lambda cos, sin: Rotary(_repeated(cos), _repeated(sin), interleaved=True),
    lambda cos, sin: Rotary(torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)),
)


@dataclass
class _Seen:
    """Queries, keys and options of the attention calls of a forward, which returns its values.

    Queries by their factor: a model may multiply them with it before the call.
    """

    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    scalings: list[float] = field(default_factory=list)
    options: list[dict[str, Any]] = field(default_factory=list)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        softcap: float,
        sinks: Tensor | None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """Record a call, see `LayerAttention`."""
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        self.calls.append((query * scaling, key.clone()))
        self.scalings.append(scaling)
        self.options.append({"softcap": softcap, "sinks": sinks})
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)


@dataclass
class _Call:
    """What a module was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, forward: Forward) -> tuple[list[Tensor], _Seen]:
        """Return the tensors that a forward gives on copies of it, and its calls of attention."""
        seen = _Seen()
        kwargs = dict(self.kwargs)
        if "stars_attention" in kwargs:
            kwargs["stars_attention"] = seen
        output = forward(*(x.clone() if isinstance(x, Tensor) else x for x in self.args), **kwargs)
        outputs = output if isinstance(output, tuple) else (output,)
        return [x for x in outputs if isinstance(x, Tensor)], seen


class _NormForm:
    """A norm's `forward`, and the same behind a residual."""

    def __init__(self, norm: Norm) -> None:
        self.norm = norm

    def __call__(self, hidden_states: Tensor) -> Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return rms_norm(flat, self.norm)[0].view(hidden_states.shape)


@dataclass(frozen=True)
class _Asked:
    """What an attention module asks for; `sinks` is the name of its parameter."""

    heads: int
    kv_heads: int
    key_dim: int
    scaling: float
    softcap: float
    sinks: str | None


@dataclass
class Known:
    """What modules compute, by kind: which form of a part agreed, and what attention asks for."""

    chosen: dict[Hashable, int] = field(default_factory=dict)
    asked: dict[Hashable, _Asked] = field(default_factory=dict)


class FusedLayers:
    """The replacements of a model's modules, or none.

    What is learned on the first layers holds for the others of their kind. Modules with hooks, and
    those whose `forward` somebody has replaced, stay as they are.

    Parameters
    ----------
    model : PreTrainedModel
        A causal decoder in eval mode, on one device, as `check_architecture` has it.
    layouts : sequence of LayerLayout
        Its attention calls.
    known : Known, optional
        What a model of the same modules was found to compute; by default it is found here.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layouts: Sequence[LayerLayout],
        known: Known | None = None,
    ) -> None:
        kernels = uses_triton(model.device)
        self._joining: Joining = "in place" if kernels else "apart"
        if not plain() and not kernels and may_pack(model):
            self._joining = "packed"
        self._products: dict[nn.Module, JoinedLinears] = {}
        self._norms: dict[nn.Module, _NormForm] = {}
        self._mlps: dict[nn.Module, MlpForward] = {}
        self._experts: dict[nn.Module, Forward] = {}  # routers, too
        self._attentions: dict[nn.Module, Forward] = {}
        self._layers: dict[nn.Module, Forward] = {}
        self._rotaries: Any = WeakIdKeyDictionary()  # by a forward's table of cosines
        self._calls = len(layouts)
        self._replaced: dict[nn.Module, Forward] = {}
        # C++ reads what it is given as float32; the other forms ask each tensor for its dtype.
        self._typed = runs_on(next(model.parameters()))
        self._kinds = {m: _kind(m, self._typed) for m in model.modules() if m is not model}
        if known is None and kernels:
            # Where attention has another dtype than weights, a copy in float32 would not show it.
            alike = all(layout.dtype == model.dtype for layout in layouts)
            known = _known_of_copy(model, layouts) if alike else Known()
        self.known = Known() if known is None else known
        calls: dict[nn.Module, _Call] = {}
        paged = attention_implementation(attention_configs(model), STARS_PAGED)
        with torch.inference_mode(), paged:
            if known is None:
                found = _calls(first_layers(model, layouts)[0])
                calls = {m: call for m, call in found.items() if m in self._kinds}
            self._replace(calls, "norm", _norm_forms, self._norms)
            if not self._typed:  # in C++ it would be another rounding, and no less time
                self._replace(calls, "activation", _activation_forms, {})
                self._replace(calls, "layer norm", _layer_norm_forms, {})
            if kernels or (plain() and model.device.type == "cpu"):
                self._replace(calls, "router", router_forms, self._experts)
                self._replace(calls, "experts", experts_forms, self._experts)
            self._replace(calls, "mlp", self._mlp_forms, self._mlps)
            for module, call in calls.items():
                if (asked := _asked_by(module, call)) is not None:
                    self.known.asked[self._kinds[module]] = asked
            self._replace(calls, "attention", self._attention_forms, self._attentions)
            self._replace(calls, "layer", self._layer_forms, self._layers)
        for layer in self._layers:
            for part in list(layer.modules())[1:]:
                if part not in self._experts:  # which its mixture of experts calls
                    self._replaced.pop(part, None)
        parts = [part for module in self._replaced for part in module.modules()]
        #: Empty while the replacements may be used.
        self._hooks = [h for part in parts for h in (part._forward_hooks, part._forward_pre_hooks)]
        self._attributes = [vars(part) for part in parts]

    @classmethod
    def of(cls, model: PreTrainedModel, layouts: Sequence[LayerLayout]) -> FusedLayers:
        """Return those of a model, which all that run it share as long as one of them is there."""
        key = model, uses_triton(model.device)
        found = _FUSED.get(key)
        if found is None:
            found = _FUSED[key] = cls(model, layouts)
        return found

    @property
    def whole(self) -> bool:
        """Whether every layer is replaced, MLP included: no other operator does real work."""
        mlps = set(self._mlps)
        layers = [part for part in self._replaced if part in self._layers]
        return len(layers) == self._calls and all(mlps & set(layer.modules()) for layer in layers)

    @property
    def replaced(self) -> list[nn.Module]:
        """The modules that are replaced."""
        return list(self._replaced)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Put the replacements in place for the time of a forward."""
        if any(self._hooks) or any("forward" in names for names in self._attributes):
            yield
            return
        for module, forward in self._replaced.items():
            # Past nn.Module.__setattr__, which is slow and meant for parameters.
            module.__dict__["forward"] = forward
        try:
            yield
        finally:
            for module in self._replaced:
                del module.__dict__["forward"]

    def _replace(
        self,
        calls: dict[nn.Module, _Call],
        part: str,
        forms_of: Callable[[nn.Module], Iterator[Any]],
        found: dict[nn.Module, Any],
    ) -> None:
        """Find which form the called modules have, and replace all of their kinds."""
        compared = set()
        for module, call in calls.items():
            kind = part, self._kinds[module]
            if kind in compared:
                continue
            compared.add(kind)
            rounds = any(isinstance(one, Int8Linear) for one in module.modules())
            tolerance = _ROUNDED_TOLERANCE if rounds else _TOLERANCE
            agreeing = (
                number
                for number, form in enumerate(forms_of(module))
                if _equal(call, module.forward, form, tolerance)
            )
            chosen = next(agreeing, None)
            if chosen is None:
                continue
            if part == "norm" and not self._typed:
                chosen = _nearest_norm(module, call, [chosen, *agreeing])
            self.known.chosen[kind] = chosen
        for module, kind_of_it in self._kinds.items():
            chosen = self.known.chosen.get((part, kind_of_it))
            if chosen is not None:
                form = next(itertools.islice(forms_of(module), chosen, None))
                self._replaced[module] = found[module] = form

    def _join(self, module: nn.Module, names: tuple[str, ...]) -> Product | None:
        """Return the product of a module's linear layers; None if it has no such layers."""
        parts = [getattr(module, name, None) for name in names]
        linears = [part for part in parts if isinstance(part, nn.Linear)]
        packed = [part for part in parts if isinstance(part, Int8Linear)]
        if len(packed) == len(parts):
            return joined(packed)
        if len(linears) < len(parts):
            return None
        if module not in self._products:
            self._products[module] = JoinedLinears(linears, joining=self._joining)
        return self._products[module]

    def _mlp_forms(self, module: nn.Module) -> Iterator[MlpForward]:
        """Down(act(gate(x)) * up(x)), its products joined."""
        down = getattr(module, "down_proj", None)
        both = getattr(module, "gate_up_proj", None)
        if not isinstance(down, nn.Linear | Int8Linear):
            return
        product = self._join(module, GATE_UP)
        if isinstance(both, nn.Linear | Int8Linear):
            product = lambda x: both(x).chunk(2, dim=-1)  # noqa: E731
        if product is None:
            return
        for activation in get_args(Activation):
            yield _mlp_form(product, down, activation)

    def _attention_forms(self, module: nn.Module) -> Iterator[Forward]:
        """o(attention(q(x), k(x), v(x))), its products joined, norms and rotary between."""
        asked = self.known.asked.get(self._kinds[module])
        out = _out_of(module)
        if asked is None or out is None:
            return
        latent = None
        if not self._typed:  # C++ has no such rotation
            latent = latent_product(module, asked.heads, self._norm_of, self._join)
        if latent is not None:
            for turn in latent_turns(int(module.qk_nope_head_dim)):  # type: ignore[arg-type]
                turned = functools.partial(self._turned, turn)
                yield _attention_form(latent, out, [None, None], asked, None, turned)
            return
        product = self._attention_product(module, asked)
        if product is None:
            return
        norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
        if any(norm is not None and norm not in self._norms for norm in norms):
            return
        normed = [None if norm is None else self._norms[norm] for norm in norms]
        sinks = None if asked.sinks is None else getattr(module, asked.sinks)
        scalings = [asked.scaling]
        own = getattr(module, "scaling", None)
        if not self._typed and asked.scaling == 1.0 and isinstance(own, float):  # OPT
            scalings.append(own)
        for scaling in scalings:
            scaled = replace(asked, scaling=scaling)
            for turn in _TURNS:
                turned = functools.partial(self._turned, turn)
                yield _attention_form(product, out, normed, scaled, sinks, turned)
            yield _attention_form(product, out, normed, scaled, sinks, None)

    def _attention_product(self, module: nn.Module, asked: _Asked) -> Product | None:
        """Return what gives queries, keys and values of an attention module."""
        both = getattr(module, "qkv_proj", None)
        if isinstance(both, nn.Linear | Int8Linear):
            sizes = [asked.heads * asked.key_dim, asked.kv_heads * asked.key_dim]
            sizes.append(both.out_features - sum(sizes))
            return lambda x: both(x).split(sizes, dim=-1)
        by_head = getattr(module, "query_key_value", None)  # GPT-NeoX
        if isinstance(by_head, nn.Linear) and not self._typed:
            return lambda x: by_head(x).view(len(x), asked.heads, -1).chunk(3, dim=-1)
        return self._join(module, QKV)

    def _norm_of(self, module: nn.Module) -> Norm | None:
        return self._norms[module].norm if module in self._norms else None

    def _turned(self, turn: Turn, cos: Tensor, sin: Tensor) -> Rotary:
        """Return what `turn` makes of a forward's tables, once for all its layers."""
        if turn is Rotary:
            return Rotary(cos.squeeze(0), sin.squeeze(0))
        made = self._rotaries.setdefault(cos, {})
        if turn not in made:
            made[turn] = turn(cos.squeeze(0), sin.squeeze(0))
        found: Rotary = made[turn]
        return found

    def _layer_forms(self, module: nn.Module) -> Iterator[Forward]:
        """Add attention(norm(x)) to x, then the same with the MLP; norms may follow both."""
        parts = dict(module.named_children())
        attention = self._attentions.get(parts.get("self_attn"))  # type: ignore[arg-type]
        mlp = parts.get("mlp")
        if attention is None or mlp is None:
            return
        run_mlp = self._mlps.get(mlp) or _as_called(mlp)

        def norm(*names: str) -> _NormForm | None:
            found = [self._norms[parts[n]] for n in names if parts.get(n) in self._norms]
            return found[0] if found else None

        first = norm("input_layernorm")
        scale = getattr(module, "residual_multiplier", 1.0)  # Granite
        if self._typed and (first is None or scale != 1.0):
            return

        before = norm("pre_feedforward_layernorm")
        if before is not None:  # Gemma 2 and 3
            behind = norm("post_attention_layernorm"), norm("post_feedforward_layernorm")
        else:
            before = norm("post_attention_layernorm")
            behind = norm("post_self_attn_layernorm"), norm("post_mlp_layernorm")  # GLM 4
        if first is None and before is not None and behind[1] is None:  # OLMo 2
            behind = before, norm("post_feedforward_layernorm")
        if first is None and behind[0] is not None and behind[1] is not None:
            yield _layer_form_behind(attention, run_mlp, behind[0], behind[1])
        if first is not None and before is not None:
            yield _layer_form(first, attention, before, run_mlp, behind, scale)


def _as_called(mlp: nn.Module) -> MlpForward:
    """Return an MLP that is not replaced, on [T, hidden]; of several outputs the first."""

    def forward(hidden: Tensor) -> Tensor:
        result = mlp(hidden.unsqueeze(0))
        first: Tensor = result[0] if isinstance(result, tuple) else result
        return first.squeeze(0)

    return forward


def _mlp_form(product: Product, down: nn.Module, act: Activation) -> MlpForward:
    def forward(hidden: Tensor) -> Tensor:
        gate, up = product(hidden.reshape(-1, hidden.shape[-1]))
        result: Tensor = down(gated(gate, up, act))
        return result.view(hidden.shape)

    return forward


def _attention_form(
    product: Product,
    out: nn.Module,
    norms: list[_NormForm | None],
    asked: _Asked,
    sinks: Tensor | None,
    turn: Turn | None,
) -> Forward:
    heads, kv_heads, dim = asked.heads, asked.kv_heads, asked.key_dim
    query_norm, key_norm = (None if norm is None else norm.norm for norm in norms)

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *,
        stars_attention: Any,  # noqa: ANN401
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        query, key, value = product(hidden_states.squeeze(0))
        query, key = norm_heads(query, key, query_norm, key_norm, dim)
        rotary = None
        if turn is not None and position_embeddings is not None:
            rotary = turn(*position_embeddings)
        attended = stars_attention(
            query.view(-1, heads, dim),
            key.view(-1, kv_heads, dim),
            value.view(len(value), kv_heads, -1),
            scaling=asked.scaling,
            softcap=asked.softcap,
            sinks=sinks,
            rotary=rotary,
        )
        return out(attended.flatten(1)).unsqueeze(0), None

    return forward


def _layer_form(
    first: _NormForm,
    attention: Forward,
    second: _NormForm,
    mlp: MlpForward,
    behind: tuple[_NormForm | None, _NormForm | None],
    scale: float,
) -> Forward:
    behind_attention, behind_mlp = (None if norm is None else norm.norm for norm in behind)

    def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden = hidden_states.squeeze(0)
        normed, _ = rms_norm(hidden, first.norm)
        attended, _ = attention(hidden_states=normed.unsqueeze(0), **kwargs)
        normed, hidden = rms_norm(attended.squeeze(0), second.norm, hidden, behind_attention, scale)
        result = mlp(normed)
        if behind_mlp is None and scale == 1.0:
            return (hidden + result).unsqueeze(0)
        return norm_add(result, behind_mlp, hidden, scale).unsqueeze(0)

    return forward


def _layer_form_behind(
    attention: Forward, mlp: MlpForward, behind_attention: _NormForm, behind_mlp: _NormForm
) -> Forward:
    def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = attention(hidden_states=hidden_states, **kwargs)
        hidden = norm_add(attended.squeeze(0), behind_attention.norm, hidden_states.squeeze(0))
        return norm_add(mlp(hidden), behind_mlp.norm, hidden).unsqueeze(0)

    return forward


def _norm_forms(module: nn.Module) -> Iterator[_NormForm]:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    names = [name for name, _ in module.named_parameters()]
    if names != ["weight"] or not isinstance(weight, Tensor) or weight.ndim != 1:
        return
    if not isinstance(eps, float) or list(module.children()):
        return
    for offset in (0.0, 1.0):
        for rounds_first in (True, False):
            yield _NormForm(Norm(weight, eps, offset, rounds_first))


def _activation_forms(module: nn.Module) -> Iterator[Forward]:
    """GELU's tanh form, which some models write as eight operators."""
    if not list(module.children()) and not list(module.parameters()):
        yield functools.partial(F.gelu, approximate="tanh")


def _layer_norm_forms(module: nn.Module) -> Iterator[Forward]:
    """Layer norm without bias, which Cohere's models write out."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    names = [name for name, _ in module.named_parameters()]
    if names == ["weight"] and isinstance(eps, float):
        assert isinstance(weight, Tensor)
        if weight.ndim == 1:
            yield lambda x: F.layer_norm(x, weight.shape, weight, None, eps)


def _nearest_norm(module: nn.Module, call: _Call, agreeing: list[int]) -> int:
    """Return which of some forms that agree in float32 rounds in bfloat16 as the module does."""
    narrow = copy.deepcopy(module).to(torch.bfloat16)
    call = _Call(tuple(x.to(torch.bfloat16) for x in call.args), call.kwargs)
    (want,), _ = call.run(narrow.forward)
    forms = list(_norm_forms(narrow))

    def difference(number: int) -> float:
        (found,), _ = call.run(forms[number])
        return float((found.float() - want.float()).abs().sum())

    return min(agreeing, key=difference)


def _out_of(module: nn.Module) -> nn.Module | None:
    """Return an attention module's product behind the attention."""
    found = (getattr(module, name, None) for name in ("o_proj", "out_proj", "dense"))
    return next((x for x in found if isinstance(x, nn.Module)), None)


def _asked_by(module: nn.Module, call: _Call) -> _Asked | None:
    """What a module asks attention for, if it calls it once, with a parameter of its own."""
    if "stars_attention" not in call.kwargs or _out_of(module) is None:
        return None
    _, seen = call.run(module.forward)
    if len(seen.calls) != 1:
        return None
    (query, key), options = seen.calls[0], seen.options[0]
    names = {id(parameter): name for name, parameter in module.named_parameters(recurse=False)}
    sinks = options["sinks"]
    if sinks is not None and id(sinks) not in names:
        return None
    return _Asked(
        query.shape[1],
        key.shape[1],
        query.shape[2],
        seen.scalings[0],
        options["softcap"],
        names.get(id(sinks)),
    )


def _calls(model: PreTrainedModel) -> dict[nn.Module, _Call]:
    """What each module of the backbone is called with, in a forward of some tokens."""
    calls: dict[nn.Module, _Call] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, _Call(args, kwargs))

    ids = torch.arange(_TOKENS, device=model.device).unsqueeze(0)
    hooks = [m.register_forward_pre_hook(record, with_kwargs=True) for m in model.modules()]
    try:
        model.base_model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=ids + _FIRST,
            use_cache=False,
            stars_attention=_Seen(),
        )
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _known_of_copy(model: PreTrainedModel, layouts: Sequence[LayerLayout]) -> Known:
    """What the modules of a model compute, found on a copy in float32 on the CPU."""
    short, _ = first_layers(model, layouts)
    backbone = short.base_model
    assert isinstance(backbone, PreTrainedModel)
    rows = {
        id(module.weight): _TABLE_ROWS
        for module in backbone.modules()
        if isinstance(module, nn.Embedding) and (module.padding_idx or 0) < _TABLE_ROWS
    }
    parts = {
        id(x): x.detach()[: rows[id(x)]] if id(x) in rows else x.detach()
        for x in (*backbone.parameters(), *backbone.buffers())
    }
    size = sum(x.numel() for x in parts.values()) * torch.float32.itemsize
    if size > _MEMORY_SHARE * memory_bytes():
        _log.info("layers run as they are: a copy of the first ones takes %d bytes", size)
        return Known()
    parameters = {id(x) for x in backbone.parameters()}
    copies: dict[int, Any] = {}  # by id of what `deepcopy` is to take as copied
    paged = attention_implementation(attention_configs(model), STARS_PAGED)
    with torch.inference_mode(), paged:
        for key, x in parts.items():
            kept = x.to("cpu", torch.float32 if x.is_floating_point() else x.dtype, copy=True)
            copies[key] = nn.Parameter(kept, requires_grad=False) if key in parameters else kept
        twin = copy.deepcopy(backbone, copies)
    with backend("pytorch"):
        return FusedLayers(twin, layouts).known


def _kind(module: nn.Module, typed: bool) -> tuple[Any, ...]:
    """Equal for modules that differ in their weights alone; `typed`: not in their dtypes either."""
    parts = []
    for part in module.modules():
        plain = {k: v for k, v in vars(part).items() if isinstance(v, bool | int | float | str)}
        for name in ("layer_idx", "_is_hf_initialized"):
            plain.pop(name, None)
        shapes = tuple(
            (n, p.shape, p.dtype if typed else None)
            for n, p in part.named_parameters(recurse=False)
        )
        parts.append((type(part), tuple(sorted(plain.items())), shapes))
    return tuple(parts)


def _equal(call: _Call, one: Forward, other: Forward, tolerance: float) -> bool:
    """Whether two forwards give the same result and ask for the same attention."""
    want, want_seen = call.run(one)
    try:
        got, got_seen = call.run(other)
    except (TypeError, ValueError, RuntimeError):  # shapes or arguments of another kind
        return False
    if len(want_seen.calls) != len(got_seen.calls) or want_seen.options != got_seen.options:
        return False
    if len(want) != len(got):
        return False
    pairs = list(zip(want, got, strict=True))
    for wanted, found in zip(want_seen.calls, got_seen.calls, strict=True):
        pairs += zip(wanted, found, strict=True)
    return all(_close(a, b, tolerance) for a, b in pairs)


def _close(want: Tensor, got: Tensor, tolerance: float) -> bool:
    if want.shape != got.shape or want.dtype != got.dtype:
        return False
    spread = float(want.float().std())
    return float((want.float() - got.float()).abs().max()) <= tolerance * max(spread, 1e-30)


#: Of each model on kernels and off them, as long as anyone holds them.
_FUSED: weakref.WeakValueDictionary[tuple[PreTrainedModel, bool], FusedLayers] = (
    weakref.WeakValueDictionary()
)
