"""Tiny reward models of the classes that people publish: their names of weights, their shapes.

Each is written to a directory as its own code writes it, beside the reward that its forward gives.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

SIZE = 32
OBJECTIVES, QUANTILES = 5, 3

#: From the ids of a text to its reward, by plain forward passes.
Reference = Callable[[list[int]], float]
Builder = Callable[[Path, PreTrainedTokenizerBase], Reference]

_CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "gemma2": Gemma2Config,
    "mistral": MistralConfig,
}


def tiny_config(family: str, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Any:
    """A configuration of two layers over the tokenizer's vocabulary."""
    fields = {
        "vocab_size": len(tokenizer) + 1,  # AutoTokenizer gives Qwen2 a token more
        "hidden_size": SIZE,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.3,  # large enough that attention matters
    }
    return _CONFIGS[family](**{**fields, **changes})


def seeded(build: Callable[[], nn.Module]) -> Any:
    """What `build` returns with weights that are always the same, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return build().eval()


def save(
    folder: Path,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: dict[str, Tensor],
    architecture: str,
    *,
    head_file: str | None = None,
    **fields: Any,
) -> None:
    """Write backbone and head; `fields` go into config.json."""
    base.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), "architectures": [architecture], **fields}
    path.write_text(json.dumps(config))
    weights = {f"model.{name}": value for name, value in base.state_dict().items()}
    head = {name: value.contiguous() for name, value in head.items()}
    if head_file is None:
        weights |= head
    else:
        save_file(head, folder / head_file)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def base_model(family: str, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Any:
    """The backbone alone."""
    config = tiny_config(family, tokenizer, **changes)
    return seeded(lambda: AutoModel.from_config(config, attn_implementation="eager"))


@torch.no_grad()
def hidden_states(base: PreTrainedModel, ids: list[int]) -> Tensor:
    """The last hidden states [N, hidden]."""
    return base(input_ids=torch.tensor([ids]), use_cache=False)[0][0]


def named(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """A module's weights, below a prefix."""
    return {f"{prefix}.{name}": value for name, value in module.state_dict().items()}


def on_last_token(base: PreTrainedModel, head: Callable[[Tensor], Tensor]) -> Reference:
    """The reward of a head at the last token."""

    @torch.no_grad()
    def reward(ids: list[int]) -> float:
        return float(head(hidden_states(base, ids)[-1:]))

    return reward


