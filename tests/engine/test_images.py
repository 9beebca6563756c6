"""Prompts with images: tokens as `generate` gives them, pages that only equal pixels share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_vision import (
    MARKS,
    PICTURES,
    Given,
    chat,
    greedy,
    logits_of,
    other_weights,
    tiny_vision,
)

from stars_fast import Engine, StarsParams

UPRIGHT, WIDE, SQUARE = PICTURES
CHATS = [
    chat("w5 w6", UPRIGHT, "w7"),
    chat(UPRIGHT, "w1 w2 w3", WIDE, "w4"),  # shares pages with the last
    chat("w3 w4 w5"),
    chat(SQUARE, SQUARE.copy(), "w7"),
    chat(UPRIGHT, "w1 w2 w3 w6"),
]
GREEDY = StarsParams(method="vanilla", temperature=0, max_tokens=6, ignore_eos=True)


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


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl", "gemma3"])
def test_a_guide_sees_the_images(kind: str) -> None:
    model, processor = tiny_vision(kind)
    guide = other_weights(model)
    options = {"processor": processor, "page_size": 4, "num_pages": 200, "max_prefill_tokens": 7}
    engine = Engine(model, guide=guide, **options)
    # In what follows, a place of an image would be one without an image.
    bias = {model.config.image_token_id: -100.0}
    params = StarsParams(
        method="vanilla", guide_weight=1.5, max_tokens=6, top_k=0, top_p=1.0, logit_bias=bias
    )
    for messages, output in zip(CHATS, engine.generate(CHATS, params), strict=True):
        one = output.outputs[0]
        lm, led = (
            logits_of(each, processor, messages, one.token_ids).log_softmax(-1)
            for each in (model, guide)
        )
        guided = (lm + 1.5 * (led - lm)).log_softmax(-1)
        want = guided.gather(1, torch.tensor(one.token_ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(one.logprobs), want, atol=1e-4)


def test_a_guide_of_another_type_sees_none() -> None:
    model, processor = tiny_vision("llava")
    guide, _ = tiny_vision("llava_next")
    engine = Engine(model, processor=processor, guide=guide, page_size=4, num_pages=200)
    with pytest.raises(ValueError, match="guide_weight must be 0 for a prompt with images"):
        engine.add_request("seen", CHATS[0], replace(GREEDY, guide_weight=1.0))
    want = Engine(model, processor=processor, page_size=4, num_pages=200)
    outputs = [one.generate(CHATS[0], GREEDY, use_tqdm=False) for one in (want, engine)]
    assert outputs[0] == outputs[1]


def test_only_equal_pixels_share_pages() -> None:
    model, processor = tiny_vision("llava")
    engine = Engine(model, processor=processor, page_size=4, num_pages=200, max_rows=4)
    first = chat(UPRIGHT, "w1 w2 w3")

    def run(messages: list[dict[str, Any]]) -> tuple[list[float], int]:
        before = engine.stats()["cached_prompt_tokens"]
        (output,) = engine.generate(messages, GREEDY, use_tqdm=False)
        return output.outputs[0].logprobs, int(engine.stats()["cached_prompt_tokens"] - before)

    fresh, cached = run(first)
    assert cached == 0
    assert run(chat(UPRIGHT.copy(), "w1 w2 w3")) == (fresh, 20)
    other, cached = run(chat(UPRIGHT.rotate(180), "w1 w2 w3"))
    assert cached == 0
    assert other != fresh
    assert engine.loop.images.encoded == 2


def test_a_reward_function_sees_the_images() -> None:
    model, processor = tiny_vision("llava")
    sizes: list[list[tuple[int, int]]] = []

    def reward(prompts: list[str], responses: list[str], images: Any) -> list[float]:
        sizes.extend([picture.size for picture in one] for one in images)
        return [float(len(one)) for one in images]

    engine = Engine(model, reward, processor=processor, page_size=4, num_pages=200)
    params = StarsParams(method="best_of_n", candidates=2, max_tokens=4)
    outputs = engine.generate(CHATS[1:4], params, use_tqdm=False)
    assert [output.outputs[0].reward for output in outputs] == [2.0, 0.0, 2.0]
    assert [UPRIGHT.size, WIDE.size] in sizes
    assert [] in sizes


def test_a_bad_image_is_refused_and_harms_no_other() -> None:
    model, processor = tiny_vision("llava")
    engine = Engine(model, processor=processor, page_size=4, num_pages=200)
    engine.add_request("good", chat(UPRIGHT, "w1"), GREEDY)
    for bad, reason in ((None, "must be given"), (3, "image 0 must be a path"), ("", "cannot be")):
        with pytest.raises(ValueError, match=reason):
            engine.add_request("bad", chat(Given(bad), "w1"), GREEDY)
    last = chat("w1", UPRIGHT)
    processor.tokenizer.chat_template = processor.tokenizer.chat_template.removesuffix(" w9 w8")
    with pytest.raises(ValueError, match="must not end with a picture"):
        engine.add_request("last", last, GREEDY)
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    assert len(outputs[-1].outputs[0].token_ids) == GREEDY.max_tokens


def test_a_model_of_text_refuses_images() -> None:
    engine = Engine.demo(num_pages=64)
    with pytest.raises(ValueError, match="content.0. has type 'image'; the models here read text"):
        engine.read(chat(UPRIGHT))


def test_what_a_user_writes_places_no_image() -> None:
    model, processor = tiny_vision("llava")
    engine = Engine(model, processor=processor, page_size=4, num_pages=200)
    read = engine.read(chat("w1 <image> w2", UPRIGHT))
    assert read.token_ids.count(model.config.image_token_id) == 16
    with pytest.raises(ValueError, match="writes 1 places for 0 pictures"):
        Engine(model, processor=processor, page_size=4, num_pages=200, parse_special=True).read(
            chat("w1 <image> w2")
        )


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma3"])
def test_a_directory_brings_its_processor(kind: str, tmp_path: Path) -> None:
    model, processor = tiny_vision(kind)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    options = {"page_size": 4, "num_pages": 200}
    outputs = [
        engine.generate(CHATS[:3], GREEDY, use_tqdm=False)
        for engine in (
            Engine(str(tmp_path), **options),
            Engine(model, processor=processor, **options),
        )
    ]
    assert outputs[0] == outputs[1]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", MARKS)
def test_greedy_equals_generate_on_a_gpu(kind: str) -> None:
    model, processor = tiny_vision(kind)
    references = [greedy(model, processor, messages, 6) for messages in CHATS]
    engine = Engine(model.cuda(), processor=processor, page_size=16, num_pages=200, max_rows=4)
    outputs = engine.generate(CHATS, GREEDY, use_tqdm=False)
    for (_, tokens, _), output in zip(references, outputs, strict=True):
        assert output.outputs[0].token_ids == tokens
