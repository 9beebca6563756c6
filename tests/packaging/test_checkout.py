"""A checkout as the current folder: its sources hide the installed package, which is built."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

import stars_fast
from stars_fast import _core, kernels

PROGRAM = "from stars_fast import Engine; import stars_fast; print(stars_fast.__file__)"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The sources without what a build makes."""
    root = tmp_path / "checkout"
    leave = shutil.ignore_patterns("__pycache__", "_core.*.so", "*.safetensors", "kernels")
    shutil.copytree(Path(stars_fast.__file__).parent, root / "stars_fast", ignore=leave)
    shutil.copytree(Path(kernels.__file__).parent, root / "kernels", ignore=leave)
    return root


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The installed packages but for stars_fast."""
    root = tmp_path / "site"
    root.mkdir()
    for folder in {Path(torch.__file__).parents[1], Path(numpy.__file__).parents[1]}:
        for entry in folder.iterdir():
            if not entry.name.startswith("stars_fast"):
                (root / entry.name).symlink_to(entry)
    return root


def run(checkout: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Import the engine from the checkout's root, beside the packages in `site` alone."""
    return subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.append({str(site)!r}); {PROGRAM}"],
        cwd=checkout,
        check=False,
        capture_output=True,
        text=True,
    )


def test_built_parts_are_those_of_the_installed_package(checkout: Path, site: Path) -> None:
    (site / "stars_fast").mkdir()
    (site / "stars_fast" / "__init__.py").touch()
    shutil.copy(Path(_core.__file__), site / "stars_fast")
    done = run(checkout, site)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(checkout / "stars_fast" / "__init__.py")


def test_without_them_the_error_says_what_to_do(checkout: Path, site: Path) -> None:
    done = run(checkout, site)
    assert "ImportError: stars_fast is not built: install it first" in done.stderr
