"""Every form of every kernel, compiled for each architecture: no spills, and it fits the chip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux only")
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "kernel_report.py"


def test_every_form_fits_every_architecture(tmp_path: Path) -> None:
    """In a process of its own: nothing is compiled in one that interprets kernels.

    Without attention in float16, which takes the same instructions as bfloat16: the script alone
    does those.
    """
    target = tmp_path / "forms.json"
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", str(target), "--skip", "attention fp16"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert target.is_file(), done.stderr[-4000:]
    rows = json.loads(target.read_text(encoding="utf-8"))
    assert [row for row in rows if not row["fits"]] == []
    assert done.returncode == 0
    assert {row["capability"] for row in rows} == {80, 90, 100}
    for kernel in ("philox", "copy_pages", "kv_append", "sample_reduce", "sample_finish", "merge"):
        assert any(kernel in row["name"] for row in rows), kernel
