"""Speculative rejection: the engine against the loop written out over plain samples."""

from __future__ import annotations

import dataclasses
import itertools
from functools import cache
from typing import Any

import pytest
from helpers.bpe_engine import bpe_engine, responses_of, text_reward
from helpers.letter_law import Law, model_law, p_value, segments, text
from helpers.ragged_law import EVEN, RAGGED, SETTINGS, count, ragged_engine
from helpers.tiny_tokenizers import bpe_tokenizer

from stars_fast import CompletionOutput, StarsParams
from stars_fast.seeds import derive_seed

PROMPT = "The film was slow at first, but"
SEEDS = range(50, 56)
PARAMS = StarsParams(
    method="speculative_rejection",
    segment_length=5,
    max_tokens=28,
    temperature=1.0,
    top_k=30,
    stop_token_ids=[i for i in range(20, 400) if i % 29 == 0],  # so that paths differ in length
)


def run(params: StarsParams, **options: Any) -> list[CompletionOutput]:
    return responses_of(bpe_engine(**options), [PROMPT] * len(SEEDS), params, SEEDS)


@cache
def whole_paths(seed: int, count: int) -> list[list[int]]:
    """What the paths would be if none of them ended: plain samples."""
    each = [PARAMS.with_method("vanilla", seed=derive_seed(seed, 1 + i)) for i in range(count)]
    outputs = bpe_engine().generate([PROMPT] * count, each, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def reward_at(path: list[int], tokens: int) -> float:
    kept = path[:tokens]
    if tokens >= len(path) and kept[-1] in (PARAMS.stop_token_ids or ()):
        kept = kept[:-1]  # the stop token is no part of the text
    text = bpe_tokenizer().decode(kept, skip_special_tokens=True)
    return text_reward([PROMPT], [text])[0]


def written_out(seed: int, count: int, rate: float) -> tuple[list[int], int]:
    """The chosen path, and how many were left before the last choice."""
    paths = whole_paths(seed, count)
    alive = list(range(count))
    tokens = 0
    while True:
        tokens += PARAMS.segment_length
        alive.sort(key=lambda i: reward_at(paths[i], tokens), reverse=True)
        alive = sorted(alive[: max(1, round((1 - rate) * len(alive)))])
        if all(len(paths[i]) <= tokens for i in alive):
            best = max(alive, key=lambda i: reward_at(paths[i], tokens))
            return paths[best], len(alive)


@pytest.mark.parametrize(
    ("rate", "count"), [(0.0, 4), (0.25, 9), (0.5, 9), (0.5, 5), (0.5, 1), (0.9, 9)]
)
def test_same_as_the_loop_written_out(rate: float, count: int) -> None:
    params = dataclasses.replace(PARAMS, candidates=count, rejection_rate=rate)
    outputs = run(params)
    for seed, output in zip(SEEDS, outputs, strict=True):
        tokens, _ = written_out(seed, count, rate)
        assert output.token_ids == tokens
        assert output.reward == reward_at(tokens, len(tokens))
        ends = [*range(5, len(tokens), 5), len(tokens)]
        assert [s.end for s in output.segments] == ends
    if count == 9:
        assert {output.finish_reason for output in outputs} == {"stop", "length"}


def test_two_paths_of_unequal_segments_match_the_exact_law() -> None:
    """At the first boundary the worse path ends, the second of equals; the other goes on alone."""
    law: Law = {}
    for (a, p), (b, q) in itertools.product(segments((), 5, world=RAGGED), repeat=2):
        best = a if RAGGED.reward(text(a)) >= RAGGED.reward(text(b)) else b
        rest = list(segments(best, 5 - len(best), world=EVEN)) if len(best) < 5 else [((), 1.0)]
        for behind, chance in rest:
            law[best + behind] = law.get(best + behind, 0.0) + p * q * chance
    params = StarsParams(
        method="speculative_rejection", candidates=2, rejection_rate=0.5, **SETTINGS
    )
    counts = count(ragged_engine(), params, 4000)
    assert p_value(counts, law) > 1e-3
    assert p_value(counts, model_law(5, world=RAGGED)) < 1e-6


def test_rate_zero_is_the_best_of_the_paths() -> None:
    outputs = run(dataclasses.replace(PARAMS, candidates=9, rejection_rate=0.0))
    rejected = run(dataclasses.replace(PARAMS, candidates=9, rejection_rate=0.5))
    for seed, output in zip(SEEDS, outputs, strict=True):
        best = max(reward_at(path, len(path)) for path in whole_paths(seed, 9))
        assert output.reward == best
    assert [o.token_ids for o in outputs] != [o.token_ids for o in rejected]


def test_ended_paths_cost_nothing_more() -> None:
    def drafted(rate: float) -> tuple[float, float]:
        one = bpe_engine()
        params = dataclasses.replace(PARAMS, candidates=8, rejection_rate=rate, seed=50)
        one.generate(PROMPT, dataclasses.replace(params, stop_token_ids=None), use_tqdm=False)
        return one.stats()["drafted_tokens"], one.stats()["paths_dropped"]

    assert drafted(0.0)[1] == 0
    # 8, 4, 2, 1, 1, 1 paths, of 5 tokens and at last 3.
    assert drafted(0.5) == (8 * 5 + 4 * 5 + 2 * 5 + 2 * 5 + 3, 7)


@pytest.mark.parametrize("options", [{"num_pages": 9}, {"max_rows": 9, "overlap_scoring": True}])
def test_same_without_room(options: dict[str, Any]) -> None:
    params = dataclasses.replace(PARAMS, candidates=9)
    want = [output.token_ids for output in run(params)]
    assert [output.token_ids for output in run(params, **options)] == want
