"""What can be asked of a reward model's head, from Python and as text."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from stars_fast import RewardHead
from stars_fast.config import EngineConfig


@pytest.mark.parametrize(
    ("text", "head"),
    [
        ("label=safe", RewardHead(label="safe")),
        ("label=1,activation=log_odds", RewardHead(label=1, activation="log_odds")),
        (
            'label_weights={"help": 1, "harm": -0.5}',
            RewardHead(label_weights={"help": 1.0, "harm": -0.5}),
        ),
        ("token=0", RewardHead(token=0)),
        ('token="0"', RewardHead(token="0")),
        ('tokens=["Yes", "No"]', RewardHead(tokens=("Yes", "No"))),
    ],
)
def test_text(text: str, head: RewardHead) -> None:
    assert RewardHead.of(text) == head
    assert pickle.loads(pickle.dumps(head)) == head


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("safe", "expected name=value, got 'safe'"),
        ("", "must be name=value"),
        ("lable=safe", "names among label, label_weights, token, tokens, activation"),
        ("label=a,token=b", r"takes one of .* got \['label', 'token'\]"),
        ("label=a,activation=softmax", "must be one of none, log_odds, probability, got 'softmax'"),
        ("activation=log_odds", "needs label or token"),
        ('tokens=["a", "b"],activation=log_odds', "needs label or token"),
        ('tokens=["a"]', "must be two"),
        ("tokens=a", "must be two, got 'a'"),
        ("label=-1", "at least 0, got -1"),
        ("label=1.5", "must be int or str, got 1.5"),
        ("label=true", "must be int or str, got True"),
        ("label_weights={}", "must be a mapping"),
        ('label_weights={"a": "b"}', "must be numbers, got 'b'"),
        ('label_weights={"a": NaN}', "must be finite, got nan"),
        (5, "must be None, a RewardHead or text, got int"),
    ],
)
def test_what_is_wrong(value: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        RewardHead.of(value)
    with pytest.raises((ValueError, TypeError), match=message):
        EngineConfig(reward_head=value)


def test_weights_are_a_copy() -> None:
    weights: dict[int | str, float] = {"a": 1}
    head = RewardHead(label_weights=weights)
    weights["a"] = 2
    assert head.label_weights == {"a": 1.0}
