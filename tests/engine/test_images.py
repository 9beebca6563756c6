"""Prompts with images: tokens as `generate` gives them, pages that only equal pixels share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.tiny_vision import MARKS, PICTURES, chat, greedy, tiny_vision

from stars_fast import Engine, StarsParams

UPRIGHT, WIDE, SQUARE = PICTURES
CHATS = [
    chat("w5 w6", UPRIGHT, "w7"),
    chat(UPRIGHT, "w1 w2 w3", WIDE, "w4"),  # shares pages with the last
    chat("w3 w4 w5"),
    chat(SQUARE, SQUARE.copy(), "w7"),
    chat(UPRIGHT, "w1 w2 w3 w6"),
]
GREEDY = StarsParams(method="vanilla", temperature=0, max_tokens=6)


@pytest.fixture(autouse=True)
def _no_words_for_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "transformers.models.smolvlm.processing_smolvlm.num2words"
    monkeypatch.setattr(name, object())  # a package that SmolVLM's processor needs for videos only


@pytest.mark.parametrize("kind", MARKS)
def test_greedy_equals_generate(kind: str) -> None:
    model, processor = tiny_vision(kind)
    engine = Engine(model, processor=processor, page_size=4, num_pages=200, max_rows=4)
    outputs = engine.generate(CHATS, GREEDY, use_tqdm=False)
    for messages, output in zip(CHATS, outputs, strict=True):
        prompt, tokens, logprobs = greedy(model, processor, messages, GREEDY.max_tokens)
        assert output.prompt_token_ids == prompt
        assert output.outputs[0].token_ids == tokens
        got = torch.tensor(output.outputs[0].logprobs)
        assert torch.allclose(got, logprobs, atol=1e-4), (got - logprobs).abs().max()


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_vl"])
def test_prefill_in_pieces_and_without_sharing(kind: str) -> None:
    """Pieces end within images; a prompt that gave way is prefilled behind its response."""
    model, processor = tiny_vision(kind)
    options = {"processor": processor, "page_size": 4, "num_pages": 200, "max_rows": 4}
    params = replace(GREEDY, max_tokens=16, segment_length=2)
    want = Engine(model, **options).generate(CHATS, params, use_tqdm=False)
    options |= {"max_prefill_tokens": 5, "prefix_caching": False, "num_pages": 20}
    engine = Engine(model, **options)
    got = engine.generate(CHATS, params, use_tqdm=False)
    assert engine.stats()["preemptions"] > 0
    for one, other in zip(want, got, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        logprobs = (torch.tensor(x.outputs[0].logprobs) for x in (one, other))
        assert torch.allclose(*logprobs, atol=1e-4)
