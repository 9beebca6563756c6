"""Kernels compiled for each architecture: they spill no registers, fit the chip, and overlap."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux only")
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "kernel_report.py"


def test_forms_fit_every_architecture(tmp_path: Path) -> None:
    """In a process of its own: nothing is compiled in one that interprets kernels.

    A few forms of each kernel, for bfloat16 and heads of 128, stand here for all; ``.ci/run`` does
    every form.
    """
    target = tmp_path / "forms.json"
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    others = [
        *("fp16", "fp32", "fp8e4nv", "u8", "d64", "d256", "heads of 64", "heads of 256"),
        *("m32", "m64", "m128", "16-byte", "2-byte", "1-byte", "2048 channels", "8192 channels"),
    ]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", str(target), "--skip", *others],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert target.is_file(), done.stderr[-4000:]
    rows = json.loads(target.read_text(encoding="utf-8"))
    assert [row for row in rows if not row["fits"]] == []
    assert [row for row in rows if not row["overlaps"]] == []
    assert done.returncode == 0
    # Keys and values of the prefix and of the rows' own tokens; no page table among them.
    attention = [row for row in rows if row["name"].startswith("attention ")]
    assert {len(row["buffers"]) for row in attention} == {4}
    assert min(min(row["buffers"]) for row in attention) >= 2
    assert {row["capability"] for row in rows} == {80, 90, 100}
    for kernel in (
        "philox", "copy_pages", "kv_append", "sample_reduce", "sample_finish", "adjust",
        "guide_logits", "token_logprobs", "top_chunk", "top_row", "attention", "merge", "rms_norm",
        "head_norms", "gated", "rotate_append", "choose_experts", "order_pairs", "experts_up",
        "experts_down", "sum_pairs",
    ):  # fmt: skip
        assert any(kernel in row["name"] for row in rows), kernel
