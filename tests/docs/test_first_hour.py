"""What scripts/first_hour.py makes of a page; the pages themselves run in .ci/run."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("first_hour", ROOT / "scripts" / "first_hour.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


first_hour = loaded()


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Any]:
    with contextlib.closing(first_hour.Reader(tmp_path)) as reader:
        yield reader


def run(reader: Any, page: str) -> None:
    source = reader.folder / "page.md"
    source.write_text(page)
    for block in first_hour.blocks_of(source, "page.md"):
        if block.reason is None:
            reader.run(block)


def test_blocks_have_their_lines_and_reasons() -> None:
    pages = ["README.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
    blocks = [block for name in pages for block in first_hour.blocks_of(ROOT / name, name)]
    fences = sum((ROOT / name).read_text(encoding="utf-8").count("\n```") for name in pages)
    marks = sum((ROOT / name).read_text(encoding="utf-8").count("<!-- not run:") for name in pages)
    assert len(blocks) == fences / 2
    assert sum(block.reason is not None for block in blocks) == marks
    for block in blocks:
        lines = (ROOT / block.page).read_text(encoding="utf-8").splitlines()
        assert lines[block.line - 2] == f"```{block.language}"
        assert block.language in ("bash", "console", "json", "python", "text")


def test_commands_are_lines_joined_where_a_shell_joins_them() -> None:
    text = "a 'b\nc'  # the reader's\n# nothing\nd \\\n  e\n"
    commands = list(first_hour.commands_of(text))
    assert commands == ["a 'b\nc'  # the reader's", "d \\\n  e"]
    assert [first_hour.words_of(command) for command in commands] == [("a", "b\nc"), ("d", "e")]


def test_a_page_is_run_as_it_stands(reader: Any) -> None:
    page = """
```python
from pathlib import Path
name = "LM_DIR"
```

```bash
echo one >> out
echo one >> out
echo RM_DIR > where
```

<!-- not run: it fails -->
```bash
exit 1
```

```python
assert Path(name, "config.json").exists()
```

```console
$ cat out && ls README.md
one
README.md
```

```json
{"a": 1}
```
"""
    run(reader, page)
    assert Path((reader.folder / "where").read_text().strip(), "config.json").exists()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("python\n\n\nraise KeyError(1)", r'"page.md", line 4'),
        ("python\nfrom argparse import Namespace as N\noutput = N(error='full')", "is 'full'"),
        ("bash\ntrue\nfalse | cat", "exit code 1"),
        ("bash\nstars-fast serve --port x", "it does not answer"),
        ("bash\necho 'a", "not a whole command"),
        ("console\n$ echo a\nb", "a\n\nis not what the page says of: echo a"),
        ("json\n{", "Expecting property name"),
        ("\na", "language"),
    ],
)
def test_what_is_wrong_is_said(block: str, message: str, reader: Any) -> None:
    with pytest.raises((first_hour.BlockError, ValueError), match=message):
        run(reader, f"```{block}\n```\n")
