"""The simulation serves every request once, and agrees with arithmetic and queueing theory."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stars_fast import _core
from stars_fast.benchmarks.capacity import simulate as command
from stars_fast.benchmarks.capacity.replica import GPUS, Replica, round_time
from stars_fast.benchmarks.capacity.replicas_needed import Limits, replicas_needed, saturation
from stars_fast.benchmarks.capacity.simulation import AUTO, Outcome, simulate
from stars_fast.benchmarks.capacity.workload import Requests, Workload
from stars_fast.benchmarks.least import Machine, ModelCost
from stars_fast.benchmarks.models import TINY

#: Round numbers, so that sums can be made by hand.
COST = ModelCost(weight_bytes=1000.0, kv_bytes=3.0, operations=2.0, operations_per_key=0.5)
REPLICA = Replica(
    machine=Machine("by hand", 1e6, 1e6),
    step=COST,
    prefill=replace(COST, weight_bytes=800.0),
    score=replace(COST, weight_bytes=500.0),
    num_pages=400,
    max_rows=32,
    fixed_cost_rows=16.0,
    overhead=1e-3,
)
WORKLOAD = Workload(prompt_mean=60.0, prompt_max=200, response_mean=40.0, max_tokens=64)


def served(candidates: int, load: float = 4.0, count: int = 300, seed: int = 3) -> Outcome:
    """Requests on `REPLICA`."""
    requests = WORKLOAD.draw(count, load, seed)
    return simulate(requests, WORKLOAD, REPLICA, candidates, seed=seed)


@pytest.mark.parametrize("candidates", [1, 2, 8, AUTO])
@pytest.mark.parametrize("num_pages", [400, 30])
def test_every_request_is_served_once(candidates: int, num_pages: int) -> None:
    requests = WORKLOAD.draw(200, 6.0, 1)
    replica = replace(REPLICA, num_pages=num_pages)
    done = simulate(requests, WORKLOAD, replica, candidates)
    assert (done.ends == 1).all()
    np.testing.assert_array_equal(done.tokens, requests.response_length)
    assert (requests.arrival <= done.start).all()
    assert (done.start < done.first).all()
    assert (done.first <= done.end).all()
    assert done.pages_held == 0
    assert done.rounds.pages.max() <= done.num_pages
    assert done.rounds.accepted.sum() == requests.response_length.sum()
    assert done.rounds.accepted.sum() == done.stats["accepted_tokens"]
    assert done.rounds.drafted.sum() == done.stats["drafted_tokens"]
    assert done.rounds.preemptions.sum() == done.stats["preemptions"]


def test_few_pages_preempt() -> None:
    requests = replace_lengths(WORKLOAD.draw(100, np.inf, 1), prompt=33, response=64)
    done = simulate(requests, WORKLOAD, replace(REPLICA, num_pages=30), 1)
    assert done.stats["preemptions"] > 0
    assert (done.tokens == 64).all()


def replace_lengths(requests: Requests, *, prompt: int, response: int) -> Requests:
    n = len(requests)
    return replace(requests, prompt_length=np.full(n, prompt), response_length=np.full(n, response))


def test_rounds_follow_each_other() -> None:
    rounds = served(2).rounds
    ends = rounds.begin + rounds.seconds
    assert (rounds.begin[1:] >= ends[:-1]).all()
    assert (rounds.begin[1:] > ends[:-1]).any(), "it never idled"


def test_same_seed_same_outcome() -> None:
    a, b, other = served(AUTO), served(AUTO), served(AUTO, seed=4)
    np.testing.assert_array_equal(a.end, b.end)
    np.testing.assert_array_equal(a.rounds.rows, b.rounds.rows)
    assert a.stats == b.stats
    assert a.stats != other.stats


def test_candidates_change_no_test() -> None:
    one, eight, auto = served(1), served(8), served(AUTO)
    for name in ("attempts", "segments", "fallbacks", "accepted_tokens"):
        assert one.stats[name] == eight.stats[name] == auto.stats[name], name
    assert one.stats["fallbacks"] > 0
    assert one.stats["drafted_tokens"] < eight.stats["drafted_tokens"]


def test_passes_have_their_rate() -> None:
    workload = replace(WORKLOAD, pass_rate=0.3, pass_concentration=1e6, max_attempts=100)
    done = simulate(workload.draw(3000, 1.0, 0), workload, REPLICA, 1)
    rate = done.stats["segments"] / done.stats["attempts"]
    assert rate == pytest.approx(0.3, abs=0.015)  # 4 standard deviations of 14,000 attempts


def test_delay_grows_with_load() -> None:
    top = saturation(WORKLOAD, REPLICA, 2, count=1000)
    waits = [served(2, load * top, count=2000).summary() for load in (0.2, 0.5, 0.8)]
    for name in ("wait_seconds_p99", "end_seconds_p50", "busy_share", "page_share_mean"):
        values = [summary[name] for summary in waits]
        assert values == sorted(values), (name, values)
        assert values[-1] > 1.2 * values[0], (name, values)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_request_a_round_is_m_d_1(load: float) -> None:
    """Pollaczek and Khinchine: a mean wait of rho S / (2 (1 - rho)) with a fixed service time S."""
    workload = replace(WORKLOAD, pass_rate=1.0, max_tokens=32)
    replica = replace(REPLICA, max_rows=1)
    alone = replace_lengths(workload.draw(1, 1.0, 0), prompt=40, response=32)
    service = float(simulate(alone, workload, replica, 1).rounds.seconds[0])
    requests = replace_lengths(workload.draw(40_000, load / service, 5), prompt=40, response=32)
    done = simulate(requests, workload, replica, 1)
    np.testing.assert_allclose(done.rounds.seconds, service)
    expected = load * service / (2 * (1 - load))
    assert done.wait[4000:].mean() == pytest.approx(expected, rel=0.1)
    assert done.summary()["busy_share"] == pytest.approx(load, rel=0.03)


def test_round_time_is_the_arithmetic() -> None:
    """One request of 21 prompt tokens, two candidates of 4, one of which ends early."""
    scheduler = scheduler_of_one(candidates=2)
    plan = scheduler.plan()
    lengths = np.array([4, 3], np.int32)
    taken = round_time(plan, lengths, REPLICA)
    # 20 tokens are run ahead, the 21st is fed by the first decode step.
    keys = sum(range(1, 21))
    assert taken.prefill == pytest.approx(seconds(800 + 3 * 20, 2 * 20 + 0.5 * keys))
    steps = [seconds(1000 + 3 * (20 + 2 * i + 2), 2 * 2 + 0.5 * 2 * (20 + i + 1)) for i in range(4)]
    assert taken.draft == pytest.approx(sum(steps))
    # The segments of 4 and 3 tokens, and the prompt in the same pass.
    keys += sum(21 + i for i in range(1, 5)) + sum(21 + i for i in range(1, 4))
    assert taken.score == pytest.approx(seconds(500 + 3 * (21 + 27), 2 * 27 + 0.5 * keys))
    assert taken.fork == 0.0
    assert taken.total == pytest.approx(sum(steps) + taken.prefill + taken.score + 1e-3)


def scheduler_of_one(candidates: int) -> _core.Scheduler:
    scheduler = _core.Scheduler(num_pages=50, prefix_caching=False)
    scheduler.add(
        0,
        np.zeros(21, np.int64),
        scored=True,
        segment_length=4,
        max_tokens=12,
        max_attempts=4,
        candidates=candidates,
        hard=True,
    )
    return scheduler


def seconds(moved: float, computed: float) -> float:
    return max(moved, computed) / 1e6


def test_copies_count_and_the_padding_does_not() -> None:
    """The second segment starts inside a page, so what it won has the 4 tokens before it copied."""
    scheduler = scheduler_of_one(candidates=1)
    for accepted, copied in ((0, 0), (4, 0), (8, 4)):
        plan = scheduler.plan()
        for request in plan.unscored.tolist():
            scheduler.set_prompt_reward(request, 0.0)
        lengths = np.array([4], np.int32)
        taken = round_time(plan, lengths, REPLICA)
        # Read and written, in both models.
        assert taken.fork == pytest.approx(seconds(2 * 2 * 3 * copied, 0.0))
        # 20 tokens of the prompt, then what was accepted: the padding behind them is not read.
        keys = 20 + accepted
        steps = [seconds(1000 + 3 * (keys + i + 1), 0.0) for i in range(4)]
        assert taken.draft == pytest.approx(sum(steps))
        scheduler.commit(np.ones((1, 4), np.int64), lengths, np.zeros(1, np.uint8), np.ones(1))
    assert not scheduler.has_unfinished


def test_more_candidates_keep_the_load_but_cost_rows() -> None:
    one, four = served(1, count=1000).summary(), served(4, count=1000).summary()
    assert four["drafted_per_accepted"] > one["drafted_per_accepted"] > 1.0
    assert four["rows_per_request_mean"] > 2.0 > one["rows_per_request_mean"] == 1.0
    # The tail of a hard request is shorter with more candidates a round.
    assert four["end_seconds_p99"] < one["end_seconds_p99"]


def test_replicas_needed_holds_the_limit_and_one_less_does_not() -> None:
    limits = Limits(wait_seconds_p99=0.4)
    found = replicas_needed(WORKLOAD, REPLICA, 2, 60.0, limits, count=600, most=100)
    assert found is not None
    replicas, summary = found
    assert limits.hold(summary)
    top = saturation(WORKLOAD, REPLICA, 2, count=600)
    assert replicas >= 60.0 / top
    fewer = WORKLOAD.draw(600, 60.0 / (replicas - 1), 0)
    short = simulate(fewer, WORKLOAD, REPLICA, 2).summary()
    assert not limits.hold(short) or replicas - 1 < 60.0 / top
    assert replicas_needed(WORKLOAD, REPLICA, 2, 60.0, limits, count=200, most=2) is None


def test_replica_of_data_sheets() -> None:
    """Ceilings scaled, and the pages that fill the memory beside both models' weights."""
    replica = Replica.of(GPUS["h100"], TINY, TINY, efficiency=0.5, memory_share=0.5)
    assert replica.machine.bytes_per_second == 3.35e12 / 2
    assert replica.machine.operations_per_second == 989e12 / 2
    kv = 2 * 2 * 2 * 16 * 2  # layers, keys and values, heads, their size, bytes
    assert replica.step.kv_bytes == replica.score.kv_bytes == kv
    assert replica.step.weight_bytes > replica.prefill.weight_bytes
    pages = 80e9 / 2 / (16 * 2 * kv)
    assert 0.999 * pages < replica.num_pages <= pages
    gpu = replace(GPUS["h100"], memory_bytes=1e5)
    with pytest.raises(ValueError, match="leaves no pages"):
        Replica.of(gpu, TINY, TINY)


