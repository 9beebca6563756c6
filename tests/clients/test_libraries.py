"""Client libraries, each in a script of its own that asserts what it gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.client_programs import interpreter, node_modules, run

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("package", "script"),
    [("langchain_openai", "langchain_chat.py"), ("litellm", "litellm_calls.py")],
)
def test_python(package: str, script: str, served: Any, tmp_path: Path) -> None:
    command = [interpreter(package), str(HERE / script), served.url, served.model]
    run(command, cwd=tmp_path, LITELLM_LOCAL_MODEL_COST_MAP="True")


@pytest.mark.parametrize(("package", "script"), [("openai", "openai.cjs"), ("ai", "ai_sdk.cjs")])
def test_javascript(package: str, script: str, served: Any, tmp_path: Path) -> None:
    modules = node_modules(package)
    run(["node", str(HERE / script), served.url, served.model], cwd=tmp_path, NODE_PATH=modules)
