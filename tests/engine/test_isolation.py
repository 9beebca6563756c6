"""A request that fails or is aborted leaves nothing behind, whatever its method."""

from __future__ import annotations

import dataclasses
import math
import threading
from typing import Any

import pytest
from helpers.letter_law import letter_engine
from helpers.outputs import all_same
from helpers.tiny_lm import small_model
from helpers.tiny_rewards import reward_model
from helpers.tiny_tokenizers import bpe_tokenizer

from stars_fast import Engine, RequestOutput, StarsParams

BASE = StarsParams(
    segment_length=2,
    max_tokens=8,
    max_attempts=3,
    target_reward=0.5,
    temperature=1.0,
    top_k=0,
    ignore_eos=True,
)
METHODS: dict[str, StarsParams] = {
    "stars": BASE,
    "gibbs": BASE.with_method("stars", acceptance="gibbs", candidates=4),
    "vanilla": BASE.with_method("vanilla"),
    "best_of_n": BASE.with_method("best_of_n", candidates=4),
    "rejection": BASE.with_method("rejection"),
    "cards": BASE.with_method("cards", entropy_threshold=1.2, min_segment_length=1),
    "cards, public": BASE.with_method("cards", entropy_threshold=1.2, rules="public"),
    "args": BASE.with_method("args", candidates=3),
    "speculative_rejection": BASE.with_method("speculative_rejection", candidates=4),
    "smc": BASE.with_method("smc", candidates=4, beta=0.2),
    "smc, n": BASE.with_method("smc", candidates=3, n=2),
    "mara": BASE.with_method("mara"),
}
SCORED = [name for name in METHODS if name != "vanilla"]


def count_a(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(response.count("a")) - 1.0 for response in responses]


def nothing_held(engine: Engine) -> bool:
    stats = engine.stats()
    running = stats["requests_running"] + stats["requests_waiting"]
    return stats["pages_used"] == stats.get("rm_pages_used", 0) == running == 0


class TestFailingRewards:
    def outputs(self, name: str, reward: Any, overlap: bool) -> list[RequestOutput]:
        """The request at hand between others, of its own kind and another."""
        one = letter_engine(reward, num_pages=200, page_size=4, overlap_scoring=overlap)
        each = [METHODS[name], METHODS[name], METHODS[name], METHODS["stars"], METHODS["smc"]]
        each = [dataclasses.replace(params, seed=seed) for seed, params in enumerate(each)]
        outputs = one.generate(["ab", "cc", "ba", "ac", "bb"], each, use_tqdm=False)
        assert nothing_held(one)
        return outputs

    def check(self, name: str, reward: Any, named: str, overlap: bool = False) -> None:
        good = self.outputs(name, count_a, overlap)
        assert [output.error for output in good] == [None] * 5
        bad = self.outputs(name, reward, overlap)
        error = bad.pop(1).error
        assert error is not None
        assert error.startswith("reward: ")
        assert named in error
        del good[1]
        assert [output.error for output in bad] == [None] * 4
        assert all_same(bad, good)

    @pytest.mark.parametrize("overlap", [False, True], ids=["one lane", "two lanes"])
    @pytest.mark.parametrize("name", SCORED)
    def test_not_finite_for_some_texts(self, name: str, overlap: bool) -> None:
        def reward(prompts: list[str], responses: list[str]) -> list[float]:
            rows = zip(prompts, responses, count_a(prompts, responses), strict=True)
            # Not for the first segment, and of paths not for all at once.
            return [
                math.nan if p == "cc" and (r[2:].endswith(("a", "b")) or len(r) > 4) else s
                for p, r, s in rows
            ]

        self.check(name, reward, "finite", overlap)

    @pytest.mark.parametrize("name", SCORED)
    def test_raises_for_some_texts(self, name: str) -> None:
        def reward(prompts: list[str], responses: list[str]) -> list[float]:
            if any(p == "cc" and len(r) > 2 for p, r in zip(prompts, responses, strict=True)):
                raise RuntimeError("no such judge")
            return count_a(prompts, responses)

        self.check(name, reward, "no such judge")


@pytest.mark.parametrize("overlap", [False, True], ids=["one lane", "two lanes"])
@pytest.mark.parametrize("name", ["stars", "best_of_n", "smc"])
def test_a_reward_that_hangs_fails_its_round_and_no_other(name: str, overlap: bool) -> None:
    released = threading.Event()

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        if "cc" in prompts and max(map(len, responses)) > 2:
            released.wait()
        return count_a(prompts, responses)

    params = dataclasses.replace(METHODS[name], seed=1)
    options: dict[str, Any] = {"num_pages": 200, "page_size": 4, "overlap_scoring": overlap}
    want = letter_engine(count_a, **options).generate("ab", params, use_tqdm=False)
    one = letter_engine(reward, reward_timeout=0.1, **options)
    try:
        (hung,) = one.generate("cc", params, use_tqdm=False)
        assert hung.error is not None
        assert "did not return within 0.1 s" in hung.error
        assert all_same(one.generate("ab", params, use_tqdm=False), want)
        assert nothing_held(one)
    finally:
        released.set()


