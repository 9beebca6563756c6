"""Rows of a table as requests, and records in files, without a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stars_fast import StarsParams
from stars_fast.cli.lines import Requests
from stars_fast.cluster.files import read_records, remaining
from stars_fast.cluster.rows import as_rows, read_rows, request_of, rows_of
from stars_fast.records import InputRecord, write_record

PARAMS = StarsParams(target_reward=1.0)
REQUESTS: list[dict[str, Any]] = [
    {"prompt": "one", "id": "a"},
    {"messages": [{"role": "user", "content": "two"}], "params": {"beta": 0.5}},
    {"prompt_token_ids": [3, 4], "id": 7, "params": {"seed": 5}},
]


def test_a_file_gives_the_requests_of_the_command_line(tmp_path: Path) -> None:
    lines = [json.dumps(request).encode() for request in REQUESTS]
    raw = [b"\xef\xbb\xbf" + lines[0], b"  ", lines[1], b"\xff", lines[2], b"[]"]
    path = tmp_path / "in"
    path.write_bytes(b"\n".join(raw))
    unread = iter([*path.read_bytes().splitlines(keepends=True), b""])
    requests = Requests(lambda wait: next(unread), PARAMS, seed=9)
    expected: dict[int, InputRecord | str] = {}
    while (item := requests.take(wait=True)) is not None:
        expected[item.line] = item if isinstance(item, InputRecord) else item.reason
    rows = read_rows(path)
    assert [row["line"] for row in rows] == list(expected) == [1, 3, 4, 5, 6]
    for row in rows:
        want = expected[row["line"]]
        if isinstance(want, InputRecord):
            assert request_of(row, PARAMS, 9) == want
        else:
            with pytest.raises(ValueError, match=r"UTF-8|JSON object"):
                request_of(row, PARAMS, 9)


@pytest.mark.parametrize("form", ["pyarrow", "numpy"])
def test_a_table_gives_the_same_requests(form: str) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow, of the extra ray")
    numbered = as_rows(REQUESTS, first=4)
    plain = [{"line": 4 + i, **request} for i, request in enumerate(REQUESTS)]
    plain[0]["id"] = 6  # a column has one type
    numbered[0]["request"] = numbered[0]["request"].replace(b'"a"', b"6")
    names = ("line", "prompt", "messages", "prompt_token_ids", "id", "params")
    columns = {name: [row.get(name) for row in plain] for name in names}
    table = pyarrow.table(columns)
    assert None in table["id"].to_pylist()
    batch: object = table
    if form == "numpy":
        batch = {name: table[name].to_numpy(zero_copy_only=False) for name in names}
        assert np.isnan(batch["id"][1])
    for rows in (plain, rows_of(batch)):
        requests = [request_of(row, PARAMS, 9) for row in rows]
        assert requests == [request_of(row, PARAMS, 9) for row in numbered]


def test_draws_follow_from_the_line_then_the_id() -> None:
    def seed(run: int = 9, **row: Any) -> int | None:
        return request_of({"prompt": "p", **row}, PARAMS, run).params.seed

    assert seed(line=3, id="a") == seed(line=3, id="b") != seed(line=4, id="a")
    assert seed(id="a") == seed(id="a") != seed(id="b")
    assert len({seed(id=3), seed(id="3"), seed(line=3), seed(run=8, id=3)}) == 4
    assert seed(line=3, params={"seed": 1}) == 1
    with pytest.raises(ValueError, match="needs line, id or params.seed"):
        seed()
    with pytest.raises(ValueError, match="line must be an integer of at least 1, got 0"):
        seed(line=0)


def test_batches_of_another_format_are_refused() -> None:
    with pytest.raises(TypeError, match="batch_format must be 'pyarrow' or 'numpy'"):
        rows_of([1])


def test_files_of_several_runs_hold_each_line_once(tmp_path: Path) -> None:
    rows = as_rows([*REQUESTS, {"prompt": "four"}, {"no": 5}])

    def record(line: int, prompt: Any, id: Any = None, error: str | None = None) -> dict[str, Any]:
        return {"id": id, "line": line, "prompt": prompt, "outputs": [], "error": error}

    failed = record(2, REQUESTS[1]["messages"], error="no reward")
    first = [record(1, "one", "a"), failed]
    write(tmp_path / "b.jsonl", *first)
    with (tmp_path / "b.jsonl").open("ab") as file:
        file.write(json.dumps(record(4, "four")).encode()[:-9])  # torn
    assert [row["line"] for row in remaining(rows, tmp_path)] == [2, 3, 4, 5]
    second = [record(2, REQUESTS[1]["messages"]), record(3, [3, 4], 7), record(1, "one", "a")]
    write(tmp_path / "a.jsonl", *second, record(0, "other"))
    assert read_records(tmp_path) == [second[2], *second[:2], record(0, "other")]
    assert [row["line"] for row in remaining(rows, tmp_path)] == [4, 5]
    with pytest.raises(ValueError, match="input line 1 with another id or prompt"):
        remaining(as_rows([{"prompt": "another"}]), tmp_path)


def write(path: Path, *records: dict[str, Any]) -> None:
    with path.open("wb") as file:
        for record in records:
            write_record(file, record)
