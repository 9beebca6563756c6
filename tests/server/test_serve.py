"""``stars-fast serve`` as a process, and its flags."""

from __future__ import annotations

import gc
import json
import re
import signal
import socket
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.server_process import server_process

from stars_fast.cli import main

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(package, reason=f"needs {package}, of the extras server and test")

import httpx  # noqa: E402

PAGES = ("--num-pages", "400")


def test_ctrl_c_twice_ends_in_the_middle_of_streams(tmp_path: Path) -> None:
    # Rounds that spend their time in C++, where a thread cannot be ended with the interpreter.
    code = """
import pathlib, time, torch
from stars_fast.engine.loop import Loop
score, matrix = Loop._score, torch.ones(700, 700)
def long(loop, done):
    end = time.monotonic() + 1.5
    while pathlib.Path("long").exists() and time.monotonic() < end:
        matrix @ matrix
    return score(loop, done)
Loop._score = long
"""
    body = {"prompt": "The film", "max_tokens": 400, "seed": 1, "stream": True}
    body["stars"] = {"target_reward": 3.0, "segment_length": 8}
    log = tmp_path / "log"
    with server_process(PAGES, log, code) as (url, process):
        (tmp_path / "long").touch()
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            assert process.poll() is None  # it drains
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
    assert "interrupted" in log.read_text()
    assert "terminate called" not in log.read_text()


def test_an_engine_that_fails_ends_the_process_and_says_why(tmp_path: Path) -> None:
    code = """
from stars_fast.engine.engine_thread import EngineThread
def fault(engine, *_):
    raise SystemExit(0)
EngineThread._pass_on = fault
"""
    log = tmp_path / "log"
    with server_process(PAGES, log, code) as (url, process):
        body = {"prompt": "The film", "stars": {"target_reward": 3.0}}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 503
        assert process.wait(60) == 1
    text = log.read_text()
    assert "stars-fast: error: the engine has stopped: SystemExit(0)" in text
    events = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    (critical,) = [event for event in events if event["level"] == "critical"]
    assert critical["event"] == "the engine has stopped: SystemExit: 0"
    assert "raise SystemExit(0)" in critical["exception"] or "in fault" in critical["exception"]


def test_health_is_503_while_a_round_is_stuck(tmp_path: Path) -> None:
    code = """
import pathlib, time
from stars_fast.engine.loop import Loop
score = Loop._score
def stuck(loop, done):
    while pathlib.Path("stuck").exists():
        time.sleep(0.01)
    return score(loop, done)
Loop._score = stuck
"""
    flags = [*PAGES, "--stuck-after", "0.5"]
    with server_process(flags, tmp_path / "log", code) as (url, _):
        assert httpx.get(f"{url}/health").status_code == 200
        (tmp_path / "stuck").touch()
        body = {"prompt": "The film", "max_tokens": 8, "stars": {"target_reward": 3.0}}
        body["stream"] = True
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            for path in ("health", "ready"):
                _until(lambda path=path: httpx.get(f"{url}/{path}").status_code == 503)
            (tmp_path / "stuck").unlink()
            assert "[DONE]" in response.read().decode()
        _until(lambda: httpx.get(f"{url}/ready").status_code == 200)


def test_while_it_drains_it_says_so_and_late_streams_end_with_an_error(tmp_path: Path) -> None:
    body = {"prompt": "The film", "max_tokens": 400, "seed": 1, "stream": True, "ignore_eos": True}
    body["stars"] = {"target_reward": 3.0, "segment_length": 2}
    code = """
import time
from stars_fast.engine.loop import Loop
score = Loop._score
def slow(loop, done):
    time.sleep(0.05)
    return score(loop, done)
Loop._score = slow
"""
    log = tmp_path / "log"
    with server_process([*PAGES, "--drain-timeout", "2"], log, code) as (url, process):
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
            lines = response.iter_lines()
            next(lines)  # it runs
            process.send_signal(signal.SIGTERM)
            _until(lambda: httpx.get(f"{url}/ready").status_code == 503)
            refused = httpx.post(f"{url}/v1/completions", json=body)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "stopping"
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert events[-1]["error"]["message"] == "aborted: the server stops"
        assert process.wait(60) == 0
    text = log.read_text()
    assert "Traceback" not in text
    events = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert [e["status"] for e in events if e["event"] == "request"] == [503, 503]


