"""Results in files, whatever state an interruption leaves them in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stars_fast.eval.store import RESPONSES, RUNS, DamagedError, Store, read_json, write_json


def rows(run: str, count: int = 3) -> list[dict[str, Any]]:
    return [{"run": run, "number": n, "text": "é\n" * n} for n in range(1, count + 1)]


def filled(folder: Path) -> Store:
    store = Store(folder)
    for run in ("a", "b"):
        store.add({"run": run, "responses": 3}, rows(run))
    return store


def test_what_was_added_is_there(tmp_path: Path) -> None:
    filled(tmp_path / "new")
    again = Store(tmp_path / "new")
    assert again.runs == {name: {"run": name, "responses": 3} for name in ("a", "b")}
    assert again.responses == {"a": rows("a"), "b": rows("b")}


def test_torn_anywhere_whole_runs_stay_and_the_rest_can_be_added_again(tmp_path: Path) -> None:
    filled(tmp_path)
    responses, runs = ((tmp_path / name).read_bytes() for name in (RESPONSES, RUNS))
    first = sum(len(line) for line in responses.splitlines(keepends=True)[:3])
    for length in range(first, len(responses), 7):
        (tmp_path / RESPONSES).write_bytes(responses[:length])
        (tmp_path / RUNS).write_bytes(runs)
        store = Store(tmp_path)
        # The last line may lack its newline and nothing else.
        if length < len(responses) - 1:
            assert list(store.runs) == ["a"]
        store.add({"run": "b", "responses": 3}, rows("b"))
        assert Store(tmp_path).responses == {"a": rows("a"), "b": rows("b")}
        assert (tmp_path / RESPONSES).read_bytes() == responses


def test_a_run_without_its_line_is_not_finished(tmp_path: Path) -> None:
    filled(tmp_path)
    lines = (tmp_path / RUNS).read_bytes().splitlines(keepends=True)
    (tmp_path / RUNS).write_bytes(lines[0] + lines[1][:5])
    store = Store(tmp_path)
    assert list(store.runs) == ["a"]
    store.add({"run": "c", "responses": 1}, rows("c", 1))
    assert list(Store(tmp_path).runs) == ["a", "c"]
    assert b'"b"' not in (tmp_path / RESPONSES).read_bytes()


def test_reading_changes_nothing(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / RESPONSES).write_bytes((tmp_path / RESPONSES).read_bytes()[:-9])
    before = (tmp_path / RESPONSES).read_bytes()
    Store(tmp_path)
    assert (tmp_path / RESPONSES).read_bytes() == before


def test_measurements_are_saved(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.responses["a"][1]["gold"] = 0.5
    store.save()
    assert Store(tmp_path).responses["a"][1]["gold"] == 0.5
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("other", ["{\n", "[]\n", '{"run": "a"}\n'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, other: str) -> None:
    filled(tmp_path)
    path = tmp_path / RESPONSES
    path.write_text(other + path.read_text())
    with pytest.raises(DamagedError, match="responses.jsonl, line 1, is not a result"):
        Store(tmp_path)


def test_json_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    assert read_json(path) == {}
    write_json(path, {"a": [1.5, None]})
    assert read_json(path) == json.loads(path.read_text()) == {"a": [1.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": [1.5, None]}
    path.write_text("[")
    with pytest.raises(DamagedError, match="is damaged"):
        read_json(path)
