"""The shipped demo models: small, safe to load, and good enough to show alignment on."""

from __future__ import annotations

import itertools
import json
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from stars_fast.demo import gold_score, model_dir, prompts, reward_model_dir
from stars_fast.demo.grammar import reviews
from stars_fast.demo.lexicon import ENTRIES

if TYPE_CHECKING:
    from numpy.typing import NDArray

HELD_OUT_SEED = 1234


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(model_dir())
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.fixture(scope="module")
def lm() -> LlamaForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(model_dir())
    assert isinstance(model, LlamaForCausalLM)
    return model


@pytest.fixture(scope="module")
def rm() -> LlamaForSequenceClassification:
    model = AutoModelForSequenceClassification.from_pretrained(reward_model_dir())
    assert isinstance(model, LlamaForSequenceClassification)
    return model


def test_files_are_small_and_safe() -> None:
    files = [path for d in (model_dir(), reward_model_dir()) for path in d.iterdir()]
    assert sum(path.stat().st_size for path in files) <= 8e6
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for directory in (model_dir(), reward_model_dir()):
        names = {path.name for path in directory.iterdir()}
        assert names >= {"config.json", "model.safetensors", "tokenizer.json"}
        assert all(path.stat().st_mode & 0o444 == 0o444 for path in directory.iterdir())
        assert json.loads((directory / "config.json").read_text())["dtype"] == "float32"


def test_models_load_in_float32(lm: LlamaForCausalLM, rm: LlamaForSequenceClassification) -> None:
    assert {p.dtype for model in (lm, rm) for p in model.parameters()} == {torch.float32}
    assert rm.config.num_labels == 1
    assert rm.config.pad_token_id is not None


def test_both_models_use_one_tokenizer(
    tokenizer: PreTrainedTokenizerFast, lm: LlamaForCausalLM, rm: LlamaForSequenceClassification
) -> None:
    other = AutoTokenizer.from_pretrained(reward_model_dir())
    assert other.get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) == lm.config.vocab_size == rm.config.vocab_size
    for config in (lm.config, rm.config, lm.generation_config):
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("text", ["  two  spaces\n", "naïve 日本 🙂", " The plot is not bad.", ""])
def test_tokenizer_keeps_any_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_response_tokens_follow_prompt_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    for review in itertools.islice(reviews(HELD_OUT_SEED, held_out=True), 50):
        parts = [
            tokenizer(review.prompt)["input_ids"],
            tokenizer(review.response, add_special_tokens=False)["input_ids"],
        ]
        assert tokenizer(review.text)["input_ids"] == parts[0] + parts[1]


@torch.no_grad()
def rewards(
    rm: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> NDArray[np.float64]:
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    logits = rm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return np.asarray(logits[:, 0].double().numpy())


def test_reward_follows_gold_but_is_not_gold(
    rm: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    sample = list(itertools.islice(reviews(HELD_OUT_SEED, held_out=True), 256))
    scores = rewards(rm, tokenizer, [review.text for review in sample])
    correlation = np.corrcoef(scores, [review.gold for review in sample])[0, 1]
    assert 0.9 < correlation < 0.995
    assert 0.8 < scores.std() < 3.0  # beta of about 0.7 means something on this scale


def test_reward_is_useful_in_the_middle_of_a_review(
    rm: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    sample = itertools.islice(reviews(HELD_OUT_SEED + 1, held_out=True), 400)
    texts = []
    for review in sample:
        words = review.response.split()
        if len(words) > 30:
            texts.append(f"{review.prompt} {' '.join(words[:30])}")
    gold = [gold_score(text) for text in texts]
    assert np.corrcoef(rewards(rm, tokenizer, texts), gold)[0, 1] > 0.8


def test_language_model_writes_reviews(
    lm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(0)
    batch = tokenizer(prompts(32), return_tensors="pt", padding=True, padding_side="left")
    output = lm.generate(  # type: ignore[misc]
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=True,
        temperature=1.0,
        top_k=40,
        max_new_tokens=128,
    )
    new = output[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    ended = (new == tokenizer.eos_token_id).any(dim=1).float().mean().item()
    assert ended > 0.7
    assert 30 < np.median([len(tokenizer(text)["input_ids"]) for text in texts]) < 128
    scores = np.array([gold_score(text) for text in texts])
    assert abs(scores.mean()) < 0.2
    assert scores.std() > 0.2
    sentences = [s for text in texts for s in re.findall(r"[^ ][^.]*\.", text)]
    understood = [any(entry in s.lower() for entry in ENTRIES) for s in sentences]
    assert np.mean(understood) > 0.8
