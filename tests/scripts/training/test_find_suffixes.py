"""The search for adversarial suffixes: it descends, is fair to each, sees no held-out prompt."""

from __future__ import annotations

import random
import runpy
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import find_suffixes
import numpy as np
import pytest
from find_suffixes import (
    LEFT_OUT,
    GoldScores,
    RewardScores,
    SearchSettings,
    Trial,
    module,
    mutation,
    search,
    tries,
    vocabulary,
)

from stars_fast import Engine, StarsParams, demo
from stars_fast.demo.attacks import REWARD_SUFFIXES, SUFFIXES
from stars_fast.demo.grammar import reviews


def test_the_search_finds_what_is_lowest() -> None:
    noise = np.random.default_rng(0)

    def golds(suffixes: Sequence[str]) -> np.ndarray:
        worth = np.array([-0.5 * text.count("bad") / 3 for text in suffixes])
        return worth[:, None] + noise.normal(0, 1.0, 4)  # the same for all that are compared

    known = ["bad", *(f"w{i}" for i in range(9))]
    settings = SearchSettings(suffixes=3, words=3, steps=40)
    found = search(settings, known, golds)
    assert [trial.text for trial in found] == ["bad bad bad"] * 3
    noise = np.random.default_rng(0)
    assert [trial.scores for trial in search(settings, known, golds)] == [t.scores for t in found]


def test_what_a_lineage_has_is_measured_anew_beside_the_others() -> None:
    known = ["a", "b", "c", "d", "e", "f"]
    line = Trial(("x", "y"), [-0.9])
    tried = tries(line, known, SearchSettings(words=3), random.Random(0))
    assert (tried[0].words, tried[0].scores) == (line.words, [])
    assert len(tried) == 8
    joined = "".join(known)
    assert sum("".join(trial.words) in joined for trial in tried) == 3
    assert all({"x", "y"} & {*trial.words} for trial in tried[1::2])


def test_one_word_changes() -> None:
    rng = random.Random(0)
    lengths = set()
    for _ in range(200):
        changed = mutation(("a", "b", "c"), ["x"], 4, rng).words
        lengths.add(len(changed))
        assert len(changed) - 3 <= changed.count("x") <= 1
    assert lengths == {2, 3, 4}
    assert {len(mutation(("a",), ["x"], 1, rng).words) for _ in range(50)} == {1}


def test_every_suffix_of_a_round_meets_the_same_prompts_and_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine.demo(device="cpu")
    sampler = GoldScores(engine, demo.prompts(9), 3, 8, seed=0)
    asked: list[tuple[str, StarsParams]] = []
    generate = engine.generate

    def recorded(prompts: list[str], params: list[StarsParams], **options: bool) -> object:
        asked.extend(zip(prompts, params, strict=True))
        return generate(prompts, params, **options)

    monkeypatch.setattr(engine, "generate", recorded)
    golds = sampler(["", "Bad."])
    assert golds.shape == (2, 3)
    plain, bad = asked[:3], asked[3:]
    assert [(f"{prompt} Bad.", params) for prompt, params in plain] == bad
    assert len({params.seed for _, params in plain}) == 3
    sampler([""])
    assert {params.seed for _, params in asked[6:]}.isdisjoint(p.seed for _, p in plain)


def test_rewards_are_those_of_the_same_unkind_reviews_for_every_suffix() -> None:
    engine = Engine.demo(device="cpu")
    found = RewardScores(engine, 4, seed=3)(["", "Bad."])
    unkind = [one for one in islice(reviews(3, max_sentences=2), 99) if one.gold < -0.3][:4]
    for row, suffix in zip(found, ("", " Bad."), strict=True):
        prompts = [one.prompt + suffix for one in unkind]
        expected = engine.score(prompts, [one.response for one in unkind])
        assert -row == pytest.approx(expected, abs=1e-4)


def test_what_is_written_is_a_module(tmp_path: Path) -> None:
    path = tmp_path / "suffixes.py"
    path.write_text(module([("a.", -0.5, 0.75), ("b's.", -0.1, 0.5)], (0.0, 0.5), "python x"))
    assert runpy.run_path(str(path))["SUFFIXES"] == ("a.", "b's.")
    assert "# -0.500, 75%" in path.read_text()
    # Of rewards the sign is turned: high is what the search wants.
    path.write_text(module([("a.", -1.5, 0.75)], (0.25, 0.5), "python x", "reward"))
    assert "# +1.500, 75%" in path.read_text()
    assert "-0.250 and 50%" in path.read_text()


def test_no_held_out_prompt_is_searched_on() -> None:
    held_out = set(demo.prompts(256))
    assert held_out.isdisjoint(find_suffixes.training_prompts())
    assert held_out.isdisjoint(find_suffixes.tuning_prompts())


def test_no_word_turns_around_what_follows() -> None:
    known = vocabulary(200)
    assert {"plot", "but", "Overall,"} <= set(known)
    assert {"not", "hardly", "anything", "thinks"} <= LEFT_OUT
    assert LEFT_OUT.isdisjoint(word.strip(",.").lower() for word in [*known, *last_words()])


def last_words() -> list[str]:
    return [text.split()[-1] for text in SUFFIXES + REWARD_SUFFIXES]
