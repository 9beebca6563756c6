"""The file that keeps a run's target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stars_fast.cli.calibration import Sidecar, sidecar_of
from stars_fast.cli.errors import UsageError
from stars_fast.outputs import Calibration

SETTINGS = {"model": "lm", "top_p": 0.9, "stop": ["END"]}
CALIBRATION = Calibration(0.1 + 0.2, {0.5: -1.0, 0.9: 0.1 + 0.2}, (-1.0, 0.1 + 0.2))


def test_it_lies_beside_the_output() -> None:
    assert sidecar_of(Path("a/out.jsonl")) == Path("a/out.jsonl.calibration.json")


def test_the_target_comes_back_to_the_bit(tmp_path: Path) -> None:
    sidecar = Sidecar(tmp_path / "c.json", SETTINGS)
    assert sidecar.read() is None
    sidecar.write(CALIBRATION)
    assert sidecar.read() == CALIBRATION.target_reward
    assert list(tmp_path.iterdir()) == [sidecar.path]


@pytest.mark.parametrize(
    ("name", "value"), [("model", "lm2"), ("top_p", 1.0), ("stop", []), ("seed", 1)]
)
def test_other_settings_are_named(tmp_path: Path, name: str, value: object) -> None:
    path = tmp_path / "c.json"
    Sidecar(path, SETTINGS).write(CALIBRATION)
    with pytest.raises(UsageError, match=f"calibrated with {name} "):
        Sidecar(path, {**SETTINGS, name: value}).read()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"target_reward": "x", "settings": {}}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"c.json is damaged"):
        Sidecar(path, SETTINGS).read()


def test_people_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    Sidecar(path, SETTINGS).write(CALIBRATION)
    assert json.loads(path.read_text()) == {
        "target_reward": CALIBRATION.target_reward,
        "quantiles": {"0.5": -1.0, "0.9": CALIBRATION.target_reward},
        "settings": SETTINGS,
    }
