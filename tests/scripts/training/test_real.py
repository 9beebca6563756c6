"""The task on real models in small: its prompts, the judge, and a reward model the engine takes."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from real_pairs import SHARPNESS, Preference, Response, preferences, read, write
from real_prompts import (
    EVALUATION_THINGS,
    HELD_OUT_EVERY,
    REQUESTS,
    TRAINING_THINGS,
    evaluation_chats,
    evaluation_openings,
    tuning_chats,
)
from train_real_policy import PolicySettings, records, some
from train_real_policy import train as train_policy
from train_real_reward import RewardSettings, differences, load, rewards_at, train
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stars_fast import Engine, demo


@cache
def demo_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(demo.model_dir())


def response(prompt: int, text: str, gold: float) -> Response:
    tokenizer = demo_tokenizer()
    prompt_ids = list(tokenizer("Review of the film:")["input_ids"])
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return Response(prompt, prompt_ids, ids, text, gold)


KIND, UNKIND = " The plot is superb.", " It was dull, and the cast is horrible."


def test_nothing_is_trained_on_what_is_evaluated() -> None:
    assert not {*TRAINING_THINGS} & {*EVALUATION_THINGS}
    requests = [chat[0]["content"] for chat in evaluation_chats()]
    assert len({*requests}) == len(requests) == 128
    openings = evaluation_openings()
    for number, (opening, request) in enumerate(zip(openings, requests, strict=True)):
        thing = EVALUATION_THINGS[number // 2]
        assert thing in opening
        assert thing in request
        assert ("complaint" in opening) == ("complaint" in request)
    held_out = response(len(REQUESTS) * HELD_OUT_EVERY, KIND, 0.5)
    assert held_out.held_out
    assert not response(len(REQUESTS), KIND, 0.5).held_out
    assert len(tuning_chats()) == len(REQUESTS) * len(TRAINING_THINGS) // HELD_OUT_EVERY
    assert held_out.messages in tuning_chats()


def test_the_judge_is_noisy_by_the_difference() -> None:
    drawn = [response(i // 2, f"{i}", 0.1 * (i % 2)) for i in range(2_000)]
    chosen = [pair.chosen.gold > pair.rejected.gold for pair in preferences(drawn)]
    expected = 1.0 / (1.0 + math.exp(-SHARPNESS * 0.1))
    error = 4.0 * math.sqrt(expected * (1.0 - expected) / len(chosen))
    assert sum(chosen) / len(chosen) == pytest.approx(expected, abs=error)
    assert preferences([drawn[0], drawn[0]]) == []


def test_each_response_runs_once_and_is_read_where_it_is_cut() -> None:
    model = load(RewardSettings(model=str(demo.model_dir()), layers=3, trained_layers=1))
    torch.nn.init.normal_(model.classifier.score.weight)
    first, second = response(0, KIND, 0.5), response(0, UNKIND, -0.5)
    shares = (0.5, 1.0)
    pairs = [Preference(first, second), Preference(second, first)]
    found = differences(model, pairs, shares)
    singles = []
    for one in (first, second):
        ends = torch.tensor([[math.ceil(share * len(one.ids)) for share in shares]])
        singles.append(rewards_at(model, [one], ends)[0])
    assert torch.allclose(found[0], singles[0] - singles[1], atol=1e-5)
    assert torch.allclose(found[1], singles[1] - singles[0], atol=1e-5)
    row = first.prompt_ids + first.ids
    whole = model.classifier.model(input_ids=torch.tensor([row])).last_hidden_state
    assert torch.allclose(model.hidden([first]), whole, atol=1e-5)
    with pytest.raises(ValueError, match=r"trained_layers <= layers <= 4 must hold, got 4 and 3"):
        load(RewardSettings(model=str(demo.model_dir()), layers=3, trained_layers=4))


def test_training_learns_and_the_engine_takes_it(tmp_path: Path) -> None:
    drawn = [
        one
        for prompt in range(12)
        for one in (response(prompt, KIND, 0.9), response(prompt, UNKIND, -0.9))
    ]
    write(drawn, tmp_path / "samples.jsonl")
    assert read(tmp_path / "samples.jsonl") == drawn
    settings = RewardSettings(
        model=str(demo.model_dir()),
        samples=str(tmp_path / "samples.jsonl"),
        layers=2,
        trained_layers=1,
        epochs=4,
        rate=1e-2,
    )
    found = train(settings, tmp_path / "reward")
    assert found["pairs right at 100%"] > 0.9
    engine = Engine(demo.model_dir(), tmp_path / "reward", reward_template="{prompt}{response}")
    kind, unkind = engine.score(["Review of the film:"] * 2, [KIND, UNKIND])
    assert kind > unkind


def test_policies_learn_from_the_tokens_as_they_were_drawn() -> None:
    first, second = response(0, KIND, 0.5), response(0, UNKIND, -0.5)
    (line,) = records("dpo", [Preference(first, second)])
    assert (line["chosen_ids"], line["rejected_ids"]) == (first.ids, second.ids)
    (line,) = records("sft", [Preference(first, second)])
    assert line["input_ids"] == first.prompt_ids + first.ids
    assert sum(line["completion_mask"]) == len(first.ids)
    # Not the first ones, which are of a few chats.
    pairs = [Preference(response(n, KIND, 0.5), response(n, UNKIND, -0.5)) for n in range(64)]
    chosen = some(pairs, 8, 0)
    assert len({pair.chosen.prompt for pair in chosen}) == 8
    assert max(pair.chosen.prompt for pair in chosen) > 16
    assert len(some(pairs, 100, 0)) == 64
    with pytest.raises(ValueError, match="kind must be one of sft, dpo, got 'ppo'"):
        train_policy(PolicySettings(kind="ppo"), Path("nowhere"))
