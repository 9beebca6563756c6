"""What the package declares against what the checkout holds."""

from __future__ import annotations

import re
import sys
from importlib import import_module, metadata, resources, util
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirement_name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return match.group().lower().replace("_", "-")


def test_every_package_of_the_checkout_is_listed(pyproject: dict[str, Any]) -> None:
    packages = {
        ".".join(["stars_fast", *init.parent.relative_to(root).parts])
        for root, inits in (
            (ROOT / "stars_fast", (ROOT / "stars_fast").rglob("__init__.py")),
            (ROOT, (ROOT / "benchmarks").rglob("__init__.py")),
            (ROOT, (ROOT / "kernels").rglob("__init__.py")),
        )
        for init in inits
    }
    assert set(pyproject["tool"]["setuptools"]["packages"]) == packages


def test_every_python_file_lies_in_a_package() -> None:
    folders = {
        file.parent
        for root in ("stars_fast", "kernels", "benchmarks")
        for file in (ROOT / root).rglob("*.py")
    }
    assert {str(folder) for folder in folders if not (folder / "__init__.py").exists()} == set()


def test_every_requirement_is_pinned(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    needed = {requirement_name(line) for line in project["dependencies"]}
    for extra in ("test", "bench"):
        needed |= {requirement_name(line) for line in project["optional-dependencies"][extra]}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {requirement_name(line) for line in lines if "==" in line}
    assert needed - {"stars-fast"} <= pinned  # an extra may take in another


def test_version_is_that_of_the_distribution(pyproject: dict[str, Any]) -> None:
    import stars_fast

    assert stars_fast.__version__ == metadata.version("stars_fast")
    assert stars_fast.__version__ == pyproject["project"]["version"]


@pytest.mark.parametrize("name", ["py.typed", "_core.pyi"])
def test_typing_files_are_installed(name: str) -> None:
    assert resources.files("stars_fast").joinpath(name).is_file()


def test_kernels_are_a_subpackage_and_nothing_else() -> None:
    assert util.find_spec("stars_fast.kernels") is not None
    # A top-level `kernels` belongs to a package that transformers looks for; the checkout's, which
    # `python -m pytest` finds, has nothing in it.
    top_level = util.find_spec("kernels")
    if top_level is not None and top_level.origin == str(ROOT / "kernels" / "__init__.py"):
        assert not hasattr(import_module("kernels"), "sample")
