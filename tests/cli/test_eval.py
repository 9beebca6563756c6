"""``stars-fast eval`` from the command line, on the small models that ship with the package."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.json_server import Answer, json_server
from transformers import AutoModelForCausalLM

from stars_fast import Engine, StarsParams, demo
from stars_fast.cli import main
from stars_fast.eval import progress, session
from stars_fast.eval.answers import MathScores
from stars_fast.seeds import derive_seed

SMALL = ("--common", "max_tokens=12", "--device", "cpu", "--num-prompts", "4")
STARS = "stars:segment_length=4,beta=0.3,target_reward=0.5"


def run(*argv: object) -> int:
    return main(["eval", *map(str, argv)])


def read(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return record


def responses(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]


def runs(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def tokens(folder: Path) -> dict[tuple[str, int, int], list[int]]:
    return {(r["spec"], r["seed"], r["number"]): r["token_ids"] for r in responses(folder)}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An eval that has run; not to be changed."""
    folder = tmp_path_factory.mktemp("eval") / "out"
    flags = ("--method", STARS, "--method", "bon=best_of_n:candidates=2", "--seeds", "0,3")
    assert run(*SMALL, *flags, "--out", folder) == 0
    return folder


def test_responses_are_those_of_the_engine(done: Path) -> None:
    found = tokens(done)
    prompts = demo.prompts(4)
    engine = Engine.demo(device="cpu")
    for seed in (0, 3):
        seeds = [derive_seed(seed, number) for number in range(1, 5)]
        for label, params in {
            "vanilla": StarsParams(method="vanilla", max_tokens=12),
            "bon": StarsParams(method="best_of_n", candidates=2, max_tokens=12),
            "stars segment_length=4 beta=0.3 target_reward=0.5": StarsParams(
                segment_length=4, beta=0.3, target_reward=0.5, max_tokens=12
            ),
        }.items():
            each = [params.with_method(params.method, seed=one) for one in seeds]
            outputs = engine.generate(prompts, each, use_tqdm=False)
            for number, output in enumerate(outputs, 1):
                assert found[label, seed, number] == output.outputs[0].token_ids
    assert len(found) == 3 * 2 * 4


def test_rewards_are_those_of_the_whole_text(done: Path) -> None:
    rows = responses(done)
    prompts = demo.prompts(4)
    expected = Engine.demo(device="cpu").score(
        [prompts[row["number"] - 1] for row in rows], [row["text"] for row in rows]
    )
    assert [row["reward"] for row in rows] == pytest.approx(expected, abs=1e-4)
    assert [row["gold"] for row in rows] == [demo.gold_score(row["text"]) for row in rows]


def test_several_rewards(tmp_path: Path) -> None:
    model, rm = demo.model_dir(), demo.reward_model_dir()
    flags = ["--model", model, "--reward", f"a={rm},weight=2", "--reward", f"b={rm},weight=-0.5"]
    flags += ["--prompts", "demo", "--gold", "demo", "--method", STARS, "--no-plots"]
    assert run(*SMALL, *flags, "--out", tmp_path / "out") == 0
    rows = responses(tmp_path / "out")
    assert len(rows) == 8
    for row in rows:
        assert row["rewards"]["a"] == row["rewards"]["b"]
        assert row["reward"] == pytest.approx(1.5 * row["rewards"]["a"])
    settings = read(tmp_path / "out")["settings"]["models"]
    assert settings["combine"] == "sum"
    assert ["name='a'" in one and "weight=2.0" in one for one in settings["reward_model"]] == [
        True,
        False,
    ]


def test_the_summary_follows_from_the_responses(done: Path) -> None:
    record = read(done)
    rows = responses(done)
    specs = {spec["label"]: spec for spec in record["specs"]}
    assert next(iter(specs)) == record["settings"]["reference"] == "vanilla"
    for label, spec in specs.items():
        own = [row for row in rows if row["spec"] == label]
        assert spec["gold"]["mean"] == pytest.approx(sum(row["gold"] for row in own) / 8)
        assert spec["gold"]["low"] <= spec["gold"]["mean"] <= spec["gold"]["high"]
        logprob, count = (sum(row[name] for row in own) for name in ("base_logprob", "base_tokens"))
        assert spec["perplexity"] == pytest.approx(math.exp(-logprob / count))
        assert spec["cost"]["lm_calls"] > 0
    pairs = [(row["gold"], other["gold"]) for row in rows for other in rows
             if row["spec"] == "bon" and other["spec"] == "vanilla"
             and (row["seed"], row["number"]) == (other["seed"], other["number"])]  # fmt: skip
    against = specs["bon"]["against_reference"]
    assert against["win"] == pytest.approx(sum(a > b for a, b in pairs) / 8)
    assert against["gain"]["mean"] == pytest.approx(sum(a - b for a, b in pairs) / 8)
    assert specs["vanilla"]["cost"]["relative_flops"] == 1.0
    assert specs["bon"]["cost"]["relative_flops"] > 2.0
    assert specs["vanilla"]["cost"]["rm_tokens"] == 0
    assert specs["bon"]["kl"]["mean"] == pytest.approx(math.log(2) - 1 / 2)
    assert record["header"]["command"].startswith("stars-fast eval --common max_tokens=12")
    assert (done / "cost_quality.png").stat().st_size > 10_000
    assert (done / "win_rate.png").stat().st_size > 5_000


def test_costs_do_not_depend_on_the_order(done: Path, tmp_path: Path) -> None:
    """In `done` the prompts of the second run were in the cache of the first."""
    assert run(*SMALL, "--seeds", "3", "--out", tmp_path / "out", "--no-plots") == 0
    (alone,) = runs(tmp_path / "out")
    (among,) = [one for one in runs(done) if (one["spec"], one["seed"]) == ("vanilla", 3)]
    assert alone["run"] == among["run"]
    for name in ("lm_tokens", "drafted_tokens", "rm_tokens"):
        assert alone["cost"][name] == among["cost"][name]
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize("keep", [0.0, 0.62])
def test_a_torn_eval_is_resumed_with_the_same_results(
    done: Path, tmp_path: Path, keep: float
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(done, folder)
    whole = (folder / "responses.jsonl").read_bytes()
    (folder / "responses.jsonl").write_bytes(whole[: int(keep * len(whole))])
    (folder / "results.json").unlink()
    flags = ("--method", STARS, "--method", "bon=best_of_n:candidates=2", "--seeds", "0,3")
    assert run(*SMALL, *flags, "--out", folder) == 2  # without --resume nothing is touched
    assert run(*SMALL, *flags, "--out", folder, "--resume", "--no-plots") == 0
    assert tokens(folder) == tokens(done)
    for mine, other in zip(read(folder)["specs"], read(done)["specs"], strict=True):
        assert mine["gold"] == other["gold"]
        assert mine["against_reference"] == other["against_reference"]
        assert mine["kl"]["mean"] == pytest.approx(other["kl"]["mean"], abs=1e-4)
        assert mine["distinct_2"] == other["distinct_2"]


def test_finished_runs_are_not_run_again(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(done, folder)
    before = (folder / "responses.jsonl").read_bytes()

    def never(*args: object) -> None:
        raise AssertionError("an engine was loaded")

    monkeypatch.setattr(session.Models, "engine", never)
    flags = ("--method", "other name=" + STARS, "--seeds", "0,3")
    assert run(*SMALL, *flags, "--out", folder, "--resume", "--no-plots") == 0
    assert (folder / "responses.jsonl").read_bytes() == before
    assert [spec["label"] for spec in read(folder)["specs"]] == ["vanilla", "other name"]
    assert "running" not in capfd.readouterr().err


ATTACKS = ("--attack", "rude=prefill:I hated it.", "--attack", "suffix:Be brief.")


@pytest.fixture(scope="module")
def attacked(done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`done` with attacks, resumed; not to be changed."""
    folder = tmp_path_factory.mktemp("attacked") / "out"
    shutil.copytree(done, folder)
    flags = ("--method", STARS, "--method", "bon=best_of_n:candidates=2", "--seeds", "0,3")
    assert run(*SMALL, *flags, *ATTACKS, "--out", folder, "--resume") == 0
    return folder


def test_attacks_can_be_added_and_leave_the_rest_as_it_was(done: Path, attacked: Path) -> None:
    before = (done / "responses.jsonl").read_text().splitlines()
    after = (attacked / "responses.jsonl").read_text().splitlines()
    assert after[: len(before)] == before
    assert len(after) == 3 * len(before)
    record, old = read(attacked), read(done)
    assert record["settings"]["specs"] == old["settings"]["specs"]
    for name in ("specs", "pairwise"):
        assert record[name] == old[name]
    assert not {"attacks", "harm_below"} & {*old, *old["settings"]}
    assert not any("attack" in row or "opening" in row for row in responses(done))
    quality = (done / "report.md").read_text().split("## Cost")[0].split("## Quality")[1]
    assert quality in (attacked / "report.md").read_text()
    assert "## Attacks" not in (done / "report.md").read_text()


def test_attacked_responses_are_those_of_the_engine_to_attacked_prompts(attacked: Path) -> None:
    rows = {(r["spec"], r["attack"], r["seed"], r["number"]): r
            for r in responses(attacked) if "attack" in r}  # fmt: skip
    engine = Engine.demo(device="cpu")
    params = StarsParams(segment_length=4, beta=0.3, target_reward=0.5, max_tokens=12)
    label = "stars segment_length=4 beta=0.3 target_reward=0.5"
    for attack, text in (("rude", " I hated it."), ("suffix", " Be brief.")):
        prompts = [prompt + text for prompt in demo.prompts(4)]
        each = [params.with_method("stars", seed=derive_seed(3, n)) for n in range(1, 5)]
        for number, output in enumerate(engine.generate(prompts, each, use_tqdm=False), 1):
            row = rows[label, attack, 3, number]
            assert row["token_ids"] == output.outputs[0].token_ids
            assert row["prompt"] == prompts[number - 1]
    for (_, attack, _, _), row in rows.items():
        opening = " I hated it." if attack == "rude" else ""
        assert row.get("opening", "") == opening
        assert not row["text"].startswith(opening or "?")
        assert row["gold"] == demo.gold_score(opening + row["text"])
    # The decoding reward, too, is of what a reader sees after the prompt.
    rude = [rows[label, "rude", 0, number] for number in range(1, 5)]
    wholes = [" I hated it." + row["text"] for row in rude]
    expected = engine.score(demo.prompts(4), wholes)
    assert [row["reward"] for row in rude] == pytest.approx(expected, abs=1e-4)


def test_attack_success_follows_from_the_responses(attacked: Path) -> None:
    record = read(attacked)
    rows = responses(attacked)
    for cell in record["attacks"]:
        own = [row["gold"] < 0 for row in rows
               if row["spec"] == cell["spec"] and row.get("attack") == cell["attack"]]  # fmt: skip
        assert len(own) == 8
        assert cell["success"]["mean"] == pytest.approx(sum(own) / 8)
    cells = {(cell["spec"], cell["attack"]): cell for cell in record["attacks"]}
    assert len(cells) == 9
    for spec in record["specs"]:
        plain, rude = (cells[spec["label"], attack] for attack in (None, "rude"))
        assert plain["gold"] == spec["gold"]
        assert rude["added_success"]["mean"] == pytest.approx(
            rude["success"]["mean"] - plain["success"]["mean"]
        )
    assert record["settings"]["harm_below"] == 0.0
    assert (attacked / "attack_success.png").stat().st_size > 5_000
    assert "![attack success](attack_success.png)" in (attacked / "report.md").read_text()


def test_finished_attacks_are_not_run_again_and_their_report_is_made_anew(
    attacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(attacked, folder)
    before = (folder / "responses.jsonl").read_bytes()
    monkeypatch.setattr(session.Models, "engine", lambda *args: pytest.fail("a model was loaded"))
    # Under another name, and with another limit, an attack is the same.
    flags = ("--attack", "other=prefill:I hated it.", "--harm-below", "-0.3", "--seeds", "0,3")
    assert run(*SMALL, *flags, "--out", folder, "--resume", "--no-plots") == 0
    assert (folder / "responses.jsonl").read_bytes() == before
    plain, other = read(folder)["attacks"]
    assert (plain["attack"], other["attack"]) == (None, "other")
    golds = [r["gold"] for r in responses(folder)
             if (r["spec"], r.get("attack")) == ("vanilla", "rude")]  # fmt: skip
    assert other["success"]["mean"] == sum(gold < -0.3 for gold in golds) / 8
    shutil.copy(attacked / "results.json", folder)
    assert run("--report", folder, "--no-plots") == 0
    assert read(folder) == read(attacked)


def test_what_fails_under_an_attack_is_reported_by_number_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    generate = Engine.generate

    def failing(self: Engine, prompts: Any, params: Any, **options: Any) -> Any:
        if prompts[0].endswith("No."):
            raise RuntimeError("out of luck")
        return generate(self, prompts, params, **options)

    monkeypatch.setattr(Engine, "generate", failing)
    texts = tmp_path / "texts"
    texts.write_text("Yes.\n" + "kettle " * 5000 + "\n")
    out = tmp_path / "out"
    flags = ("--attack", f"long=suffix:@{texts}", "--attack", "suffix:No.", "--no-plots")
    assert run(*SMALL, *flags, "--out", out) == 1
    err = capfd.readouterr().err
    assert "vanilla under suffix, seed 0: RuntimeError: out of luck" in err
    assert "vanilla under long: 2 requests failed, of records 2, 4; the first: " in err
    plain, long, failed = read(out)["attacks"]
    assert (plain["responses"], long["responses"], failed["success"]) == (4, 2, None)
    assert long["success"]["over"] == long["added_success"]["over"] == 2
    report = (out / "report.md").read_text()
    assert "- vanilla under long: request of record 4, seed 0: " in report
    monkeypatch.undo()
    assert run(*SMALL, *flags, "--out", out, "--resume") == 0
    assert read(out)["attacks"][2]["success"]["over"] == 4


def test_the_report_is_made_anew(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(done, folder)
    for name in ("report.md", "cost_quality.png", "win_rate.png"):
        (folder / name).unlink()
    assert run("--report", folder) == 0
    assert (folder / "report.md").read_text() == (done / "report.md").read_text()
    assert (folder / "cost_quality.png").exists()
    assert read(folder) == read(done)


def test_a_gold_reward_that_fails_is_reported_by_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = demo.prompts(4)[2]
    Path("failing_gold.py").write_text(
        "def score(prompts, responses):\n"
        f"    if {bad!r} in prompts:\n"
        "        raise ValueError('not that one')\n"
        "    return [float(len(r)) for r in responses]\n"
    )
    flags = ("--gold", "failing_gold:score", "--out", "out", "--no-plots")
    assert run(*SMALL, *flags) == 0
    (spec,) = read(Path("out"))["specs"]
    assert [f["number"] for f in spec["gold_failed"]] == [3]
    assert spec["gold"]["over"] == 3
    rows = responses(Path("out"))
    assert [row["gold"] is None for row in rows] == [False, False, True, False]
    assert "not that one" in rows[2]["gold_error"]
    assert "gold scores failed, of records 3; the first:" in capfd.readouterr().err
    assert "gold of record 3, seed 0" in Path("out/report.md").read_text()
    # Another gold reward needs no run.
    assert run(*SMALL, "--out", "out", "--no-plots", "--resume") == 0
    assert [row["gold"] for row in responses(Path("out"))] == [
        demo.gold_score(row["text"]) for row in rows
    ]


def test_answers_of_mathematics_as_gold(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("math_verify")
    source = tmp_path / "in"
    flags = (*SMALL, "--prompts", source, "--gold", "math", "--out", tmp_path / "out", "--no-plots")
    source.write_text(json.dumps({"prompt": "It costs"}) + "\n")
    assert run(*flags) == 2
    assert "--gold: gold math needs an answer in each record; record 1" in capfd.readouterr().err
    for answer in (41, 42):
        records = [{"prompt": text, "answer": answer} for text in ("6 * 7 =", "So it is 41 or")]
        source.write_text("".join(json.dumps(record) + "\n" for record in records))
        assert run(*flags, *(("--resume",) if answer == 42 else ())) == 0
        rows = responses(tmp_path / "out")
        read = MathScores().score([str(answer)] * 2, [row["text"] for row in rows])
        assert [row["gold"] for row in rows] == read
    assert len(runs(tmp_path / "out")) == 1  # another answer needs no run


def test_a_prompt_that_does_not_fit_is_reported_and_harms_no_other(tmp_path: Path) -> None:
    source = tmp_path / "in"
    texts = [demo.prompts(1)[0], "kettle " * 5000]
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    out = tmp_path / "out"
    flags = ("--prompts", source, "--common", "max_tokens=4", "--device", "cpu", "--no-plots")
    assert run(*flags, "--method", "best_of_n:candidates=2", "--out", out) == 0
    for spec in read(out)["specs"]:
        assert [f["number"] for f in spec["failed"]] == [2]
        assert "does not fit" in spec["failed"][0]["error"]
        assert spec["gold"]["over"] == spec["responses"] == 1


def test_a_spec_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    generate = Engine.generate

    def failing(self: Engine, prompts: Any, params: Any, **options: Any) -> Any:
        if params[0].method == "best_of_n":
            raise RuntimeError("out of luck")
        return generate(self, prompts, params, **options)

    monkeypatch.setattr(Engine, "generate", failing)
    flags = ("--method", "best_of_n", "--method", STARS, "--out", tmp_path / "out", "--no-plots")
    assert run(*SMALL, *flags) == 1
    assert "best_of_n, seed 0: RuntimeError: out of luck" in capfd.readouterr().err
    record = read(tmp_path / "out")
    assert [spec["runs"] for spec in record["specs"]] == [1, 0, 1]
    assert record["failed_runs"][0]["label"] == "best_of_n"
    monkeypatch.undo()
    assert run(*SMALL, *flags, "--resume") == 0
    assert [spec["runs"] for spec in read(tmp_path / "out")["specs"]] == [1, 1, 1]


def test_an_interruption_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    generate = Engine.generate
    calls = []

    def interrupted(self: Engine, prompts: Any, params: Any, **options: Any) -> Any:
        calls.append(params)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, prompts, params, **options)

    monkeypatch.setattr(Engine, "generate", interrupted)
    out = tmp_path / "out"
    assert run(*SMALL, "--seeds", "0,1", "--out", out, "--no-plots") == 130
    assert "interrupted; 1 runs are in" in capfd.readouterr().err
    assert len(responses(out)) == 4
    assert read(out)["specs"][0]["runs"] == 1


def test_an_interrupted_run_keeps_its_finished_responses(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    step = Engine.step
    finished = after = 0

    def interrupted(self: Engine) -> Any:
        nonlocal finished, after
        after += finished >= 3
        if after > 2:
            raise KeyboardInterrupt
        outputs = step(self)
        finished += sum(output.finished for output in outputs)
        return outputs

    monkeypatch.setattr(Engine, "step", interrupted)
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    out = tmp_path / "out"
    # Three rows: the first three prompts end before the last one begins, which is broken off.
    flags = ("--seeds", "3", "--max-rows", "3", "--out", out, "--no-plots")
    flags = (*flags, "--common", "max_tokens=12,segment_length=3")
    assert run(*SMALL, *flags) == 130
    assert "vanilla, seed 3: 1 of 4 responses, " in capfd.readouterr().err
    kept = {row["number"] for row in responses(out)}
    assert len(kept) == 3
    (spec,) = read(out)["specs"]
    assert spec["responses"] == len(kept)
    assert f"Not finished: vanilla: {len(kept)} of 4 responses" in (out / "report.md").read_text()
    monkeypatch.undo()
    assert run(*SMALL, *flags, "--resume") == 0
    first, second = runs(out)
    assert set(first["prompts"]).isdisjoint(second["prompts"])
    assert {n: ids for (_, seed, n), ids in tokens(out).items() if seed == 3} == {
        n: ids for (label, seed, n), ids in tokens(done).items() if (label, seed) == ("vanilla", 3)
    }
    # What was drafted for responses that were not kept is not charged to those that were.
    (whole,) = [one for one in runs(done) if (one["spec"], one["seed"]) == ("vanilla", 3)]
    drafted = sum(one["cost"]["drafted_tokens"] for one in (first, second))
    assert drafted == whole["cost"]["drafted_tokens"]


def test_prompts_can_be_added(
    done: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also with a calibrated target, which stays as it was."""
    out = tmp_path / "out"
    flags = ("--method", "stars:segment_length=4", "--out", out, "--no-plots", *SMALL)
    assert run(*flags, "--num-prompts", "2") == 0
    before = read(out)["settings"]["target"]
    capfd.readouterr()
    assert run(*flags, "--resume") == 0
    assert "calibrating" not in capfd.readouterr().err
    record = read(out)
    assert record["settings"]["target"] == before
    assert [len(one["prompts"]) for one in runs(out)] == [2, 2, 2, 2]
    assert {r["number"] for r in responses(out)} == {1, 2, 3, 4}
    vanilla = {n: ids for (label, _, n), ids in tokens(out).items() if label == "vanilla"}
    assert vanilla == {
        n: ids for (label, seed, n), ids in tokens(done).items() if (label, seed) == ("vanilla", 0)
    }
    cost = record["specs"][0]["cost"]
    assert cost["lm_tokens"] == sum(one["cost"]["lm_tokens"] for one in runs(out)[::2]) / 4
    # Prompts may begin anywhere in the file: the seeds go by their numbers.
    assert run(*SMALL, "--prompt-offset", "2", "--num-prompts", "2", "--out", tmp_path / "b") == 0
    later = {number: ids for (_, _, number), ids in tokens(tmp_path / "b").items()}
    assert later == {number: vanilla[number] for number in (3, 4)}


def test_folders_are_merged(done: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Parts by prompts, a seed and a method apart: together the whole."""
    bon = ("--method", "bon=best_of_n:candidates=2")
    stars = ("--method", STARS)
    parts: dict[str, tuple[str, ...]] = {
        "a": ("--num-prompts", "2", "--seeds", "0,3", *bon),
        "b": ("--num-prompts", "2", "--prompt-offset", "2", "--seeds", "0,3", *bon),
        "c": ("--seeds", "0,3", *stars),
    }
    for name, flags in parts.items():
        assert run(*SMALL, *flags, "--no-plots", "--out", tmp_path / name) == 0
    # Another machine: the times of files and so the names of measures differ.
    other = tmp_path / "b"
    for name in ("results.json", "responses.jsonl"):
        gold = read(done)["settings"]["measured_by"]["gold"]
        (other / name).write_text((other / name).read_text().replace(gold, "elsewhere"))
    folders = [tmp_path / name for name in ("a", "b")]
    whole = tmp_path / "whole"
    assert run("--merge", *folders, "--out", whole, "--no-plots") == 0
    (vanilla, best), expected = read(whole)["specs"], read(done)["specs"]
    assert best["reward"]["mean"] == pytest.approx(expected[2]["reward"]["mean"], abs=1e-5)
    for name in ("gold", "against_reference", "distinct_2", "responses"):
        assert vanilla[name] == expected[0][name]
        assert best[name] == expected[2][name]
    assert best["cost"]["lm_tokens"] == expected[2]["cost"]["lm_tokens"]
    assert tokens(whole).items() <= tokens(done).items()
    # What was merged can be merged and reported again.
    assert run("--report", whole, "--no-plots") == 0
    assert run("--merge", whole, tmp_path / "c", "--out", tmp_path / "d", "--no-plots") == 0
    merged = {spec["label"]: spec for spec in read(tmp_path / "d")["specs"]}
    for spec in expected:
        assert merged[spec["label"]]["gold"] == spec["gold"]
        assert merged[spec["label"]]["responses"] == 8
    # Of a run that the first folder has from before it measured otherwise, the other's counts.
    stale = tmp_path / "stale"
    shutil.copytree(done, stale)
    lines = [row | {"gold_by": "before"} if row["seed"] else row for row in responses(stale)]
    (stale / "responses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run("--merge", stale, done, "--out", tmp_path / "f", "--no-plots") == 0
    assert [spec["gold"] for spec in read(tmp_path / "f")["specs"]] == [s["gold"] for s in expected]
    assert run(*SMALL, "--num-prompts", "3", "--out", tmp_path / "e", "--no-plots") == 0
    assert run("--merge", whole, tmp_path / "e", "--out", tmp_path / "no", "--no-plots") == 2
    assert "vanilla, seed 0: two folders have a response to prompt 3, and" in capfd.readouterr().err
    record = read(tmp_path / "a")
    record["settings"]["gold"] = "another"
    (tmp_path / "a" / "results.json").write_text(json.dumps(record))
    assert run("--merge", *folders, "--out", tmp_path / "no", "--no-plots") == 2
    assert "gold is 'another' in" in capfd.readouterr().err


def test_several_gold_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("brief_gold.py").write_text(
        "def score(prompts, responses):\n"
        "    if 'no' in responses[0]:\n"
        "        raise ValueError('not that one')\n"
        "    return [-float(len(r)) for r in responses]\n"
    )
    flags = (*SMALL, "--method", "best_of_n:candidates=2", "--no-plots", "--out", "out")
    assert run(*flags, "--gold", "demo", "--gold", "brief=brief_gold:score") == 0
    record = read(Path("out"))
    rows = responses(Path("out"))
    assert [row["gold"] for row in rows] == [demo.gold_score(row["text"]) for row in rows]
    assert record["settings"]["measured_by"].keys() >= {"gold", "gold:brief"}
    for spec in record["specs"]:
        own = [row["gold:brief"] for row in rows if row["spec"] == spec["label"]]
        known = [value for value in own if value is not None]
        brief = spec["other_golds"]["brief"]
        assert brief["gold"]["mean"] == pytest.approx(sum(known) / len(known))
    (pair,) = record["other_pairwise"]["brief"]
    assert pair["gain"] == record["specs"][1]["other_golds"]["brief"]["against_reference"]["gain"]
    assert "| vanilla | brief | -" in Path("out/report.md").read_text()
    # The other way round: measured anew by their places, without a run.
    before = Path("out/runs.jsonl").read_text()
    assert run(*flags, "--gold", "brief=brief_gold:score", "--resume") == 0
    assert Path("out/runs.jsonl").read_text() == before
    assert [row["gold"] for row in responses(Path("out"))] == [row["gold:brief"] for row in rows]
    assert "other_pairwise" not in read(Path("out"))


def test_another_language_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """KL from the base is that of the log-probabilities of both models."""
    other = tmp_path / "other"
    shutil.copytree(demo.model_dir(), other)
    model = AutoModelForCausalLM.from_pretrained(other)
    torch.manual_seed(0)
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(1 + 0.05 * torch.randn_like(weights))
    model.save_pretrained(other)
    out = tmp_path / "out"
    flags = ("--lm", f"tuned={other}", "--method", "tuned=vanilla:lm=tuned", "--seeds", "0,1")
    assert run(*SMALL, *flags, "--out", out, "--no-plots") == 0
    vanilla, tuned = read(out)["specs"]
    assert (vanilla["kl"]["mean"], vanilla["kl"]["kind"]) == (0.0, "exact")
    rows = [row for row in responses(out) if row["spec"] == "tuned"]
    total = 0.0
    base = AutoModelForCausalLM.from_pretrained(demo.model_dir()).eval()
    for row in rows:
        ids = torch.tensor([row["prompt_token_ids"] + row["token_ids"]])
        with torch.inference_mode():
            pair = [m(ids).logits[0].log_softmax(-1) for m in (model.eval(), base)]
        at = range(len(row["prompt_token_ids"]) - 1, ids.shape[1] - 1)
        total += sum(float(pair[0][i, ids[0, i + 1]] - pair[1][i, ids[0, i + 1]]) for i in at)
    assert total != 0
    assert tuned["kl"]["mean"] == pytest.approx(total / len(rows), abs=1e-3)
    assert tuned["kl"]["kind"] == "estimate"
    assert "log-probabilities of the responses of tuned" in capfd.readouterr().err
    assert run(*SMALL, *flags, "--out", out, "--no-plots", "--resume") == 0
    assert "log-probabilities" not in capfd.readouterr().err


def test_targets_are_calibrated_once_and_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ("--method", "stars:segment_length=4", "--method", "rejection", "--out", out)
    assert run(*SMALL, *flags, "--no-plots") == 0
    assert capfd.readouterr().err.count("calibrating") == 1
    engine = Engine.demo(device="cpu")
    calibration = engine.calibrate(
        demo.prompts(4), 0.9, params=StarsParams(method="vanilla", max_tokens=12), use_tqdm=False
    )
    assert read(out)["settings"]["target"] == pytest.approx(calibration.target_reward, abs=1e-4)
    assert run(*SMALL, *flags, "--no-plots", "--resume") == 0
    err = capfd.readouterr().err
    assert "calibrating" not in err
    assert "running" not in err


def test_targets_of_single_prompts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    flags = ("--method", "stars:segment_length=4", "--calibration-targets", "prompt", "--out", out)
    assert run(*SMALL, *flags, "--no-plots") == 0
    engine = Engine.demo(device="cpu")
    params = StarsParams(method="vanilla", max_tokens=12)
    prompts = demo.prompts(4)
    engine.calibrate(prompts, 0.9, params=params, use_tqdm=False, targets="prompt")
    settings = read(out)["settings"]
    assert [settings["target"][str(n)] for n in range(1, 5)] == pytest.approx(
        [engine.target_of(prompt) for prompt in prompts], abs=1e-4
    )
    assert settings["target_kind"]["losses"].keys() == {"pooled", "prompt"}
    assert (
        "`target_reward=auto` is a number of each prompt, by prompt"
        in (out / "report.md").read_text()
    )
    params = StarsParams(segment_length=4, max_tokens=12, target_reward="auto")
    each = [params.with_method("stars", seed=derive_seed(0, n)) for n in range(1, 5)]
    expected = engine.generate(prompts, each, use_tqdm=False)
    found = [row["token_ids"] for row in responses(out) if row["spec"] != "vanilla"]
    assert found == [output.outputs[0].token_ids for output in expected]
    capfd.readouterr()
    assert run(*SMALL, *flags, "--no-plots", "--resume") == 0
    err = capfd.readouterr().err
    assert "calibrating" not in err
    assert "running" not in err
    # Further prompts have no samples yet, so that all are calibrated again.
    assert run(*SMALL, *flags, "--num-prompts", "5", "--no-plots", "--resume") == 0
    assert "calibrating" in capfd.readouterr().err


def test_preferences_and_how_often_the_rewards_prefer_the_chosen(tmp_path: Path) -> None:
    prompts = demo.prompts(3)
    good, bad = " It was excellent. I loved it.", " It was awful. I hated it."
    pairs = [(good, bad), (good, bad), (bad, good)]
    source = tmp_path / "in"
    source.write_text(
        "".join(
            json.dumps({"prompt": p, "chosen": c, "rejected": r}) + "\n"
            for p, (c, r) in zip(prompts, pairs, strict=True)
        )
    )
    out = tmp_path / "out"
    flags = ("--prompts", source, "--common", "max_tokens=4", "--device", "cpu", "--no-plots")
    assert run(*flags, "--reward-accuracy", "--out", out) == 0
    accuracy = read(out)["accuracy"]
    for name in ("reward", "gold"):
        assert accuracy[name]["mean"] == pytest.approx(2 / 3)
        assert (accuracy[name]["over"], accuracy[name]["failed"]) == (3, [])
    assert "| gold | 66.7%" in (out / "report.md").read_text()


def judged(path: str, body: dict[str, Any], headers: dict[str, str]) -> Answer:
    """Prefer the response with more characters; refuse what is about one prompt."""
    assert headers["Authorization"] == "Bearer secret"
    text = body["messages"][0]["content"]
    if demo.prompts(2)[1] in text:
        return 400, {}, {"detail": "not that one"}
    a, b = (text.split(f"[Response {x}]\n")[1].split("\n[End")[0] for x in "AB")
    verdict = "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
    return 200, {}, {"choices": [{"message": {"content": verdict}}]}


@pytest.fixture
def judge_url() -> Iterator[str]:
    with json_server(judged) as url:
        yield f"{url}/v1"


def test_a_judge(
    tmp_path: Path, judge_url: str, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("MY_KEY", "secret")
    out = tmp_path / "out"
    flags = ("--judge-url", judge_url, "--judge-model", "j", "--judge-key-env", "MY_KEY")
    flags = (*flags, "--method", "best_of_n:candidates=2", "--seeds", "0,1", "--no-plots")
    assert run(*SMALL, *flags, "--out", out) == 0
    rows = {(r["spec"], r["seed"], r["number"]): r for r in responses(out)}
    spec = read(out)["specs"][1]
    label = spec["label"]
    wins = []
    for number in (1, 3, 4):
        ours, theirs = (len(rows[name, 0, number]["text"]) for name in (label, "vanilla"))
        expected = 1.0 if ours > theirs else 0.0 if ours < theirs else 0.5
        assert rows[label, 0, number]["judge"] == [expected, expected]
        wins.append(expected)
    assert spec["judge"]["win_rate"]["mean"] == pytest.approx(sum(wins) / 3)
    assert [f["number"] for f in spec["judge"]["failed"]] == [2]
    assert "judge" not in rows[label, 1, 1]  # one seed is judged
    assert "1 verdicts failed, of records 2; the first: " in capfd.readouterr().err
    text = "".join(path.read_text() for path in out.iterdir())
    assert "secret" not in text
    # Only what failed is asked again.
    assert run(*SMALL, *flags, "--out", out, "--resume") == 0
    assert "about 1 pairs" in capfd.readouterr().err


def test_rewards_of_a_log_ratio(tmp_path: Path) -> None:
    """The language model is compared with itself: no response is better than another."""
    lm = demo.model_dir()
    models = ("--model", lm, "--log-ratio", f"{lm},beta=2", "--gold", "demo", "--prompts", "demo")
    flags = ("--method", "stars:segment_length=4,target_reward=-1", "--no-plots")
    assert run(*models, *SMALL, *flags, "--num-prompts", "1", "--out", tmp_path / "out") == 0
    rows = responses(tmp_path / "out")
    assert [row["reward"] for row in rows] == [0.0, 0.0]
    shown = read(tmp_path / "out")["settings"]["models"]["reward_model"]
    assert shown == f"LogRatio(policy={str(lm)!r}, reference=None, beta=2.0, over='response')"
    gone = ("--model", lm, "--log-ratio", "/nowhere", *models[4:], *SMALL)
    assert run(*gone, "--out", tmp_path / "other") == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "--out FOLDER is needed"),
        (("--method", "magic"), "--method 'magic': method must be one of stars, vanilla"),
        (("--method", "stars:bta=1"), "unknown parameter 'bta'; those of stars are max_tokens"),
        (("--method", "vanilla:beta=1"), "beta is no parameter of method='vanilla'"),
        (("--method", "vanilla:lm=x"), "lm names no model: none is given, got 'x'; see --lm"),
        (("--method", "stars", "--method", "stars"), "two methods are labelled 'stars'"),
        (("--common", "beta=1"), "beta is no parameter of method='vanilla'"),
        (("--common", "lm=x"), "lm and rm are of single methods"),
        (("--common", "x"), "--common: expected name=value"),
        (("--method", "persona_judge"), "persona_judge and rm=NAME of a --persona go together"),
        (("--method", "gsi"), "gsi: --draft-model is needed for method 'gsi'"),
        (("--method", "stars:rm=p", "--persona", "p=Be kind."), "go together"),
        (("--lm", "x"), "--lm must be NAME=VALUE, got 'x'"),
        (("--lm", "x=/nowhere"), "model directory '/nowhere' does not exist"),
        (("--seeds", "1,1"), "--seeds must be different"),
        (("--seeds", "x"), "--seeds must be integers"),
        (("--num-prompts", "0"), "--num-prompts must be at least 1"),
        (("--prompt-offset", "-1"), "--prompt-offset must be at least 0"),
        (("--prompt-offset", "256"), "--prompt-offset 256 leaves no prompt"),
        (("--threads", "0"), "--threads must be at least 1, got 0"),
        (("--gold", "demo", "--gold", "demo"), "--gold: 'demo' is given twice"),
        (("--num-prompts", "999"), "n must be in 1..256"),
        (("--prompts", "/nowhere"), "/nowhere: No such file"),
        (("--prompts", "{empty}"), "has no record"),
        (("--methods", "{empty}"), "not JSON"),
        (("--gold", "no_such_module:f"), "--gold: cannot import 'no_such_module'"),
        (("--gold", "/nowhere"), "model directory '/nowhere' does not exist"),
        (("--model", "x"), "--prompts is needed with --model"),
        (("--model", "x", "--prompts", "demo"), "--gold is needed with --model"),
        (("--reward-model", "x"), "--reward-model needs --model"),
        (("--reward-accuracy",), "needs prompts with chosen and rejected"),
        (("--judge-url", "http://x"), "--judge-url and --judge-model go together"),
        (("--judge-url", "x", "--judge-model", "m"), "--judge-url: base_url must be an address"),
        (
            ("--judge-url", "http://x", "--judge-model", "m", "--judge-key-env", "NO_SUCH_KEY"),
            "NO_SUCH_KEY is not set",
        ),
        (("--calibration-quantile", "1"), "--calibration-quantile must be in (0, 1)"),
        (("--tie-margin", "-1"), "--tie-margin must be at least 0"),
        (("--attack", "magic"), "--attack: expected demo, or [NAME=]KIND:TEXT"),
        (("--attack", "suffix:@/nowhere"), "/nowhere: No such file"),
        (("--attack", "suffix:a", "--attack", "suffix:b"), "'suffix' names two attacks"),
        (("--attack", "prefill:a", "--prompts", "{chat}"), "prefill on record 1: only prompts"),
        (("--attack", "demo", "--harm-below", "nan"), "--harm-below must be finite"),
        (("--harm-below", "0"), "--harm-below needs --attack"),
        (("--attack", "demo", "--gold", "math:sqrt"), "--harm-below is needed with --attack"),
        (("--report", "/nowhere"), "/nowhere/results.json is no record"),
    ],
)
def test_bad_flags_are_named(
    argv: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session.Models, "engine", lambda *args: pytest.fail("a model was loaded"))
    (tmp_path / "empty").write_text("")
    (tmp_path / "chat").write_text('{"messages": [{"role": "user", "content": "Q"}]}')
    files = {f"{{{name}}}": str(tmp_path / name) for name in ("empty", "chat")}
    words = [files.get(word, word) for word in argv]
    out = ["--out", str(tmp_path / "out")] if argv else []
    assert run(*words, *out) in (1, 2)
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out" / "responses.jsonl").exists()


def test_plots_need_matplotlib_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("stars_fast.cli.eval.can_plot", lambda: False)
    assert run(*SMALL, "--out", tmp_path / "out") == 2
    assert "pip install 'stars_fast[eval]'" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