def linear_head(
    prefix: str,
    architecture: str,
    *,
    bias: bool = False,
    lm_head: bool = False,
    head_file: str | None = None,
    extra: tuple[str, ...] = (),
    family: str = "llama",
    **fields: Any,
) -> Builder:
    """A linear layer at every token, under the name that `prefix` is."""

    def build(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Reference:
        base = base_model(family, tokenizer)
        head = seeded(lambda: nn.Linear(SIZE, 1, bias=bias))
        weights = named(prefix, head) | {name: torch.ones(1) for name in extra}
        if lm_head:
            weights["lm_head.weight"] = torch.zeros(len(tokenizer) + 1, SIZE)
        save(folder, base, tokenizer, weights, architecture, head_file=head_file, **fields)
        return on_last_token(base, head)

    return build


def two_layers(
    prefix: str, family: str, architecture: str, inner: int = SIZE, labels: int = 1
) -> Builder:
    """Linear, ReLU, Linear; of two labels the reward is the probability of the second."""

    def build(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Reference:
        base = base_model(family, tokenizer)
        head = seeded(
            lambda: nn.Sequential(nn.Linear(SIZE, inner), nn.ReLU(), nn.Linear(inner, labels))
        )
        # The real ones bring their code, which nobody runs here.
        code = {"auto_map": {"AutoModel": f"modeling.{architecture}"}}
        save(folder, base, tokenizer, named(prefix, head), architecture, **code)
        return on_last_token(base, head if labels == 1 else good_of(head))

    return build


def good_of(head: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The probability of the second of two labels."""
    return lambda hidden: head(hidden).softmax(-1)[:, 1]


def uncertain(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Reference:
    """URM: means and spreads of attributes, weighted by a network of the hidden state."""
    base = base_model("llama", tokenizer)
    score = seeded(lambda: nn.Linear(SIZE, 2 * OBJECTIVES, bias=False))
    weights = seeded(
        lambda: nn.Sequential(
            nn.Linear(SIZE, SIZE), nn.SELU(), nn.Linear(SIZE, SIZE), nn.SELU(),
            nn.Linear(SIZE, OBJECTIVES),
        )
    )  # fmt: skip
    architecture = "LlamaForSequenceClassificationWithNormal_Weights"
    heads = named("score", score) | named("weights.fc", weights)
    code = {"auto_map": {"AutoModelForSequenceClassification": f"modeling.{architecture}"}}
    save(folder, base, tokenizer, heads, architecture, num_labels=2 * OBJECTIVES, **code)

    def reward(hidden: Tensor) -> Tensor:
        means = score(hidden).view(-1, OBJECTIVES, 2)[..., 0]
        return (means * weights(hidden)).sum()

    return on_last_token(base, reward)


class _Gate(nn.Module):
    """ArmoRM's (ReLU between linear layers) or QRM's (batch norms behind them)."""

    def __init__(self, *, norms: bool, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.logit_scale = nn.Parameter(torch.full((1,), 1.5))
        sizes = [SIZE, 16, 16, 16]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers.append(nn.Linear(before, after, bias=not norms))
            if norms:
                norm = nn.BatchNorm1d(after)
                nn.init.normal_(norm.running_mean)
                nn.init.uniform_(norm.running_var, 0.5, 2.0)
                layers += [nn.ReLU(), norm]
        layers.append(nn.Linear(sizes[-1], OBJECTIVES))
        self.layers = nn.ModuleList(layers)
        self.norms = norms

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x) if self.norms else torch.relu(layer(x))
        logits = self.layers[-1](x)
        return torch.softmax(logits / self.temperature, dim=1) * self.logit_scale[0]


BOUNDARIES = {
    "llama": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma2": "<end_of_turn>\n<start_of_turn>model\n",
}


def gated(family: str, architecture: str, *, quantiles: int = 1) -> Builder:
    """ArmoRM, or QRM with several quantiles."""

    def build(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Reference:
        base = base_model(family, tokenizer)
        regression = seeded(lambda: nn.Linear(SIZE, OBJECTIVES * quantiles, bias=False))
        gate = seeded(lambda: _Gate(norms=quantiles > 1, temperature=0.5))
        transform = torch.eye(OBJECTIVES)
        transform[0, 1:] = torch.tensor([-0.1, 0.2, -0.3, 0.4])
        heads = named("regression_layer", regression) | named("gating", gate)
        heads["reward_transform_matrix"] = transform
        fields = {
            "auto_map": {"AutoModelForSequenceClassification": f"modeling.{architecture}"},
            "gating_temperature": 0.5,
            "num_objectives": OBJECTIVES,
            "num_quantiles": quantiles,
        }
        save(folder, base, tokenizer, heads, architecture, **fields)
        pattern = tokenizer(BOUNDARIES[family], add_special_tokens=False)["input_ids"]

        @torch.no_grad()
        def reward(ids: list[int]) -> float:
            hidden = hidden_states(base, ids)
            starts = range(len(ids) - len(pattern), -1, -1)
            place = next(i for i in starts if ids[i : i + len(pattern)] == pattern)
            objectives = regression(hidden[-1:]).view(OBJECTIVES, quantiles).mean(1)
            return float(gate(hidden[place : place + 1])[0] @ (objectives @ transform))

        return reward

    return build


def token_classifier(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Reference:
    """A label of every token, transformers' own class; the reward is the last token's second."""
    config = tiny_config("qwen2", tokenizer, num_labels=2, id2label={0: "bad", 1: "good"})
    model = seeded(
        lambda: AutoModelForTokenClassification.from_config(config, attn_implementation="eager")
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def reward(ids: list[int]) -> float:
        return float(model(input_ids=torch.tensor([ids])).logits[0, -1, 1])

    return reward


def language_model(read: Callable[[Tensor], Tensor], family: str = "llama") -> Builder:
    """A language model; `read` takes the logits [vocab] of the token behind the text."""

    def build(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Reference:
        config = tiny_config(family, tokenizer, tie_word_embeddings=False)
        model = seeded(
            lambda: AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

        @torch.no_grad()
        def reward(ids: list[int]) -> float:
            return float(read(model(input_ids=torch.tensor([ids])).logits[0, -1]))

        return reward

    return build
