"""Segments that span rounds: the same tokens as in rounds that wait for their longest row."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from helpers.bpe_engine import bpe_engine
from helpers.outputs import all_same
from helpers.tiny_lm import small_model

from stars_fast import Engine, StarsParams
from stars_fast.drafting.pace import Pace
from stars_fast.drafting.segment_ends import CLAUSE, NONE
from stars_fast.outputs import RequestOutput

PROMPTS = ["The film was slow at first, but", "A terrible kettle", "Not bad at all. " * 4]
CLAUSES: dict[str, Any] = {
    "segment_length": 10, "segment_end": "clause", "min_segment_length": 2,
}  # fmt: skip
TESTED: dict[str, Any] = {"target_reward": 0.6, "beta": 0.3, "max_attempts": 4}
METHODS: dict[str, dict[str, Any]] = {
    "stars": {**TESTED, **CLAUSES, "trace": True, "calibrate_prefixes": False},
    "candidates": {**TESTED, **CLAUSES, "candidates": 3},
    "gibbs": {"acceptance": "gibbs", "candidates": 3, "beta": 0.3, **CLAUSES},
    "cards": {
        "method": "cards", "entropy_threshold": 5.0, "segment_length": 10, "min_segment_length": 2,
        **TESTED,
    },
    "best of n": {"method": "best_of_n", "candidates": 3},
    "rejection": {"method": "rejection", **TESTED},
    "smc": {"method": "smc", "candidates": 3, "beta": 0.3, **CLAUSES},
    "steps": {
        **TESTED, "candidates": 2, "segment_length": 10, "segment_end": "step", "step_text": "e",
        "min_segment_length": 2,
    },
    "penalties": {
        **TESTED, **CLAUSES, "candidates": 2, "repetition_penalty": 1.5, "presence_penalty": 2.0,
        "logit_bias": {8: 6.0, 40: 5.0, 60: 5.0}, "bad_words": ["e", "er"],
        "min_tokens": 9, "top_logprobs": 2,
    },
    "stop texts": {**TESTED, **CLAUSES, "candidates": 2, "stop": ["ee", "th"], "min_tokens": 6},
    "grammar": {
        **TESTED, **CLAUSES, "candidates": 2, "guided": {"regex": "[a-d]{9,14}(, [a-d]{5,9}){2}"},
    },
}  # fmt: skip


class AnyStep:
    """Ends rounds at any step, whoever has ended."""

    def __init__(self) -> None:
        self.patience = 0.0
        self._random = random.Random(3)

    def enough(self, _waste: float) -> bool:
        return self._random.random() < 0.4

    def observe(self, *_: object) -> float:
        return 0.0


@pytest.fixture(autouse=True)
def levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Borders that a random model meets often enough."""
    ids = torch.arange(small_model().config.vocab_size)
    made = torch.where(ids % 7 == 0, CLAUSE, NONE)
    monkeypatch.setattr("stars_fast.engine.engine.segment_end_levels", lambda *_: made)


def params_of(method: str) -> StarsParams:
    if method == "grammar":
        pytest.importorskip("llguidance")
    settings = {"max_tokens": 30, "temperature": 1.2, "top_k": 0, **METHODS[method]}
    return StarsParams(**settings)


def made(spans: bool, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Engine:
    if spans:
        monkeypatch.setattr("stars_fast.engine.engine.Pace", AnyStep)
    engine: Engine = bpe_engine(**options)
    if not spans:
        assert engine.loop.pace is not None
        engine.loop.pace.spans = False
    return engine


def run(engine: Engine, params: StarsParams) -> list[RequestOutput]:
    outputs = engine.generate(PROMPTS, seeded(params), use_tqdm=False)
    assert engine.stats()["pages_used"] == 0
    return outputs


def seeded(params: StarsParams) -> list[StarsParams]:
    return [dataclasses.replace(params, seed=50 + i) for i in range(len(PROMPTS))]


def without_top(outputs: list[RequestOutput]) -> list[RequestOutput]:
    """Their likely tokens left out, whose log-probabilities differ by rounding."""
    return [
        dataclasses.replace(
            output, outputs=[dataclasses.replace(o, top_logprobs=[]) for o in output.outputs]
        )
        for output in outputs
    ]


def top_tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [[*top] for output in outputs for o in output.outputs for top in o.top_logprobs]


@pytest.mark.parametrize("method", METHODS)
def test_same_results(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = params_of(method)
    whole = made(False, monkeypatch)
    expected = run(whole, params)
    assert whole.stats()["rows_carried"] == 0
    assert [output.error for output in expected] == [None] * len(PROMPTS)
    spanning = made(True, monkeypatch)
    found = run(spanning, params)
    assert all_same(without_top(found), without_top(expected))
    assert top_tokens(found) == top_tokens(expected)
    assert spanning.stats()["rows_carried"] > 10


@pytest.mark.parametrize("overlap", [False, True])
def test_with_preemption_aborts_and_rounds_that_are_undone(
    overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = params_of("candidates")
    expected = run(made(False, monkeypatch), params)
    spanning = made(True, monkeypatch, num_pages=28, page_size=4, overlap_scoring=overlap)
    draft = spanning.loop.drafter.draft
    calls: list[None] = []

    def failing(*args: Any) -> Any:
        calls.append(None)
        drafted = draft(*args)
        if len(calls) in (3, 9, 20):
            raise KeyboardInterrupt
        return drafted

    monkeypatch.setattr(spanning.loop.drafter, "draft", failing)
    prompts = [*zip(PROMPTS, seeded(params), strict=True)]
    for number in (0, 1, 2, 3, 4):
        spanning.add_request(f"r{number}", *prompts[number % 3])
    done = {}
    while spanning.has_unfinished():
        if len(calls) == 6:
            spanning.abort("r1")
        try:
            done.update({o.request_id: o for o in spanning.step() if o.finished})
        except KeyboardInterrupt:
            spanning.loop._scheduler.check()
    assert len(calls) > 20
    found = [done[name] for name in ("r0", "r4", "r2", "r3")]
    assert all_same(found, [expected[0], expected[1], expected[2], expected[0]])
    stats = spanning.stats()
    assert stats["preemptions"] > 0
    assert stats["rows_carried"] > 10
    assert stats["pages_used"] == 0


def test_rounds_last_until_waste_has_come_to_the_cost_of_one_more() -> None:
    pace, patience = Pace(), 0.0
    for _ in range(200):
        # 10 ms a step; beside it 30 ms a round and 1 ms for each token that is scored.
        for steps, tokens in ((4, 10), (8, 40), (6, 25)):
            patience = pace.observe(steps, steps * 0.01, tokens, 0.03 + tokens * 0.001)
    assert patience == pytest.approx(3, rel=0.2)
    pace.patience = patience
    assert not pace.enough(patience - 0.5)
    assert pace.enough(patience + 0.5)
    pace.spans = False
    assert not pace.enough(patience + 0.5)
