"""One server for all clients: ``stars-fast serve`` over the demo's pair, as a process of its own.

Where STARS_REAL_MODELS names the folder of real models, the language model is SmolLM2. The chat
template is one that writes tool calls, which theirs leaves out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.real_models import real_model
from helpers.server_process import server_process

from stars_fast import demo

FLAGS = [
    "--segment-length", "8", "--max-tokens", "24", "--max-rows", "16", "--num-pages", "400",
    "--target-reward", "1", "--max-attempts", "3", "--served-model-name", "served",
]  # fmt: skip


@dataclass(frozen=True)
class Served:
    """A running server: its address, the name of its model and where that lies."""

    url: str
    model: str
    folder: Path


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(package, reason=f"needs {package}, of the extra server")
    log = tmp_path_factory.mktemp("server") / "log"
    folder = real_model("smollm2") or demo.model_dir()
    models = ["--model", str(folder), "--reward-model", str(demo.reward_model_dir())]
    template = ["--chat-template", str(Path(__file__).with_name("chat.jinja"))]
    with server_process([*models, *template, *FLAGS], log) as (url, _):
        yield Served(url, "served", folder)
