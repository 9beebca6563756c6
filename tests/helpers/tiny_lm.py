"""Language models small enough to enumerate, or just small, with the tokenizers they need."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

#: Tokens of the enumerable model; the last is end-of-sequence.
LETTERS = ("a", "b", "c", "$")


@cache
def letter_model(head_dim: int = 8) -> LlamaForCausalLM:
    """A causal LM over LETTERS whose next-token probabilities depend visibly on the context.

    vLLM's attention on a CPU takes heads of 32 and more.
    """
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(LETTERS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=len(LETTERS) - 1,
        initializer_range=0.35,
    )
    return LlamaForCausalLM(config).eval()


@cache
def coin_model(after_a: float, after_b: float) -> LlamaForCausalLM:
    """A causal LM over LETTERS that draws "a" or "b", by a chance that the last letter decides."""
    model = LlamaForCausalLM(letter_model().config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        for letter, chance in enumerate((after_a, after_b)):
            model.model.embed_tokens.weight[letter, letter] = 1.0
            logits = torch.tensor([math.log(chance), math.log1p(-chance), -100.0, -100.0])
            # The norm makes 4 of the 1 in a state of 16 numbers.
            model.lm_head.weight[:, letter] = logits / 4
    return model


def letter_tokenizer(letters: tuple[str, ...] = LETTERS) -> Any:
    """One token a letter, no spaces: text and ids are the same thing."""
    backend = Tokenizer(
        models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="a")
    )
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=letters[-1])


@cache
def small_model(vocab_size: int = 400, *, layers: int = 2) -> LlamaForCausalLM:
    """A causal LM for the tokenizer of `bpe_tokenizer(vocab_size)`, grouped-query attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()
