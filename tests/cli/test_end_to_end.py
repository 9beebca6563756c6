"""The commands as they are installed, on the small models that ship with the package."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stars_fast import Engine, StarsParams, demo
from stars_fast.cli import generate, main
from stars_fast.cli.demo import _unaligned
from stars_fast.config import FLAGS

COMMAND = str(Path(sys.executable).with_name("stars-fast"))
MODELS = ("--model", str(demo.model_dir()), "--reward-model", str(demo.reward_model_dir()))
SHORT = ("--max-tokens", "12", "--segment-length", "4", "--candidates", "2", "--device", "cpu")
TARGET = ("--target-reward", "0.5")


def run(*argv: object) -> int:
    return main(["generate", *MODELS, *SHORT, *map(str, argv)])


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path: Path) -> dict[int, dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({record["line"] for record in records}) == len(records)
    return {record["line"]: record for record in records}


def test_results_are_those_of_the_engine(tmp_path: Path) -> None:
    prompts = demo.prompts(3)
    engine = Engine.demo(seed=5, device="cpu")
    assert engine.tokenizer is not None
    ids = engine.tokenizer(prompts[2])["input_ids"]
    source = write(
        tmp_path / "in",
        {"id": "first", "prompt": prompts[0]},
        {"prompt": prompts[1], "params": {"max_tokens": 4, "n": 2}},
        {"prompt_token_ids": ids, "params": {"method": "vanilla"}},
    )
    assert run("--input", source, "--output", tmp_path / "out", "--seed", "5", *TARGET) == 0
    records = read(tmp_path / "out")
    params = StarsParams(target_reward=0.5, max_tokens=12, segment_length=4, candidates=2)
    each = [params, replace(params, max_tokens=4, n=2), params.with_method("vanilla")]
    outputs = engine.generate(prompts, each, use_tqdm=False)
    for line, output in enumerate(outputs, 1):
        assert records[line]["error"] is None
        for got, expected in zip(records[line]["outputs"], output.outputs, strict=True):
            assert got["token_ids"] == expected.token_ids
            assert got["text"] == expected.text
            assert got["finish_reason"] == expected.finish_reason
            assert got["reward"] == pytest.approx(expected.reward, abs=1e-4)
            assert [s["accepted"] for s in got["segments"]] == [
                segment.accepted for segment in expected.segments
            ]
    assert (records[1]["id"], records[1]["prompt"]) == ("first", prompts[0])
    assert records[3]["prompt"] == ids


def test_without_models_the_demos_pair_runs_with_its_parameters(
    capfd: pytest.CaptureFixture[str],
) -> None:
    flags = ("--prompt", demo.prompts(1)[0], "--max-tokens", "20", "--device", "cpu", *TARGET)
    outputs = []
    for others in ((), (*MODELS, "--segment-length", "16", "--beta", "0.3")):
        assert main(["generate", *flags, *others]) == 0
        (output,) = json.loads(capfd.readouterr().out)["outputs"]
        outputs.append((output["text"], [s["attempts"] for s in output["segments"]]))
    assert outputs[0] == outputs[1]
    assert len(outputs[0][1]) == 2


def test_a_killed_run_is_resumed_with_the_same_tokens(tmp_path: Path) -> None:
    source = write(tmp_path / "in", *({"prompt": prompt} for prompt in demo.prompts(8)))
    flags = [*MODELS, *SHORT, "--max-rows", "2", "--calibration-prompts", "2"]
    out, pipe = tmp_path / "out", tmp_path / "pipe"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [COMMAND, "generate", *flags, "--input", str(pipe), "--output", str(out)],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    with pipe.open("w") as writer:  # half of the input: the run cannot end
        writer.writelines(source.read_text().splitlines(keepends=True)[:4])
        writer.flush()
        while process.poll() is None and not (out.exists() and out.stat().st_size):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    flags += ["--input", str(source)]
    assert process.returncode == 130
    assert f"results are in {out}; --resume continues" in err
    assert "Traceback" not in err
    assert "%|" not in err  # no progress bar in a pipe
    kept = read(out)
    assert 0 < len(kept) < 8
    assert main(["generate", *flags, "--output", str(out), "--resume"]) == 0
    assert main(["generate", *flags, "--output", str(tmp_path / "whole")]) == 0
    whole = read(tmp_path / "whole")
    resumed = read(out)
    assert resumed.keys() == whole.keys() == set(range(1, 9))
    assert {line: resumed[line] for line in kept} == kept
    tokens = [
        {line: r["outputs"][0]["token_ids"] for line, r in d.items()} for d in (resumed, whole)
    ]
    assert tokens[0] == tokens[1]
    targets = [tmp_path / f"{name}.calibration.json" for name in ("out", "whole")]
    assert targets[0].read_text() == targets[1].read_text()


def test_bad_requests_are_recorded_and_harm_no_other(tmp_path: Path) -> None:
    good = {"prompt": demo.prompts(1)[0]}
    source = write(
        tmp_path / "in",
        good,
        {"prompt_token_ids": [10**6]},
        {"prompt": "kettle " * 5000},
        {"prompt": "x", "params": {"stop_token_ids": [10**6]}},
        {"messages": [{"role": "user", "content": "x"}]},
    )
    alone = write(tmp_path / "alone", good)
    flags = ("--on-error", "record", *TARGET)
    assert run("--input", source, "--output", tmp_path / "out", *flags) == 0
    assert run("--input", alone, "--output", tmp_path / "one", *flags) == 0
    records = read(tmp_path / "out")
    (response,) = records[1]["outputs"]
    assert response["token_ids"] == read(tmp_path / "one")[1]["outputs"][0]["token_ids"]
    assert "1000000" in records[2]["error"]
    assert "context" in records[3]["error"]
    assert "stop_token_ids" in records[4]["error"]
    assert "chat template" in records[5]["error"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "{tmp}/none", "--reward-model", MODELS[3]], "{tmp}/none"),
        (["--model", MODELS[1], "--reward-model", "{tmp}/none"], "{tmp}/none"),
        ([*MODELS, "--page-size", "0"], "page_size must be at least 1, got 0"),
        ([*MODELS, "--dtype", "float7"], "dtype"),
        ([*MODELS, "--reward-head", "lable=0"], "reward_head must be name=value"),
        ([*MODELS, "--reward", "a=x"], "--reward and --reward-model cannot be given together"),
        ([*MODELS[:2], "--reward", "a=x,at_most=y"], "at_most of reward 'a' must be a number"),
        ([*MODELS[:2], "--reward", "a={tmp}/none"], "reward 'a': "),
        ([*MODELS, "--reward-head", "label=good"], "reward_head names label 'good'; the labels"),
        ([*MODELS, "--device", "cpu", "--kv-dtype", "fp8"], "kv_dtype='fp8' needs the Triton"),
        (
            [*MODELS, "--device", "cpu", "--attention", "flash"],
            "attention must be one of auto, torch here, got 'flash': the model is on cpu",
        ),
    ],
)
def test_models_that_cannot_be_loaded_are_named(
    argv: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = [text.replace("{tmp}", str(tmp_path)) for text in argv]
    assert main(["generate", *flags, "--prompt", "x", *TARGET]) == 2
    out, err = capfd.readouterr()
    assert err.startswith("stars-fast: error: ")
    assert message.replace("{tmp}", str(tmp_path)) in err
    assert "Traceback" not in err
    assert out == ""


def test_one_of_two_labels(tmp_path: Path) -> None:
    """A classifier of two labels, of which the second is the demo's reward, gives its results."""
    folder = tmp_path / "two"
    shutil.copytree(MODELS[3], folder)
    weights = load_file(folder / "model.safetensors")
    score = weights["score.weight"]
    weights["score.weight"] = torch.cat((3 - score, score))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    names = {"id2label": {"0": "dull", "1": "good"}, "label2id": {"dull": 0, "good": 1}}
    (folder / "config.json").write_text(json.dumps({**config, **names}))
    flags = [*SHORT, "--prompt", demo.prompts(1)[0], *TARGET, "--seed", "3"]
    two = ["--model", MODELS[1], "--reward-model", str(folder), "--reward-head", "label=good"]
    assert main(["generate", *two, *flags, "--output", str(tmp_path / "a")]) == 0
    assert main(["generate", *MODELS, *flags, "--output", str(tmp_path / "b")]) == 0
    ours, demos = (read(tmp_path / name)[1]["outputs"][0] for name in "ab")
    assert ours["token_ids"] == demos["token_ids"]
    assert ours["reward"] == pytest.approx(demos["reward"], abs=1e-5)