def engine(**options: Any) -> Engine:
    """On a reward model that keeps pages of its own."""
    tokenizer = bpe_tokenizer()
    settings: dict[str, Any] = {"num_pages": 300, "page_size": 4, "max_rows": 32}
    return Engine(
        small_model(),
        reward_model("llama", tokenizer),
        tokenizer=tokenizer,
        reward_template="plain",
        reward_tokenizer=tokenizer,
        **(settings | options),
    )


OTHERS = [dataclasses.replace(METHODS[name], seed=3) for name in ("stars", "smc")]


@pytest.fixture(scope="module")
def alone() -> list[RequestOutput]:
    return [engine().generate("A kettle", params, use_tqdm=False)[0] for params in OTHERS]


class TestAborts:
    @pytest.mark.parametrize(
        ("name", "overlap"),
        [(name, True) for name in METHODS] + [("gibbs", False), ("smc, n", False)],
    )
    def test_midway(self, alone: list[RequestOutput], name: str, overlap: bool) -> None:
        one = engine(overlap_scoring=overlap)
        long = dataclasses.replace(METHODS[name], max_tokens=40, seed=1)
        for number, params in enumerate(OTHERS):
            one.add_request(f"other {number}", "A kettle", params)
        one.add_request("long", "The film was slow", long)
        finished = {}
        # A response that is one segment is never midway, and is aborted while it waits.
        for _ in range(0 if name == "rejection" else 3):
            for output in one.step():
                if output.finished:
                    finished[output.request_id] = output
        aborted = one.abort("long")
        assert aborted is not None
        assert aborted.finished
        assert aborted.error is None
        assert {o.finish_reason for o in aborted.outputs} == {"abort"}
        assert len(aborted.outputs) == long.n
        assert one.abort("long") is None
        while one.has_unfinished():
            for output in one.step():
                assert output.request_id != "long"
                if output.finished:
                    finished[output.request_id] = output
        assert nothing_held(one)
        for number, want in enumerate(alone):
            got = finished[f"other {number}"]
            assert [o.token_ids for o in got.outputs] == [o.token_ids for o in want.outputs]
        # The id is free again, and nothing of the first is left in the way.
        again = [dataclasses.replace(long, max_tokens=6)]
        assert one.generate("The film was slow", again, use_tqdm=False)[0].error is None
        assert nothing_held(one)

    @pytest.mark.parametrize("name", ["smc", "smc, n", "speculative_rejection"])
    def test_the_only_request(self, name: str) -> None:
        for steps in range(4):
            one = engine()
            one.add_request("a", "A kettle", dataclasses.replace(METHODS[name], max_tokens=40))
            for _ in range(steps):
                one.step()
            assert (one.stats()["pages_used"] > 0) == (steps > 0)
            one.abort("a")
            assert nothing_held(one)
            assert not one.has_unfinished()


@pytest.mark.parametrize("name", ["smc", "speculative_rejection"])
def test_more_paths_than_rows_are_refused(name: str) -> None:
    params = dataclasses.replace(METHODS[name], candidates=9, seed=1)
    one = letter_engine(count_a, max_rows=8)
    with pytest.raises(ValueError, match=f"candidates .* max_rows, 8, with .*'{name}', got 9"):
        one.add_request("a", "ab", params)
    refused, fine = one.generate(
        ["ab", "ab"], [params, dataclasses.replace(params, candidates=8)], use_tqdm=False
    )
    assert refused.error is not None
    assert fine.error is None
    assert nothing_held(one)


@pytest.mark.parametrize("name", SCORED)
def test_needs_a_reward_model(name: str) -> None:
    with pytest.raises(ValueError, match="needs a reward model"):
        letter_engine(None).add_request("a", "ab", METHODS[name])


@pytest.mark.parametrize("name", ["smc", "speculative_rejection"])
def test_a_prompt_without_room_is_refused(name: str) -> None:
    one = letter_engine(count_a, num_pages=6, page_size=4)
    with pytest.raises(ValueError, match=r"pages of 4 tokens; the pool has 5"):
        one.add_request("a", "ab" * 20, METHODS[name])
    assert nothing_held(one)
    assert not one.has_unfinished()
