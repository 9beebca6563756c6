"""The model that reads: batches of texts behind examples that were run once."""

from __future__ import annotations

from pathlib import Path

import pytest
import real_golds
import torch
from helpers.tiny_architectures import tiny_lm
from helpers.tiny_tokenizers import bpe_tokenizer

TEXTS = [
    " ".join(["It was slow.\n", "I liked it!"][i % 2] for _ in range(i % 5)) for i in range(19)
]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_scores_are_those_of_texts_alone(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = bpe_tokenizer()
    model = tiny_lm(architecture, vocab_size=len(tokenizer), max_position_embeddings=512)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path)
    monkeypatch.setenv("REAL_GOLD_READER", str(tmp_path))
    got = real_golds.reader([""] * len(TEXTS), TEXTS)
    good, bad = (
        tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" good", " bad")
    )
    for text, score in zip(TEXTS, got, strict=True):
        ids = tokenizer(real_golds.EXAMPLES)["input_ids"]
        ids += tokenizer(f"Text: {' '.join(text.split())}\nOpinion:", add_special_tokens=False)[
            "input_ids"
        ]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        assert score == pytest.approx(float(logits[good] - logits[bad]), abs=1e-4)
    assert len({round(score, 3) for score in got}) > 5
