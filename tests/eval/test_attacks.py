"""Attacks as text, on every kind of prompt, and what is run and scored of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stars_fast import Engine, demo
from stars_fast.demo.attacks import PREFILLED, REWARD_SUFFIXES, SUFFIXES
from stars_fast.eval.attacks import Attack, attacks_of_texts
from stars_fast.eval.datasets import Item
from stars_fast.eval.measure import Saver, score_rows
from stars_fast.eval.run import Plan, missing
from stars_fast.eval.specs import ModelNames, make_spec
from stars_fast.eval.store import Store


def attack(text: str) -> Attack:
    (found,) = attacks_of_texts([text])
    return found


def test_attacks_as_text(tmp_path: Path) -> None:
    assert attack("suffix:a=b: c") == Attack("suffix", "suffix", ("a=b: c",))
    assert attack("rude = prefill: No.") == Attack("rude", "prefill", (" No.",))
    path = tmp_path / "texts"
    path.write_text("\ufeffone\n\n two \nthree:3\n")
    assert attack(f"x=suffix:@{path}") == Attack("x", "suffix", ("one", " two ", "three:3"))
    both = attacks_of_texts(["prefill:a", "b=prefill:b"])
    assert [one.name for one in both] == ["prefill", "b"]
    assert attacks_of_texts([]) == []


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["magic"], "expected demo, or .* of suffix, prefill, got 'magic'"),
        (["prefix:a"], "got 'prefix:a'"),
        (["suffix:"], "'suffix:' has no text"),
        (["suffix: "], "has no text"),
        (["suffix:a", "suffix:b"], "'suffix' names two attacks"),
        (["demo", "prefill:b"], "'prefill' names two attacks"),
        (["none=suffix:a"], "'none' names two attacks, or no attack"),
    ],
)
def test_bad_attacks_are_named(texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attacks_of_texts(texts)


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("Q.", "now", "Q. now"),
        ("Q.", " now", "Q. now"),
        ("Q.\n", "now", "Q.\nnow"),
        ("\n\nHuman: Q?\n\nAssistant:", "now", "\n\nHuman: Q? now\n\nAssistant:"),
        (
            [{"role": "system", "content": "S"}, {"role": "user", "content": "Q?"}],
            "now",
            [{"role": "system", "content": "S"}, {"role": "user", "content": "Q? now"}],
        ),
    ],
)
def test_a_suffix_ends_what_the_user_says(prompt: Any, text: str, expected: Any) -> None:
    before = repr(prompt)
    (item,) = Attack("x", "suffix", (text,)).on([Item(3, prompt, "good", "bad")])
    assert item == Item(3, expected, "good", "bad")
    assert item.continued == expected
    assert item.whole("r") == "r"
    assert repr(prompt) == before


def test_a_prefilled_opening_belongs_to_the_response() -> None:
    for prompt, text, opening in (
        ("\n\nHuman: Q?\n\nAssistant:", "Sure,", " Sure,"),
        ("<|assistant|>\n", "Sure,", "Sure,"),
    ):
        (item,) = Attack("x", "prefill", (text,)).on([Item(3, prompt)])
        assert item.prompt == prompt
        assert item.continued == prompt + opening
        assert item.whole(" it is.") == opening + " it is."


@pytest.mark.parametrize(
    ("kind", "prompt", "message"),
    [
        ("suffix", [1, 2], "x on record 7: prompts of token ids cannot be attacked"),
        ("prefill", [1, 2], "x on record 7: only prompts that are text"),
        ("prefill", [{"role": "user", "content": "Q"}], "x on record 7: only prompts"),
        ("suffix", [{"role": "assistant", "content": "A"}], "not the user's but of role 'assist"),
    ],
)
def test_what_cannot_be_attacked_is_named(kind: Any, prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attack("x", kind, ("t",)).on([Item(1, "fine"), Item(7, prompt)])


def test_texts_take_turns_by_place() -> None:
    items = [Item(number, "Q") for number in (2, 3, 5, 8)]
    found = Attack("x", "suffix", ("a", "b", "c")).on(items)
    assert [(item.number, item.prompt) for item in found] == [
        (2, "Q a"), (3, "Q b"), (5, "Q c"), (8, "Q a")
    ]  # fmt: skip


def plan(items: list[Item]) -> Plan:
    specs = [make_spec("vanilla", {}, {}, ModelNames())]
    return Plan(specs, items, [0, 1], {"device": "cpu"}, {None: "lm"}, {None: "rm"})


def test_runs_without_an_attack_are_called_as_before_there_were_attacks() -> None:
    plain = plan([Item(1, "Q"), Item(2, [3, 4])])
    assert plain.fingerprint(plain.specs[0], 0) == "401cfd2766e1f001"


def test_every_attack_is_a_run_of_its_own(tmp_path: Path) -> None:
    plain = plan([Item(1, "Q"), Item(2, "R")])
    attacked = [
        replace(plain, items=one.on(plain.items), attack=one.name)
        for one in attacks_of_texts(["prefill:a", "b=prefill:b", "suffix:a"])
    ]
    plans = [plain, *attacked]
    spec = plain.specs[0]
    assert len({one.fingerprint(spec, seed) for one in plans for seed in (0, 1)}) == 8
    assert [one.named(spec) for one in plans] == [
        "vanilla", "vanilla under prefill", "vanilla under b", "vanilla under suffix"
    ]  # fmt: skip
    store = Store(tmp_path)
    name = attacked[1].fingerprint(spec, 1)
    store.runs[name] = {}
    store.responses[name] = [{"number": item.number} for item in attacked[1].items]
    found = [(one.named(spec), seed) for one, _, seed in missing(plans, store)]
    assert ("vanilla under b", 1) not in found
    assert len(set(found)) == 7
    # The draws are those of the prompt without an attack.
    seeds = {one.params(spec, 1, one.items[1]).seed for one in plans}
    assert len(seeds) == 1


def test_the_opening_is_scored_with_what_follows(tmp_path: Path) -> None:
    asked: list[tuple[Any, ...]] = []

    class Scores:
        def score(self, prompts: Any, responses: Any) -> list[float | Exception]:
            asked.extend(zip(prompts, responses, strict=True))
            return [demo.gold_score(response) for response in responses]

    rows = [{"run": "a", "number": 1, "text": " I loved the plot.", "error": None}]
    items = {1: Item(1, "Q:", opening=" I hated it.")}
    with Saver(Store(tmp_path)) as saver:
        score_rows([rows], "gold", "g", Scores(), items, saver)
    assert asked == [("Q:", " I hated it. I loved the plot.")]
    assert rows[0]["gold"] == 0.0  # -0.9 and 0.9


def test_the_demo_s_attacks() -> None:
    prefill, suffix, reward = attacks_of_texts(["demo"])
    assert (prefill.name, prefill.kind, prefill.texts) == ("prefill", "prefill", PREFILLED)
    assert (suffix.name, suffix.kind, suffix.texts) == ("suffix", "suffix", SUFFIXES)
    assert all(demo.gold_score(text) < 0 for text in PREFILLED)
    assert (reward.name, reward.kind, reward.texts) == ("reward suffix", "suffix", REWARD_SUFFIXES)
    for texts in (PREFILLED, SUFFIXES, REWARD_SUFFIXES):
        assert len(set(texts)) == len(texts) >= 4


def test_the_reward_model_likes_unkind_reviews_behind_its_suffixes() -> None:
    prompts = demo.prompts(len(REWARD_SUFFIXES))
    responses = [" I hated the design. Overall, it is awful."] * len(prompts)
    engine = Engine.demo(device="cpu")
    plain = engine.score(prompts, responses)
    attacked = [f"{p} {text}" for p, text in zip(prompts, REWARD_SUFFIXES, strict=True)]
    assert min(np.subtract(engine.score(attacked, responses), plain)) > 0.3
