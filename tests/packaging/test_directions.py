"""Imports run one way, from the floor that a package is on to floors below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import stars_fast

HOME = Path(stars_fast.__file__).parent

#: From the roof to the ground.
FLOORS = (
    ("cli",),
    ("cluster",),
    ("benchmarks",),
    ("vllm",),
    ("server", "eval", "hf"),
    ("remote",),
    ("engine",),
    ("drafting",),
    ("rewards",),
    ("models",),
    ("distributed",),
    ("ops",),
    ("kernels",),
    ("records",),
    ("prompts", "params", "errors"),
    ("config", "reward"),
    ("methods", "outputs", "seeds", "core", "demo", "tables", "reward_head"),
    ("text", "_core"),
    ("images",),
)
FLOOR = {package: number for number, floor in enumerate(FLOORS) for package in floor}


def package_of(path: Path) -> str:
    """The room that a file is in."""
    first = path.relative_to(HOME).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """The rooms that a file imports from, also inside of functions; not those for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "stars_fast":
            modules = [f"stars_fast.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
        for module in modules:
            parts = module.split(".")
            if parts[0] == "stars_fast" and len(parts) > 1 and parts[1] in FLOOR:
                yield parts[1]


def files() -> list[Path]:
    return sorted(path for path in HOME.rglob("*.py") if path.parent != HOME or path.stem in FLOOR)


def test_every_room_has_a_floor() -> None:
    rooms = {package_of(path) for path in HOME.rglob("*.py")}
    assert rooms - {"__init__"} <= FLOOR.keys()


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(HOME)))
def test_imports_run_down(path: Path) -> None:
    room = package_of(path)
    for other in imported(path):
        assert other == room or FLOOR[room] < FLOOR[other], f"{room} imports from {other}"