def test_several_rewards(tmp_path: Path) -> None:
    """The demo's reward under two names, one of which is a constraint that nothing can keep."""
    rm = MODELS[3]
    flags = [*SHORT, "--prompt", demo.prompts(1)[0], *TARGET, "--seed", "3"]
    rewards = ["--reward", f"good={rm},weight=0.5", "--reward", f"bound={rm},weight=0,at_least=99"]
    common = [*MODELS[:2], *rewards, "--reward-combine", "min"]
    assert main(["generate", *common, *flags, "--output", str(tmp_path / "a")]) == 0
    (output,) = read(tmp_path / "a")[1]["outputs"]
    for record in (output, *output["segments"]):
        assert record["rewards"]["good"] == record["rewards"]["bound"] == 2 * record["reward"]
    assert {segment["accepted"] for segment in output["segments"]} == {"fallback"}
    kept = json.loads((tmp_path / "a.settings.json").read_text())
    assert (kept["reward"], kept["combine"]) == (rewards[1::2], "min")


def test_the_flags_have_the_defaults_of_the_engine() -> None:
    parser = ArgumentParser()
    generate.add_command(parser.add_subparsers())
    args = vars(parser.parse_args(["generate", "--model", "x"]))
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(Engine).parameters.items()
        if name in args and name != "model"
    }
    assert defaults.keys() == FLAGS.keys() | {"reward_model", "seed", "tensor_parallel"}
    assert {name: args[name] for name in defaults} == defaults


