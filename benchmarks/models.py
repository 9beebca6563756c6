"""Models and prompts that the benchmarks run on: real shapes, random weights, fixed seeds."""

from __future__ import annotations

from dataclasses import dataclass

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
#: About 1.2 billion parameters, the shape of Llama-3.2-1B.
ONE_BILLION = Shape(128_256, 2048, 8192, 16, 32, 8)
#: 6.7 billion parameters, the shape of Llama-2-7B: of the paper's language and reward models.
LLAMA_2_7B = Shape(32_000, 4096, 11_008, 32, 32, 32, tie_word_embeddings=False)
#: 8.0 billion parameters, the shape of Llama-3.1-8B.
LLAMA_3_1_8B = Shape(128_256, 4096, 14_336, 32, 32, 8, tie_word_embeddings=False)
#: For a run in seconds.
TINY = Shape(512, 64, 128, 2, 4, 2)


def language_model(shape: Shape) -> LlamaForCausalLM:
    """Return a causal LM with random weights, float32, in eval mode."""
    torch.manual_seed(0)
    return LlamaForCausalLM(shape.config()).eval()


def reward_model(shape: Shape) -> LlamaForSequenceClassification:
    """Return a one-label classifier of the same shape; its rewards spread by about one."""
    torch.manual_seed(1)
    config = shape.config()
    config.num_labels = 1
    model = LlamaForSequenceClassification(config).eval()
    with torch.no_grad():
        model.score.weight.normal_(std=shape.hidden_size**-0.5)
    return model


def id_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose words are the ids: random weights have no text."""
    words = {f"{i}": i for i in range(shape.vocab_size)}
    backend = Tokenizer(WordLevel(words, unk_token="0"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def prompts(shape: Shape, count: int, low: int = 16, high: int = 48) -> list[list[int]]:
    """Return prompts of `low` to `high` random token ids."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    return [torch.randint(1, shape.vocab_size, (n,), generator=generator).tolist() for n in lengths]
