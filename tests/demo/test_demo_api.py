"""stars_fast.demo itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import stars_fast.demo
from stars_fast.demo import model_dir, reward_model_dir


def test_names() -> None:
    assert set(stars_fast.demo.__all__) == {
        "gold_score",
        "model_dir",
        "prompts",
        "reward_model_dir",
    }
    assert all(hasattr(stars_fast.demo, name) for name in stars_fast.demo.__all__)


def test_directories_exist() -> None:
    assert model_dir().is_dir()
    assert reward_model_dir().is_dir()
    assert model_dir() != reward_model_dir()


def test_demo_modules_do_not_import_torch(tmp_path: Path) -> None:
    code = (
        "import sys, stars_fast.demo, stars_fast.demo.grammar\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
