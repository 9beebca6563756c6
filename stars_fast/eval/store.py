"""The files that keep the results of an eval while it runs.

``responses.jsonl`` has one line for each spec, seed and prompt, ``runs.jsonl`` one for each run.
A run is finished when it has its line in ``runs.jsonl`` and as many responses as that line says.
Everything of unfinished runs, a torn last line included, is dropped when the files are read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

RESPONSES = "responses.jsonl"
RUNS = "runs.jsonl"


class DamagedError(ValueError):
    """A file of an eval that holds something else."""


class Store:
    """The results, in memory and in the files of a folder.

    Parameters
    ----------
    folder
        Created if missing. Nothing in it is changed before a result is added.

    Attributes
    ----------
    runs
        Records of the finished runs, by fingerprint.
    responses
        Records of their responses, by the run's fingerprint, in the order of the prompts.

    Raises
    ------
    DamagedError
        A line before the last one is not a result.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.runs: dict[str, Record] = {}
        self.responses: dict[str, list[Record]] = {}
        # Whether the files hold what memory does and nothing of unfinished runs.
        self._clean = not any((folder / name).exists() for name in (RESPONSES, RUNS))
        found: dict[str, dict[int, Record]] = {}
        for record in _read(folder / RESPONSES, {"run", "number"}):
            found.setdefault(record["run"], {})[record["number"]] = record
        for record in _read(folder / RUNS, {"run", "responses"}):
            rows = found.get(record["run"], {})
            if len(rows) == record["responses"]:
                self.runs[record["run"]] = record
                self.responses[record["run"]] = [rows[number] for number in sorted(rows)]

    def add(self, run: Record, responses: Sequence[Record]) -> None:
        """Add a finished run to memory and files."""
        if not self._clean:
            self.save()
        self.runs[run["run"]] = run
        self.responses[run["run"]] = list(responses)
        self._append(RESPONSES, responses)
        self._append(RUNS, [run])

    def save(self) -> None:
        """Rewrite every file atomically: an interruption leaves the old one or the new one."""
        rows = (row for responses in self.responses.values() for row in responses)
        _write(self._folder / RESPONSES, rows)
        _write(self._folder / RUNS, self.runs.values())
        self._clean = True

    def _append(self, name: str, records: Iterable[Record]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / name).open("ab") as file:
            for record in records:
                file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON file atomically: an interruption leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    text = json.dumps(record, ensure_ascii=False, indent=1, allow_nan=False)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def read_json(path: Path) -> Record:
    """Read what `write_json` wrote; empty if there is no such file.

    Raises
    ------
    DamagedError
        It is not a JSON object.
    """
    if not path.exists():
        return {}
    record = _record(path.read_bytes(), set())
    if record is None:
        raise DamagedError(f"{path} is damaged; delete it to go on without it")
    return record


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.writelines(map(_line, records))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _read(path: Path, keys: set[str]) -> list[Record]:
    if not path.exists():
        return []
    records = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            record = _record(raw, keys)
            if record is not None:
                records.append(record)
            elif raw.endswith(b"\n"):  # only a last line can lack its newline
                raise DamagedError(f"{path}, line {number}, is not a result of this command")
    return records


def _record(raw: bytes, keys: set[str]) -> Record | None:
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and record.keys() >= keys else None
