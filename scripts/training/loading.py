"""Models of the demo's shape and their tokenizers, in float32."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)


def load_lm(directory: str | Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A language model and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert isinstance(model, LlamaForCausalLM)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return model, tokenizer


def load_classifier(
    directory: str | Path,
) -> tuple[LlamaForSequenceClassification, PreTrainedTokenizerFast]:
    """A one-label classifier and its tokenizer."""
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert isinstance(model, LlamaForSequenceClassification)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return model, tokenizer
