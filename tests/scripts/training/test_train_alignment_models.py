"""One script for all models: in order, skipping what is there, nothing half-made left as made."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_alignment_models import gold_of_models, run, steps


def test_order_is_that_of_dependence() -> None:
    assert list(steps(Path("out"), 0)) == ["sft", "dpo", "value", "acceptor"]


def test_what_is_there_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made: list[str] = []

    def make(path: Path) -> None:
        made.append(path.name)
        path.mkdir()

    def fail(path: Path) -> None:
        path.mkdir()
        raise RuntimeError("no")

    run({"a": make}, tmp_path)
    with pytest.raises(RuntimeError, match="no"):
        run({"a": make, "b": fail}, tmp_path)
    assert made == ["a.unfinished"]
    assert (tmp_path / "a").is_dir()
    assert not (tmp_path / "b").exists()
    assert "a: there already" in capsys.readouterr().out


def test_gold_is_of_the_models_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train_alignment_models.GOLD_PROMPTS", 4)
    monkeypatch.setattr("train_alignment_models.GOLD_SAMPLES", 1)
    gold = gold_of_models(tmp_path)
    assert list(gold) == ["base"]
    assert -1.0 < gold["base"]["gold"] < 1.0
