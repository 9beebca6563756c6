"""Numbers and lists in README.md and docs/ are those of the code."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from helpers.tiny_architectures import CONFIGS

from stars_fast.cli import bench, demo, generate, report, serve
from stars_fast.cli import eval as evaluate
from stars_fast.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SERVING = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
SERVER = ROOT / "stars_fast" / "server"


def quoted(text: str) -> list[str]:
    return re.findall(r"`(\w+)`", text)


def section(text: str, heading: str) -> str:
    return text.split(f"## {heading}\n")[1].split("\n## ", maxsplit=1)[0]


def test_status() -> None:
    status = section(README, "Status")
    found = re.search(r"(\d+) architectures are tested", status)
    assert found is not None
    assert int(found[1]) == len(CONFIGS)
    methods = re.search(r"Methods: (.*?)\.\n", status, re.DOTALL)
    assert methods is not None
    assert set(quoted(methods[1])) == set(METHODS)
    commands = re.search(r"Commands: (.*?)\.\n", status, re.DOTALL)
    assert commands is not None
    subparsers = argparse.ArgumentParser().add_subparsers()
    for module in (generate, demo, serve, evaluate, bench, report):
        module.add_command(subparsers)
    assert set(quoted(commands[1])) == set(subparsers.choices)


def test_methods_has_a_row_for_each_method() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE)) == set(METHODS)


def test_metrics() -> None:
    rows = re.findall(r"^\| (`.*?) \|", section(SERVING, "Metrics"), re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`(\w+)", row)} - {"stars"}
    source = (SERVER / "metrics.py").read_text(encoding="utf-8")
    for name in names:
        assert re.search(rf"\"(stars:)?({name}|{name.removesuffix('_total')})\"", source), name
    dashboard = json.dumps(json.loads((SERVER / "grafana.json").read_text(encoding="utf-8")))
    shown = re.findall(r"stars:(\w+?)(?:_bucket|_sum|_count)?\b", dashboard)
    assert set(shown) <= names


def test_endpoints() -> None:
    requests = section(SERVING, "Requests")
    named = set(re.findall(r"`(?:(?:GET|POST) )?(/[\w/.]+)`", requests))
    source = "".join(path.read_text(encoding="utf-8") for path in SERVER.glob("*.py"))
    assert {path for path in named if f'"{path}"' not in source} == {"/openapi.json"}  # FastAPI's