def _until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sigterm_finishes_what_is_under_way_and_exits(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "The film"}\n{"prompt": "This kettle"}\n')
    log = tmp_path / "log"
    flags = [
        "--target-reward", "auto", "--calibration-prompts", str(prompts),
        "--segment-length", "8", "--max-tokens", "24", "--num-pages", "400",
    ]  # fmt: skip
    with server_process(flags, log) as (url, process):
        assert httpx.get(f"{url}/ready").json() == {"status": "ok"}
        body = {"prompt": "The film", "n": 2, "max_tokens": 100, "seed": 1, "stream": True}
        ended: list[Any] = []
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
            lines = response.iter_lines()
            next(lines)  # it runs
            process.send_signal(signal.SIGTERM)
            ended = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        reasons = [c["choices"][0]["finish_reason"] for c in ended]
        assert sum(reason is not None for reason in reasons) == 2
        assert "abort" not in reasons
        assert process.wait(60) == 0
    text = log.read_text()
    assert "quantile of 8 unaligned responses to 2 prompts" in text
    events = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    (request,) = [event for event in events if event["event"] == "request"]
    assert request["status"] == 200
    assert request["completion_tokens"] > 0
    assert request["rm_tokens"] > 0
    assert "The film" not in text
    assert [e["event"] for e in events if e["logger"] == "stars_fast.server"][-1] == "stopped"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--top-p", "2"], "top_p must be in"),
        (["--model", "x"], "--reward-model is needed for method 'stars'"),
        (["--reward-model", "x"], "--reward-model needs --model"),
        (["--port", "99999"], "--port must be"),
        (["--seed", "-1"], "--seed must be"),
        (["--api-key", ""], "--api-key must not be empty"),
        (["--request-timeout", "0"], "request_timeout must be above 0"),
        (["--max-body-bytes", "0"], "max_body_bytes must be at least 1"),
        (["--calibration-quantile", "2"], "--calibration-quantile must be in"),
        (["--calibration-prompts", "{tmp}/none"], "none"),
        (["--calibration-prompts", "{tmp}/bad"], "input line 1"),
        (["--calibration-prompts", "{tmp}/empty"], "has no prompts"),
        (["--chat-template", "{tmp}/none"], "none"),
        (
            ["--model", "x", "--reward-model", "y", "--target-reward", "auto"],
            "--target-reward auto needs --calibration-prompts",
        ),
        (["--calibration-share", "2"], "--calibration-share must be in"),
        (["--calibration-share", "0.1", "--calibration-prompts", "x"], "cannot be given together"),
        (["--calibration-share", "0.1", "--budget", "4"], "--budget cannot be given together"),
        (
            ["--model", "x", "--calibration-share", "0.1", "--method", "vanilla"],
            "--calibration-share needs --reward-model",
        ),
    ],
)
def test_wrong_flags_are_named_before_a_model_is_loaded(
    argv: list[str],
    message: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("stars_fast.cli.serve.load_engine", fail)
    (tmp_path / "bad").write_text("{\n")
    (tmp_path / "empty").write_text("\n")
    assert main(["serve", *[text.replace("{tmp}", str(tmp_path)) for text in argv]]) == 2
    assert message in capfd.readouterr().err


def test_a_port_in_use_is_known_before_a_model_is_loaded(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("stars_fast.cli.serve.load_engine", fail)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert f"--host 127.0.0.1 --port {port}: Address already in use" in capfd.readouterr().err
    assert main(["serve", "--host", "no.such.host.invalid"]) == 2
    assert "--host no.such.host.invalid" in capfd.readouterr().err


def test_a_missing_package_is_named(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve"]) == 2
    assert "pip install 'stars_fast[server]'" in capfd.readouterr().err


def test_garbage_is_not_sought_in_what_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = SimpleNamespace(rank=0, lead=nullcontext)
    monkeypatch.setattr("stars_fast.cli.serve.load_engine", lambda args: loaded)
    monkeypatch.setattr("stars_fast.cli.serve._serve", lambda *args: gc.get_freeze_count())
    try:
        assert main(["serve", "--model", "m", "--port", "0"]) > 0
    finally:
        gc.unfreeze()


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    from stars_fast import Engine
    from stars_fast.engine.async_engine import AsyncEngine
    from stars_fast.server.metrics import Metrics

    text = files("stars_fast.server").joinpath("grafana.json").read_text(encoding="utf-8")
    panels = json.loads(text)["panels"]
    asked = {
        name
        for panel in panels
        for target in panel["targets"]
        for name in re.findall(r"stars:\w+", target["expr"])
    }
    engine = AsyncEngine(Engine.demo(num_pages=50))
    try:
        metrics = Metrics(engine)
        metrics.ended(200, 1.0, 1)
        shown = set(re.findall(r"^stars:\w+", metrics.text().decode(), re.MULTILINE))
    finally:
        engine.close(20)
    assert len(asked) > 10
    assert asked <= shown