def test_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    flags = ["--prompts", "4", "--show", "2", "--max-tokens", "20", "--candidates", "2"]
    done = subprocess.run(
        [COMMAND, "demo", *flags], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert "\033" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    text = " ".join(done.stdout.split())
    for number, prompt in enumerate(demo.prompts(2), 1):
        assert f"Prompt {number} of 4: {prompt}" in text
    assert "Prompt 3" not in text
    for word in ("unaligned", "STARS", "threshold", "attempts", "test", "gold"):
        assert word in text
    assert "95% confidence interval [" in text
    assert "10,000 resamples of the 4 paired differences" in text
    assert main(["demo", *flags]) == 0
    assert capsys.readouterr().out == done.stdout


def test_the_demo_says_what_is_wrong(capfd: pytest.CaptureFixture[str]) -> None:
    for argv, message in [
        (["--prompts", "1"], "--prompts must be at least 2"),
        (["--prompts", "1000000"], "1000000"),
        (["--show", "-1"], "--show must be at least 0"),
        (["--beta", "0"], "beta must be above 0"),
    ]:
        assert main(["demo", *argv]) == 2
        assert message in capfd.readouterr().err


def test_unaligned_responses_of_the_demo_are_vanilla_sampling() -> None:
    engine = Engine.demo(device="cpu")
    params = StarsParams(target_reward=3.0, max_tokens=12, segment_length=4, seed=3)
    prompts = demo.prompts(3)
    shown = engine.generate(prompts, _unaligned(params), use_tqdm=False)
    plain = engine.generate(prompts, params.with_method("vanilla"), use_tqdm=False)
    assert [o.outputs[0].token_ids for o in shown] == [o.outputs[0].token_ids for o in plain]
    assert all(s.reward is not None for o in shown for s in o.outputs[0].segments)
