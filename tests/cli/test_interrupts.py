"""Ctrl-C while the command line is still being imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

_CODE = """
import builtins, sys
from stars_fast.cli import main
real = builtins.__import__
def interrupted(name, *rest, **named):
    if name == {module!r}:
        raise KeyboardInterrupt
    return real(name, *rest, **named)
builtins.__import__ = interrupted
sys.exit(main(["generate", "--model", "x", "--method", "vanilla", "--prompt", "x"]))
"""


@pytest.mark.parametrize("module", ["argparse", "stars_fast.engine"])
def test_it_is_no_traceback(module: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _CODE.format(module=module)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 130
    assert ended.stderr == "stars-fast: interrupted\n"
