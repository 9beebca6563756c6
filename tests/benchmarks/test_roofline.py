"""The observer's sums against numbers worked out by hand, and the script on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stars_fast import Engine, StarsParams
from stars_fast.benchmarks import observe, roofline
from stars_fast.benchmarks.acceptance import EASY_TARGET
from stars_fast.benchmarks.least import Machine, Work
from stars_fast.benchmarks.models import TINY, id_tokenizer, language_model, prompts, reward_model
from stars_fast.benchmarks.observe import EngineCost, Observation, observed, round_passes

PROMPT, K, M = 8, 4, 8

# TINY: hidden 64, intermediate 128, 2 layers, 4 query and 2 KV heads of 16, vocabulary 512.
LAYER = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128  # q and o, k and v, the gated MLP
BACKBONE, HEAD = 2 * LAYER, 64 * 512
KV = 2 * 2 * (16 + 16) * 4  # bytes: layers x heads x (key + value) x float32
PER_KEY = 2 * 2 * 4 * (16 + 16)  # operations: layers x 2 x heads x (scores + weighted values)


def tiny_engine(**options: Any) -> Engine:
    tokenizer = id_tokenizer(TINY)
    return Engine(
        language_model(TINY),
        reward_model(TINY),
        tokenizer=tokenizer,
        reward_tokenizer=tokenizer,
        reward_template="plain",
        num_pages=128,
        reward_num_pages=128,
        **options,
    )


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine(prefix_caching=False)


def params(**changed: Any) -> StarsParams:
    easy = StarsParams(segment_length=K, max_tokens=M, target_reward=EASY_TARGET, candidates=1)
    return easy.with_method(**{"method": easy.method, "seed": 1, **changed})


# Each test has prompts of its own: the engine remembers r(x) of those it has seen.
def prompt_ids(first: int) -> list[int]:
    return list(range(first, first + PROMPT))


def observe_run(engine: Engine, prompts: list[list[int]], one: StarsParams) -> Observation:
    with observed(engine) as seen:
        engine.generate(prompts, one, use_tqdm=False)
    return seen


def work(passes: list[Work]) -> Work:
    return sum(passes, Work())


def test_two_requests_by_hand(engine: Engine) -> None:
    before = engine.stats()
    passes = observe_run(engine, [prompt_ids(1), prompt_ids(101)], params()).passes()

    # Prefill: all of a prompt but its last token, which the first decode step feeds.
    seven = sum(range(1, PROMPT))  # keys seen by tokens 0 to 6, each its own included
    assert work(passes["prefill"]) == Work(
        bytes=BACKBONE * 4 + 2 * (PROMPT - 1) * KV,
        operations=2 * (PROMPT - 1) * 2 * BACKBONE + 2 * seven * PER_KEY,
    )
    # Draft: 8 steps of both; the token at position p reads p tokens and writes itself.
    assert len(passes["draft"]) == M
    positions = range(PROMPT - 1, PROMPT - 1 + M)
    touched = 2 * sum(p + 1 for p in positions)
    assert work(passes["draft"]) == Work(
        bytes=M * (BACKBONE + HEAD) * 4 + touched * KV,
        operations=2 * M * 2 * (BACKBONE + HEAD) + touched * PER_KEY,
    )
    # Score: prompts and first segments in one pass, second segments in another.
    first, second = range(1, PROMPT + K + 1), range(PROMPT + K + 1, PROMPT + 2 * K + 1)
    tokens = 2 * (PROMPT + 2 * K)
    assert work(passes["score"]) == Work(
        bytes=2 * BACKBONE * 4 + (tokens + 2 * (PROMPT + K)) * KV,
        operations=tokens * 2 * BACKBONE + 2 * (sum(first) + sum(second)) * PER_KEY,
    )
    # The engine's own count of what its reward model ran.
    assert engine.stats()["rm_tokens"] - before["rm_tokens"] == tokens


def test_candidates_read_their_prefix_once(engine: Engine) -> None:
    rows = 4
    passes = observe_run(engine, [prompt_ids(201)], params(candidates=rows)).passes()
    read = keys = 0
    for start in (PROMPT - 1, PROMPT + K - 1):  # cached tokens of the two rounds
        for step in range(K):
            read += start + rows * (step + 1)  # the prefix once, each row's own tokens
            keys += rows * (start + step + 1)
    assert work(passes["draft"]) == Work(
        bytes=M * (BACKBONE + HEAD) * 4 + read * KV,
        operations=rows * M * 2 * (BACKBONE + HEAD) + keys * PER_KEY,
    )
    second = passes["score"][1]
    assert second.bytes == BACKBONE * 4 + (PROMPT + K + rows * K) * KV


def test_rows_that_end_early_are_not_run_further(engine: Engine) -> None:
    seen = observe_run(engine, [prompt_ids(301), prompt_ids(311)], params())
    drawn = replace(seen.rounds[0], lengths=np.array([1, 3]))
    passes = round_passes(drawn, seen.cost)["draft"]
    start = PROMPT - 1
    assert [p.operations for p in passes] == [
        tokens * 2 * (BACKBONE + HEAD) + tokens * (start + step + 1) * PER_KEY
        for step, tokens in enumerate((2, 1, 1))
    ]
    assert passes[2].bytes == (BACKBONE + HEAD) * 4 + (start + 3) * KV


def test_forks_are_the_bytes_that_the_engine_copied(engine: Engine) -> None:
    before = engine.stats()["copied_bytes"]
    # Two segments on a page, so that a second one begins in the middle of it; its copy is made in
    # the round that follows.
    longer = params(candidates=2, max_tokens=2 * M)
    passes = observe_run(engine, [prompt_ids(401)], longer).passes()
    copied = engine.stats()["copied_bytes"] - before
    assert copied > 0
    assert work(passes["fork"]).bytes == 2 * copied  # read and written


def test_unaligned_requests_are_not_scored(engine: Engine) -> None:
    passes = observe_run(engine, [prompt_ids(421)], params(method="vanilla")).passes()
    assert passes["score"] == []
    assert len(passes["draft"]) == M


def test_reward_function_has_no_cost() -> None:
    engine = Engine(
        language_model(TINY),
        lambda prompts, responses: [0.0] * len(prompts),
        tokenizer=id_tokenizer(TINY),
        num_pages=64,
    )
    assert EngineCost.of(engine).score is None
    assert observe_run(engine, [prompt_ids(1)], params()).passes()["score"] == []


def test_the_loop_is_left_as_it_was(engine: Engine) -> None:
    with observed(engine), pytest.raises(RuntimeError, match="observed already"), observed(engine):
        pass
    assert engine.loop.on_round is None


def test_run_counts_and_times_each_request(engine: Engine) -> None:
    machine = Machine("made up", bytes_per_second=1e9, operations_per_second=1e9)
    asked = [prompt_ids(431), prompt_ids(441), prompt_ids(451)]
    run = observe.run(engine, asked, [params()] * 3, machine)
    assert run.counts["accepted_tokens"] == 3 * M
    assert run.acceptance_rate == 1.0
    assert [phase.name for phase in run.phases] == [
        "plan", "fork", "prefill", "draft", "score", "commit", "rest",
    ]  # fmt: skip
    assert sum(phase.seconds for phase in run.phases) == pytest.approx(run.seconds)
    assert len(run.first_segment) == 3
    assert all(0 < first < run.seconds for first in run.first_segment)
    record = run.record()
    draft = record["phases"][3]
    assert draft["measured_over_least"] == draft["seconds"] / draft["least_seconds"]
    assert record["phases"][0]["measured_over_least"] is None
    assert run.pages > 0
    assert run.reward_pages > 0


def test_batches_come_one_after_the_other(engine: Engine) -> None:
    machine = Machine("made up", bytes_per_second=1e9, operations_per_second=1e9)
    asked = [prompt_ids(first) for first in (461, 471, 481)]
    run = observe.run(engine, asked, [params()] * 3, machine, batch=2)
    assert run.counts["rounds"] == 2 * (M // K)
    # Counted from its own arrival, which is after the first batch has ended.
    assert len(run.first_segment) == 3
    assert run.first_segment[2] < run.seconds - run.first_segment[0]


def test_least_is_the_sum_over_passes() -> None:
    # One pass bound by memory, one by arithmetic: together they take both times, not the larger.
    machine = Machine("made up", bytes_per_second=10.0, operations_per_second=10.0)
    passes = {"draft": [Work(bytes=20.0, operations=1.0), Work(bytes=1.0, operations=30.0)]}
    moved = {f"seconds_{name}": 0.0 for name in observe.PHASES}
    phases = observe._phases(moved, 1.0, passes, machine)
    assert phases[3].least_seconds == 2.0 + 3.0
    assert phases[3].work == Work(21.0, 31.0)


def test_failed_request_is_an_error() -> None:
    # Past the check of a new engine, which refuses such a model.
    engine = tiny_engine()
    engine.loop.model.model.lm_head.weight.data.fill_(torch.nan)  # type: ignore[union-attr]
    machine = Machine("made up", 1.0, 1.0)
    with pytest.raises(RuntimeError, match="run-0: .*NaN"):
        observe.run(engine, [prompt_ids(1)], [params()], machine)
    assert engine.loop.on_round is None


SMALL_RUN = (
    *("--shape", "TINY", "--requests", "3", "--prompt", "20", "--max-tokens", "8", "--quick"),
    *("--segment-length", "4", "--tolerance", "0.4", "--repeats", "1", "--candidates", "2"),
)


def test_script_prints_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "roofline.json"
    assert roofline.main([*SMALL_RUN, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for word in ("measured / least", "prefill", "score", "whole", "random weights"):
        assert word in printed
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["command"].startswith("python benchmarks/roofline.py --shape TINY")
    assert record["setting"]["candidates"] == 2
    assert record["median_run"]["least_seconds"] > 0
    assert {"commit", "device", "versions", "machine"} <= record.keys()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--requests", "0"], "--requests: must be an integer of at least 1, got '0'"),
        (["--segment-length", "x"], "--segment-length: must be an integer of at least 1, got 'x'"),
        (["--candidates", "-1"], "--candidates: must be an integer of at least 1 or auto, got"),
        (["--acceptance", "1.5"], "--acceptance: must be in (0, 1], got '1.5'"),
        (["--acceptance", "0"], "--acceptance: must be in (0, 1], got '0'"),
        (["--acceptance", "nan"], "--acceptance: must be in (0, 1], got 'nan'"),
        (["--shape", "HUGE"], "--shape: invalid choice: 'HUGE' (choose from"),
    ],
)
def test_bad_flags(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        roofline.main(arguments)
    assert complaint in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has float8 pages")
def test_fp8_needs_a_gpu() -> None:
    with pytest.raises(SystemExit, match="--kv-dtype must be auto without a GPU, got 'fp8'"):
        roofline.main(["--kv-dtype", "fp8"])


def test_pages_are_enough_for_every_request_at_once() -> None:
    # 3 requests, 12 rows, prompt 20, M 8, K 4 on pages of 16.
    engine = tiny_engine(max_rows=12)
    needed = roofline.pages_needed(3, 12, 20, 8, 4, 16)
    asked = prompts(TINY, 3, 20, 20)
    each = roofline.seeded(params(candidates=4, target_reward=1e9, max_attempts=8), 3)
    run = observe.run(engine, asked, each, Machine("made up", 1.0, 1.0))
    assert run.counts["fallbacks"] == run.counts["segments"]
    assert run.acceptance_rate == 0.0
    assert max(run.pages, run.reward_pages) <= needed
