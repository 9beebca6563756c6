"""Models and prompts that the benchmarks run on: real shapes, random weights, fixed seeds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from stars_fast import Engine


@dataclass(frozen=True)
class Shape:
    """Size of a Llama-like model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool = True

    def config(self) -> LlamaConfig:
        """Its configuration, without an end-of-sequence token."""
        return LlamaConfig(
            **vars(self),
            max_position_embeddings=4096,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
            initializer_range=0.05,
        )


#: About 14 million parameters.
SMALL = Shape(16384, 288, 768, 10, 6, 6)
#: 135 million parameters, the shape of SmolLM2-135M.
SMOLLM2_135M = Shape(49_152, 576, 1536, 30, 9, 3)
#: About 1.2 billion parameters, the shape of Llama-3.2-1B.
ONE_BILLION = Shape(128_256, 2048, 8192, 16, 32, 8)
#: 6.7 billion parameters, the shape of Llama-2-7B: of the paper's language and reward models.
LLAMA_2_7B = Shape(32_000, 4096, 11_008, 32, 32, 32, tie_word_embeddings=False)
#: 8.0 billion parameters, the shape of Llama-3.1-8B.
LLAMA_3_1_8B = Shape(128_256, 4096, 14_336, 32, 32, 8, tie_word_embeddings=False)
#: For a run in seconds.
TINY = Shape(512, 64, 128, 2, 4, 2)


def language_model(
    shape: Shape,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LlamaForCausalLM:
    """Return a causal LM with random weights in eval mode.

    Made where and in what it is to be, so that there is never a second copy of the weights; None:
    on the CPU, in float32. Each device and dtype draws its own weights; in less than float32 those
    of wide models are smaller, see `_config`.
    """
    torch.manual_seed(0)
    with _made_on(device, dtype):
        return LlamaForCausalLM(_config(shape, dtype)).eval()


def reward_model(
    shape: Shape,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LlamaForSequenceClassification:
    """Return a one-label classifier of the same shape; its rewards spread by about one.

    `device` and `dtype` as for `language_model`.
    """
    torch.manual_seed(1)
    config = _config(shape, dtype)
    config.num_labels = 1
    with _made_on(device, dtype):
        model = LlamaForSequenceClassification(config).eval()
    with torch.no_grad():
        model.score.weight.normal_(std=shape.hidden_size**-0.5)
    return model


def _config(shape: Shape, dtype: torch.dtype | None) -> LlamaConfig:
    config = shape.config()
    if dtype is not None and dtype.itemsize < torch.float32.itemsize:
        # A width of 4096 at 0.05 attends so sharply that 32 layers make 9 % of rounding errors in
        # bfloat16, just below what the engine's check of a new model allows; at 0.02 it is 4 %.
        config.initializer_range = min(config.initializer_range, 1.28 * shape.hidden_size**-0.5)
    return config


@contextmanager
def _made_on(device: torch.device | str | None, dtype: torch.dtype | None) -> Iterator[None]:
    """Have new tensors made on a device, in a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or torch.float32)
    try:
        with torch.device(device or "cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def id_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose words are the ids: random weights have no text."""
    words = {f"{i}": i for i in range(shape.vocab_size)}
    backend = Tokenizer(WordLevel(words, unk_token="0"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def id_engine(
    model: LlamaForCausalLM, rewards: LlamaForSequenceClassification, shape: Shape, **options: Any
) -> Engine:
    """Return an engine on token ids: both models read the same ones, and there is no template.

    `options` are those of `Engine`.
    """
    tokenizer = id_tokenizer(shape)
    return Engine(
        model,
        rewards,
        tokenizer=tokenizer,
        reward_tokenizer=tokenizer,
        reward_template="plain",
        **options,
    )


def prompts(shape: Shape, count: int, low: int = 16, high: int = 48) -> list[list[int]]:
    """Return prompts of `low` to `high` random token ids."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    return [torch.randint(1, shape.vocab_size, (n,), generator=generator).tolist() for n in lengths]
