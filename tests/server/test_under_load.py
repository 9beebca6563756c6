"""The scripts that load the server, small: crowds, faults, and both sides of the overhead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "aiohttp", "psutil", "httpx", "openai"):
    pytest.importorskip(package, reason=f"needs {package}, of the extras server and bench")

from helpers.serving import PARAMS, Gate, serving  # noqa: E402
from helpers.tiny_lm import small_model  # noqa: E402
from helpers.tiny_tokenizers import bpe_tokenizer  # noqa: E402

from stars_fast import Engine  # noqa: E402
from stars_fast.benchmarks import faults, hostile, load, overhead  # noqa: E402
from stars_fast.server import ServerSettings  # noqa: E402


def test_faults_harm_no_neighbour_and_leave_nothing_behind(tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    # Memory is for a long run to judge: libraries keep what they compile for each new shape.
    options = ["--requests", "180", "--clients", "40", "--max-growth", "1000", "--load-only"]
    options += ["--out", str(out)]
    assert faults.main(options) == 0
    record = json.loads(out.read_text())
    assert record["statuses"]["stream"]["200"] > 10
    assert set(record["statuses"]["bad"]) >= {"400", "404", "413"}


def test_what_faults_finds_is_found() -> None:
    found = faults.Findings(logged={"a", "b", "c"}, quiet={"d", "e"})
    names = ["a", "b", "b", "d", "d"]
    lines = [json.dumps({"event": "request", "request_id": name}) for name in names]
    lines.append(json.dumps({"event": "request", "request_id": "z", "exception": "boom"}))
    faults.check_log("\n".join(lines), found)
    assert sorted(found.wrong) == [
        "b is in the log 2 times",
        "c is in the log 0 times",
        "d is in the log 2 times",
        "in the log: boom",
    ]
    assert faults.growth([10, 50, 90, 100, 100, 100, 100, 100]) == pytest.approx(0)
    assert faults.growth(list(range(0, 8000, 1000))) == pytest.approx(2000)


def test_a_crowd_of_streams_comes_to_its_end(tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    options = ["--requests", "8", "--together", "4", "--clients", "60", "--max-tokens", "8"]
    flags = ["--", "--max-waiting", "100", "--max-running", "32", "--target-reward", "1"]
    assert load.main([*options, "--parts", "0.5", "--out", str(out), *flags]) == 0
    found = json.loads(out.read_text())["load"]
    assert found["crowd"]["complete"] == 60
    assert found["closed"]["complete"] == 8
    (opened,) = found["open"]
    assert opened["complete"] == 8
    assert opened["offered_per_second"] == pytest.approx(
        0.5 * found["closed"]["requests_per_second"]
    )
    assert opened["first_segment"]["p50"] <= opened["latency"]["p50"] <= opened["latency"]["p99"]


def test_both_sides_of_the_overhead_give_the_same_texts(tmp_path: Path) -> None:
    out = tmp_path / "overhead.json"
    options = ["--requests", "4", "--max-tokens", "16", "--repeats", "1", "--alone", "1"]
    options += ["--out", str(out)]
    assert overhead.main(options) == 0
    record = json.loads(out.read_text())
    assert record["tokens"] == 64
    for way in ("front", "thread"):
        assert len(record["engine_seconds"]) == len(record[way]["seconds"]) == 1
        assert record[way]["first_segment_ratio"] > 0
    # A front of so few requests may use less than a tick of the clock.
    assert record["front"]["front_cpu_seconds"] >= record["thread"]["front_cpu_seconds"] == 0


def test_hostile_clients_harm_no_neighbour() -> None:
    gate = Gate()
    engine = Engine(small_model(), gate, tokenizer=bpe_tokenizer(chat="chatml"), num_pages=400)
    with serving(engine, gate, ServerSettings("small", PARAMS)) as served:
        target = hostile.Target(served.url, {"prompt": "Not bad", "seed": 1, "n": 1}, size=5)
        found = hostile.attack(target)
        assert {name: why for name, why in found.items() if why} == {}
        assert target.tried > 100
        # What does not hold is found.
        target.body["prompt"] = ""
        assert "a plain request: 400, not 200" in str(hostile.why(target.text))
