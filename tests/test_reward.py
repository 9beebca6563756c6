"""`Reward`: its text, and what it refuses."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from stars_fast import Reward, RewardHead


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("help=some/dir", Reward("help", "some/dir")),
        (
            "harm=some/dir,weight=-0.5,at_most=0,label=toxic",
            Reward("harm", "some/dir", weight=-0.5, at_most=0.0, label="toxic"),
        ),
        (
            'v-2.b=7, tokens=["Yes", "No"],template={prompt}, {response},device=cuda:1',
            Reward(
                "v-2.b", "7", tokens=("Yes", "No"), template="{prompt}, {response}", device="cuda:1"
            ),
        ),
    ],
)
def test_text(text: str, reward: Reward) -> None:
    assert Reward.of(text) == reward
    assert pickle.loads(pickle.dumps(reward)) == reward


def test_every_field_of_a_head_is_a_parameter() -> None:
    head = Reward("a", "dir", label=1, activation="log_odds").head
    assert head == RewardHead(label=1, activation="log_odds")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Reward("a b", "dir"), "name of a Reward must be of letters.* got 'a b'"),
        (lambda: Reward("a", None), "model of reward 'a' must be given"),
        (lambda: Reward("a", "dir", weight="1"), "weight of reward 'a' must be a number, got '1'"),
        (lambda: Reward("a", "dir", at_most=float("nan")), "at_most .* must be finite, got nan"),
        (lambda: Reward("a", "dir", at_least=1, at_most=0), "at_least .* at most its at_most, 0"),
        (lambda: Reward("a", "dir", lable=0), "reward 'a' has no parameter 'lable'; .* label"),
        (lambda: Reward("a", "dir", label=0, token=1), "^reward 'a': reward_head takes one of"),
        (lambda: Reward.of("dir"), "must be NAME=DIR_OR_HUB_ID,..., got 'dir'"),
        (lambda: Reward.of("a=dir,weight=1,weight=2"), "reward 'a': weight is given twice"),
        (lambda: Reward.of("a=dir,tokenizer=x"), "reward 'a': tokenizer cannot be given here"),
    ],
)
def test_refusals(call: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()
