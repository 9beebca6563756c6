"""Every example is short, runs as it stands, and shows something."""

from __future__ import annotations

import re
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
#: Of the standard library and the package itself; all others may be missing where an extra is.
_IMPORT = re.compile(r"^(?:import|from) (\w+)", re.MULTILINE)


@pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning:ray.*")  # of its own settings
@pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")  # by TRL
@pytest.mark.filterwarnings("ignore:.*'rollout_func', which is an experimental:UserWarning")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(
    path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 60
    for package in _IMPORT.findall(source):  # at the top level; an example does without others
        if find_spec(package) is None:
            pytest.skip(f"needs {package}")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert capfd.readouterr().out.strip()


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5
