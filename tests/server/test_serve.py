"""``stars-fast serve`` as a process, and its flags."""

from __future__ import annotations

import json
import re
import signal
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from helpers.server_process import server_process

from stars_fast.cli import main

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(package, reason=f"needs {package}, of the extras server and test")

import httpx  # noqa: E402


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

    monkeypatch.setattr("stars_fast.cli.serve._load_engine", fail)
    (tmp_path / "bad").write_text("{\n")
    (tmp_path / "empty").write_text("\n")
    assert main(["serve", *[text.replace("{tmp}", str(tmp_path)) for text in argv]]) == 2
    assert message in capfd.readouterr().err


def test_a_missing_package_is_named(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve"]) == 2
    assert "pip install 'stars_fast[server]'" in capfd.readouterr().err


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