# The command


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model and loads that take no time."""
    monkeypatch.setattr(command, "LOADS", (0.5, 1.1))
    monkeypatch.setitem(command.MODELS, "llama-2-7b", TINY)


#: So few pages that the pool is made at once.
SMALL = ["--memory-share", "0.001", "--max-rows", "64"]


@pytest.mark.usefixtures("tiny")
def test_sweep_writes_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="draws the plot")
    target = tmp_path / "found.json"
    words = [*SMALL, "--requests", "1200", "--candidates", "2", "auto", "--out", str(target)]
    assert command.main(words) == 0
    record = json.loads(target.read_text(encoding="utf-8"))
    assert record["requests"] == 1200
    assert {(run["candidates"], run["load"]) for run in record["runs"]} == {
        (n, load) for n in ("2", "auto") for load in (0.5, 1.1)
    }
    assert target.with_suffix(".png").stat().st_size > 10_000
    assert "| 1.1 |" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_answer_prints_replicas(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "--load", "20", "--max-wait-p99", "5", "--trial-requests", "200"]
    assert command.main([*words, "--candidates", "1", "2"]) == 0
    assert "answer: 1 replicas" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--efficiency", "1.5"], r"--efficiency: must be a number in \(0, 1\], got '1.5'"),
        (["--load", "0"], "--load: must be a number above 0, got '0'"),
        (["--load", "nan"], "--load: must be a number above 0, got 'nan'"),
        (["--requests", "many"], "--requests: must be an integer of at least 1, got 'many'"),
        (["--requests", "100"], "--requests: must be at least 4000, 100 for each of 40 runs"),
        (["--candidates", "0"], "--candidates: must be an integer of at least 1 or auto, got '0'"),
        (["--load", "5"], "--load needs a limit: one of --max-wait-p99"),
        (["--max-wait-p99", "1"], "need --load"),
        (["--memory-share", "0.1"], "leaves no pages"),
        (["--plot", "none.json"], "--plot: .*none.json cannot be read"),
        (["--gpu", "h100", "--max-tokens", "100000"], "needs 6\\d\\d\\d pages"),
        (["--gpu", "tpu"], "--gpu: invalid choice: 'tpu'"),
    ],
)
def test_bad_values_name_the_flag(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(words)
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)
