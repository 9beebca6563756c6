"""A classifier on a backbone that sees images scores them, on pages, as its own forward does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.tiny_vision import PICTURES, chat, logits_of, other_weights, tiny_vision
from transformers import Gemma3ForSequenceClassification

from stars_fast import Engine, LogRatio, StarsParams
from stars_fast.outputs import RequestOutput

UPRIGHT, WIDE, SQUARE = PICTURES
CHATS = [
    chat("w5 w6", UPRIGHT, "w7"),
    chat(UPRIGHT, "w1 w2 w3", WIDE, "w4"),
    chat("w5 w6", SQUARE, "w7"),
    chat("w3 w4 w5"),
]


def classifier(model: Any) -> Any:
    config = copy.deepcopy(model.config)
    config.num_labels = config.text_config.num_labels = 1
    torch.manual_seed(1)
    made = Gemma3ForSequenceClassification(config).eval()
    made.model.load_state_dict(model.model.state_dict())
    with torch.no_grad():
        made.model.language_model.embed_tokens.weight.mul_(-1)
    return made


def plain_reward(judge: Any, processor: Any, messages: Any, output: RequestOutput) -> float:
    pictures = [part["image"] for part in messages[0]["content"] if part["type"] == "image"]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False)
    given = processor(images=[pictures] if pictures else None, text=[text], return_tensors="pt")
    response = torch.tensor([output.outputs[0].token_ids])
    ids = torch.cat((given["input_ids"], response), dim=1)
    kinds = torch.cat((given["token_type_ids"], torch.zeros_like(response)), dim=1)
    more = {"pixel_values": given["pixel_values"]} if pictures else {}
    with torch.inference_mode():
        logits = judge(input_ids=ids, token_type_ids=kinds, **more).logits
    return float(logits[0, 0])


def test_rewards_are_those_of_its_own_forward() -> None:
    model, processor = tiny_vision("gemma3")
    judge = classifier(model)
    engine = Engine(
        model,
        judge,
        processor=processor,
        reward_tokenizer=processor.tokenizer,
        reward_template="plain",
        page_size=4,
        num_pages=200,
        reward_num_pages=20,  # so few that prompts are run again
        max_rows=4,
    )
    params = StarsParams(
        target_reward=3.0,
        segment_length=3,
        max_tokens=6,
        max_attempts=2,
        ignore_eos=True,
        seed=3,
        logit_bias={model.config.image_token_id: -100.0},  # the plain forward counts these
    )
    outputs = engine.generate(CHATS, params, use_tqdm=False)
    rewards = [output.outputs[0].reward for output in outputs]
    assert rewards[0] != rewards[2]
    assert engine.stats()["rm_evictions"] > 0
    for messages, output, reward in zip(CHATS, outputs, rewards, strict=True):
        assert output.error is None
        assert reward == pytest.approx(plain_reward(judge, processor, messages, output), abs=1e-4)


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_both_models_of_a_log_ratio_see_the_images(kind: str) -> None:
    model, processor = tiny_vision(kind)
    policy = other_weights(model)
    ratio = LogRatio(policy, None, beta=0.5)
    options = {"processor": processor, "reward_tokenizer": processor.tokenizer, "page_size": 4}
    engine = Engine(model, ratio, num_pages=200, reward_num_pages=200, **options)
    bias = {model.config.image_token_id: -100.0}
    params = StarsParams(
        target_reward=2.0, segment_length=3, max_tokens=6, max_attempts=2, seed=3, logit_bias=bias
    )
    for messages, output in zip(CHATS, engine.generate(CHATS, params, use_tqdm=False), strict=True):
        one = output.outputs[0]
        tokens = torch.tensor(one.token_ids)[:, None]
        first, second = (
            logits_of(each, processor, messages, one.token_ids).log_softmax(-1).gather(1, tokens)
            for each in (policy, model)
        )
        assert one.reward == pytest.approx(0.5 * float((first - second).sum()), abs=1e-4)
