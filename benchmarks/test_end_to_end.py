"""The engine against the loops that public code has, and against plain generation.

All sides run in one process on the same models, prompts, draws and acceptance settings. That a
baseline gives the engine's tokens, or where its draws are its own the engine's rate of acceptance,
is asserted before anything is timed. Nothing judges by time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch

from stars_fast.benchmarks.compare import Compare
from stars_fast.benchmarks.measure import seconds_of
from stars_fast.benchmarks.setting import Setting, Tally


@pytest.fixture(scope="module")
def setting(device: torch.device, full: bool) -> Setting:
    """The models, once for this file."""
    return Setting.of_size(device, full=full)


def timed(run: Callable[[], Tally], device: torch.device) -> tuple[Tally, float]:
    """Run a side once: what it gave, and its seconds."""
    found: list[Tally] = []
    seconds = seconds_of(lambda: found.append(run()), device)
    return found[0], seconds


@pytest.mark.parametrize(
    ("name", "cached"), [("a: no cache", False), ("b: cache", True)], ids=["a", "b"]
)
def test_public_loop(compare: Compare, setting: Setting, name: str, cached: bool) -> None:
    """One prompt at a time, whole texts to the reward model."""
    ours = setting.reference
    theirs, seconds = timed(lambda: setting.run_one_by_one(cached=cached), setting.device)
    assert theirs.token_ids == ours.token_ids
    assert (theirs.attempts, theirs.fallbacks) == (ours.attempts, ours.fallbacks)
    compare(
        setting.run_engine, {}, once={name: seconds}, work=work(setting), tokens=ours.tokens,
        acceptance=ours.acceptance,
    )  # fmt: skip


def test_lockstep(compare: Compare, setting: Setting) -> None:
    """(c) A padded batch that waits for its slowest prompt."""
    ours, theirs = setting.reference, setting.run_lockstep()
    same = [a == b for a, b in zip(ours.token_ids, theirs.token_ids, strict=True)]
    assert sum(same) >= 0.8 * len(same)  # padding moves the last digits
    assert ours.same_acceptance(theirs)
    compare(
        setting.run_engine, {"c: lockstep": setting.run_lockstep}, repeats=3,
        work=work(setting), tokens=ours.tokens, acceptance=ours.acceptance,
        baseline_acceptance=theirs.acceptance,
    )  # fmt: skip


@pytest.mark.parametrize("candidates", [1, 2, 4])
def test_continuous(compare: Compare, setting: Setting, candidates: int) -> None:
    """(d) Segments from transformers' continuous batching, n candidates of each."""
    ours = setting.reference
    run = functools.partial(setting.run_continuous, candidates)
    theirs = run()
    assert theirs.tokens == ours.tokens
    assert ours.same_acceptance(theirs), (ours.acceptance, theirs.acceptance)
    compare(
        setting.run_engine, {"d: continuous": run}, repeats=3,
        work=work(setting) | {"candidates": candidates}, tokens=ours.tokens,
        acceptance=ours.acceptance, baseline_acceptance=theirs.acceptance,
    )  # fmt: skip


def test_cards(compare: Compare, setting: Setting) -> None:
    """(e) Segments that end by entropy, on this engine: the cost of the method, not of the code.

    The threshold is set so that such segments are about as long as the others.
    """
    length = setting.params.segment_length
    ragged = replace(
        setting.params,
        method="cards",
        segment_length=2 * length,
        min_segment_length=4,
        entropy_threshold=setting.entropy_threshold(max(2, length - 4)),
    )
    never = replace(ragged, segment_length=length, entropy_threshold=1e9)
    ours = setting.reference
    assert setting.run_engine(never).token_ids == ours.token_ids
    theirs = setting.run_engine(ragged)
    assert theirs.tokens == ours.tokens
    compare(
        setting.run_engine,
        {"e: entropy-ended": functools.partial(setting.run_engine, ragged)},
        work=work(setting), tokens=ours.tokens,
        acceptance=ours.acceptance, baseline_acceptance=theirs.acceptance,
        tokens_per_segment=theirs.tokens / theirs.segments,
        drafted_per_accepted=ours.drafted / ours.tokens,
        baseline_drafted_per_accepted=theirs.drafted / theirs.tokens,
    )  # fmt: skip


def test_without_alignment(compare: Compare, setting: Setting) -> None:
    """(f) `vanilla` against transformers' `generate` and `generate_batch`; and what stars adds."""
    vanilla = setting.params.with_method("vanilla")
    greedy = setting.run_engine(replace(vanilla, temperature=0.0)).token_ids
    agree = [a == b for a, b in zip(greedy, setting.run_generate(do_sample=False), strict=True)]
    assert sum(agree) >= 0.8 * len(agree)  # padding moves the last digits
    run = functools.partial(setting.run_engine, vanilla)
    tokens = run().tokens
    assert sum(map(len, setting.run_generate_batch())) == tokens
    setting.run_generate()
    compare(
        run,
        {
            "f: generate": setting.run_generate,
            "f: generate_batch": setting.run_generate_batch,
            "stars": setting.run_engine,
        },
        repeats=5, budget=40.0, work=work(setting), tokens=tokens,
    )  # fmt: skip


@pytest.mark.parametrize("candidates", [1, 2, 4, 8, "auto"])
def test_candidates(compare: Compare, setting: Setting, candidates: int | Literal["auto"]) -> None:
    """N changes the speed, never the tokens."""
    some = replace(setting.params, candidates=candidates)
    ours = setting.run_engine(some)
    assert ours.token_ids == setting.reference.token_ids
    compare(
        functools.partial(setting.run_engine, some), {},
        work=work(setting) | ({} if candidates == "auto" else {"candidates": candidates}),
        tokens=ours.tokens, drafted_per_accepted=ours.drafted / ours.tokens,
    )  # fmt: skip


@pytest.mark.sizes("requests", full=[1, 4, 16, 32], small=[2])
def test_requests(compare: Compare, setting: Setting, requests: int) -> None:
    """More requests at once, against the lockstep batch."""
    some = setting.all_prompts[:requests]
    ours = setting.run_engine(prompts=some)
    theirs, seconds = timed(lambda: setting.run_lockstep(some), setting.device)
    same = [a == b for a, b in zip(ours.token_ids, theirs.token_ids, strict=True)]
    assert sum(same) >= 0.8 * len(same)
    compare(
        functools.partial(setting.run_engine, prompts=some), {}, once={"c: lockstep": seconds},
        work={"requests": requests}, tokens=ours.tokens, acceptance=ours.acceptance,
    )  # fmt: skip


def work(setting: Setting) -> dict[str, float]:
    """What every side is asked for."""
    return {"requests": len(setting.prompts)}
