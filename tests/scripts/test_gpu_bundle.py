"""Kernels compiled without a GPU are found by another process, in another folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux only")
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_bundle.py"
AGAIN = """
import sys
from pathlib import Path
from stars_fast.benchmarks.gpu_stages.cache import use_cache

use_cache(Path(sys.argv[1]))
sys.path.insert(0, sys.argv[2])
import gpu_bundle

print(gpu_bundle.compile_forms(90))
"""


def test_kernels_compiled_here_are_found_elsewhere(tmp_path: Path) -> None:
    """In processes of their own: nothing is compiled in one that interprets kernels."""

    def run(*arguments: str) -> str:
        environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, *arguments],
            env=environment | {"TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout.strip()

    assert (
        run(str(SCRIPT), str(tmp_path / "made"), "--no-wheel") == "16 forms compiled, 0 were there"
    )
    (tmp_path / "made" / "cache").rename(tmp_path / "moved")
    assert run("-c", AGAIN, str(tmp_path / "moved"), str(SCRIPT.parent)) == "(0, 16)"
