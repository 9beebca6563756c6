"""The paper's script: its steps, its targets, and its small form."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from stars_fast.benchmarks import paper
from stars_fast.benchmarks.least import Machine
from stars_fast.benchmarks.models import LLAMA_2_7B, TINY, language_model, reward_model
from stars_fast.benchmarks.paper_bench import Bench
from stars_fast.benchmarks.paper_steps import CENTRE, Cell, Step, judged, steps

MACHINE = Machine("made up", 1e9, 1e9)
FAST = {
    "centre": {"accepted_tokens_per_second": 4600.0, "share_of_the_least": 0.59},
    "overhead": {"over": 0.1, "stars": {"accepted_tokens_per_second": 1.0}},
    "first segment": {"over": 0.151},
    "baselines": {"times_a": 50.0, "times_b": 7.9},
}


def met(recorded: dict[str, Any]) -> list[bool | None]:
    return [target["met"] for target in judged(recorded)]


def test_targets_are_met_missed_or_not_measured() -> None:
    assert met(FAST) == [True, False, True, False, True, False, None, None]
    assert met({}) == [None] * 8
    assert met({**FAST, "centre": {"failed": "OutOfMemoryError: 80 GB"}}) == [
        None, None, True, False, True, False, None, None,
    ]  # fmt: skip
    assert met({"centre": {"accepted_tokens_per_second": 4599.9, "share_of_the_least": 0.6}}) == [
        False, True, *[None] * 6,
    ]  # fmt: skip


def test_targets_are_shown_beside_what_was_measured() -> None:
    shown = paper.targets_table(judged(FAST)).splitlines()
    assert "at least 4600" in shown[0]
    assert shown[0].endswith("4600  met")
    assert shown[1].endswith("0.59  missed")
    assert paper.targets_table(judged({})).count("not measured") == 8


def test_steps_leave_the_centre_along_one_axis() -> None:
    made = steps()
    assert made[0] == Step("centre", CENTRE)
    kinds = ["vanilla", "first segment", "overhead", "baselines"]
    assert [step.kind for step in made[1:5]] == kinds
    assert len({step.name for step in made}) == len(made)
    centre = asdict(CENTRE)
    varied: dict[str, set[Any]] = {}
    for step in made[5:]:
        changed = {k: v for k, v in asdict(step.cell).items() if v != centre[k]}
        assert step.kind == "stars"
        assert (
            set(changed) <= {"language", "reward"}
            or set(changed) <= {"batch", "requests"}
            or (len(changed) == 1)
        )
        for key, value in changed.items():
            varied.setdefault(key, set()).add(value)
    assert varied == {
        "language": {"1B", "8B"},
        "reward": {"1B", "8B"},
        "batch": {1, 16, 256},
        "requests": {16, 256},
        "segment_length": {8, 30, 60},
        "max_tokens": {1024},
        "prompt": {2048},
        "candidates": {1, 4, 8},
        "acceptance": {0.3, 0.8, 1.0},
        "kv_dtype": {"fp8"},
    }


def test_small_cells_stay_apart() -> None:
    # fp8 and the centre differ in what small() keeps; the other axes must not collapse on it.
    small = {step.cell.small() for step in steps() if step.kind == "stars"}
    centre = CENTRE.small()
    assert centre.language == centre.reward == "tiny"
    assert len(small) >= 12
    assert Cell(batch=1, requests=16).small().batch == 1
    assert Cell(segment_length=60).small().segment_length > centre.segment_length


def test_small_mode_runs_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "paper.json"
    names = ["vanilla", "overhead", "candidates 4"]  # other kinds have tests below
    failed = paper.main(["--small", "--out", str(out), "--only", *names])
    printed = capsys.readouterr().out
    assert failed == 0, printed
    for name in names:
        assert f"{name:<16} ran" in printed
    assert "nothing is written" in printed
    assert "tokens/s" not in printed
    assert not out.exists()


def bench() -> Bench:
    return Bench(torch.device("cpu"), MACHINE, small=True)


def test_a_step_has_its_figures() -> None:
    found = bench().measure(Step("centre", Cell(acceptance=1.0)))
    assert "failed" not in found, found
    assert found["acceptance_rate"] == 1.0
    assert found["cell"]["language"] == "tiny"
    wanted = {"accepted_tokens_per_second", "drafted_tokens_per_second", "phases", "pages_used"}
    assert wanted | {"first_segment_seconds_p50", "share_of_the_least"} <= found.keys()
    assert found["pages"] == found["pages_wanted"] > found["pages_used"]
    assert "of the roofline" in paper.line("centre", found)


def test_lone_request_is_set_against_its_parts() -> None:
    found = bench().measure(Step("first segment", Cell(batch=1, acceptance=1.0), "first segment"))
    parts = found["decode_steps_seconds"] + found["reward_pass_seconds"]
    assert found["over"] == pytest.approx(found["first_segment_seconds_p50"] / parts - 1)


def test_baselines_are_set_against_the_engine() -> None:
    found = bench().measure(Step("baselines", Cell(acceptance=0.5), "baselines"))
    assert "failed" not in found, found
    for side in "abcd":
        rate = found["accepted_tokens_per_second"] / found[f"tokens_per_second_{side}"]
        assert found[f"times_{side}"] == pytest.approx(rate)
    assert "times that of (a) " in paper.line("baselines", found)


def test_a_step_that_fails_is_recorded_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(self: Bench, kind: str, cell: Cell) -> dict[str, Any]:
        if kind == "vanilla":
            raise torch.OutOfMemoryError("80 GB are not enough")
        return {"over": 0.05, "stars": FAST["centre"], "vanilla": FAST["centre"]}

    monkeypatch.setattr(Bench, "_measure", measure)
    # As on a machine with a GPU, where figures are written.
    monkeypatch.setattr(paper, "ON_GPU", True)
    monkeypatch.setattr(paper, "ceilings", lambda *_, **__: MACHINE)
    out = tmp_path / "paper.json"
    assert paper.main(["--only", "vanilla", "overhead", "--out", str(out)]) == 1
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["steps"]["vanilla"]["failed"] == "OutOfMemoryError: 80 GB are not enough"
    assert record["steps"]["overhead"]["over"] == 0.05
    assert record["steps"]["overhead"]["cell"]["reward"] == "1B"
    assert [target["met"] for target in record["targets"]] == [None, None, True, *[None] * 5]
    assert record["left_out"] == []
    assert "random" in record["weights"]
    printed = capsys.readouterr().out
    assert "FAILED: OutOfMemoryError" in printed
    assert "0.05  met" in printed


def test_no_step_begins_after_the_budget(capsys: pytest.CaptureFixture[str]) -> None:
    assert paper.main(["--small", "--minutes", "1e-12", "--only", "centre", "vanilla"]) == 0
    assert "left out: centre, vanilla" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--minutes", "0"], "--minutes: must be a number above 0, got '0'"),
        (["--minutes", "soon"], "--minutes: must be a number above 0, got 'soon'"),
        (["--only", "batch 7"], "--only: invalid choice: 'batch 7' (choose from"),
    ],
)
def test_bad_flags(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        paper.main(arguments)
    assert complaint in capsys.readouterr().err


# The models that the benchmarks run on


def test_models_are_made_where_and_in_what_is_asked() -> None:
    for make in (language_model, reward_model):
        model = make(TINY, device="cpu", dtype=torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert torch.get_default_dtype() == torch.float32
        # Rotary frequencies lose positions in less.
        assert {b.dtype for b in model.buffers()} == {torch.float32}


def test_wide_models_in_bfloat16_are_tame() -> None:
    wide = language_model(LLAMA_2_7B, device="meta", dtype=torch.bfloat16)
    assert wide.config.initializer_range == 0.02
    assert language_model(TINY, dtype=torch.bfloat16).config.initializer_range == 0.05
    assert language_model(LLAMA_2_7B, device="meta").config.initializer_range == 0.05


def test_default_models_are_float32_and_the_same_each_time() -> None:
    for make in (language_model, reward_model):
        first, second = make(TINY), make(TINY)
        assert {p.dtype for p in first.parameters()} == {torch.float32}
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(a, b)
