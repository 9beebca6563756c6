"""The file that keeps a run's target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stars_fast.cli.calibration import read_target, write_target
from stars_fast.cli.continuation import beside
from stars_fast.cli.errors import UsageError
from stars_fast.outputs import Calibration

CALIBRATION = Calibration(0.1 + 0.2, {0.5: -1.0, 0.9: 0.1 + 0.2}, (-1.0, 0.1 + 0.2))


def test_it_lies_beside_the_output() -> None:
    assert beside(Path("a/out.jsonl"), "calibration") == Path("a/out.jsonl.calibration.json")


def test_the_target_comes_back_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    assert read_target(path) is None
    write_target(path, CALIBRATION)
    assert read_target(path) == CALIBRATION.target_reward
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"target_reward": "x"}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"c.json is damaged"):
        read_target(path)


def test_people_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    write_target(path, CALIBRATION)
    assert json.loads(path.read_text()) == {
        "target_reward": CALIBRATION.target_reward,
        "quantiles": {"0.5": -1.0, "0.9": CALIBRATION.target_reward},
    }
