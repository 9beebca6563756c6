"""The figures of docs/stacks.md are those of the record that it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

for package in ("httpx", "aiohttp", "psutil"):
    pytest.importorskip(package, reason=f"needs {package}, of the extra bench or remote")

from stars_fast.benchmarks.stacks import table  # noqa: E402

ROOT = Path(__file__).parents[2]


def test_the_table_is_that_of_the_record() -> None:
    text = (ROOT / "docs" / "stacks.md").read_text(encoding="utf-8")
    names = [path.name for path in (ROOT / "benchmarks" / "results").glob("stacks-*.json")]
    assert names
    for name in names:
        record = json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))
        assert name in text
        assert table(record) in text
