"""Programs of others that talk to the server: where they are installed, and how they are run.

They are looked for in this environment and in those that scripts/clients.sh makes in the folder
that STARS_CLIENTS names.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("STARS_CLIENTS", os.devnull))


def program(name: str) -> str:
    """Return the path of a program; skips the test where it is not installed."""
    places = [str(place) for place in sorted(FOLDER.glob("*/bin"))]
    found = shutil.which(name, path=os.pathsep.join([*places, os.environ["PATH"]]))
    return found or pytest.skip(f"needs the program {name}: bash scripts/clients.sh")


def interpreter(package: str) -> str:
    """Return a Python that can import a package; skips the test where there is none."""
    if importlib.util.find_spec(package) is not None:
        return sys.executable
    for place in sorted(FOLDER.glob(f"*/lib/python*/site-packages/{package}")):
        return str(place.parents[3] / "bin" / "python")
    pytest.skip(f"needs the package {package}: bash scripts/clients.sh")


def node_modules(package: str) -> str:
    """Return the folder of modules that a package of npm is in; skips the test without it."""
    place = FOLDER / "javascript" / "node_modules"
    if shutil.which("node") is None or not (place / package).exists():
        pytest.skip(f"needs node and its package {package}: bash scripts/clients.sh")
    return str(place)


def run(command: list[str], *, cwd: Path, **environment: str) -> str:
    """Run a client to its end and return what it printed; it must succeed."""
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **offline, **environment},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout
