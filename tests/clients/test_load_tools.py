"""Load generators: every request is answered, with as many tokens as were asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.client_programs import program, run

REQUESTS = 4
TOKENS = 8


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_guidellm(path: str, served: Any, tmp_path: Path) -> None:
    backend = f"kind=openai_http,target={served.url},model={served.model},request_format={path}"
    run(
        [program("guidellm"), "run", "--backend", backend,
         "--profile", "kind=concurrent,streams=2",
         "--constraint", f"kind=max_requests,count={REQUESTS}",
         "--data", f"kind=synthetic_text,prompt_tokens=16,output_tokens={TOKENS}",
         "--tokenizer", f"kind=huggingface_auto,model={served.folder}",
         "--output", "kind=json,path=report.json", "--disable-console"],
        cwd=tmp_path,
    )  # fmt: skip
    (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    found = benchmark["requests"]
    assert [len(found[kind]) for kind in ("successful", "errored", "incomplete")] == [
        REQUESTS,
        0,
        0,
    ]
    for request in found["successful"]:
        assert request["output_metrics"]["text_tokens"] == TOKENS


@pytest.mark.parametrize(
    ("backend", "path"),
    [
        ("openai", "/v1/completions"),
        ("openai-chat", "/v1/chat/completions"),
        ("openai-responses", "/v1/responses"),
    ],
)
def test_vllm_bench(backend: str, path: str, served: Any, tmp_path: Path) -> None:
    flags = ["--random-output-len", str(TOKENS), "--ignore-eos"]
    result = _vllm_bench(served, backend, path, flags, tmp_path)
    assert result["total_output_tokens"] == REQUESTS * TOKENS


def _vllm_bench(
    served: Any, backend: str, path: str, flags: list[str], folder: Path
) -> dict[str, Any]:
    run(
        [program("vllm"), "bench", "serve", "--backend", backend, "--endpoint", path,
         "--base-url", served.url, "--served-model-name", served.model,
         "--tokenizer", str(served.folder), "--dataset-name", "random",
         "--random-input-len", "16", "--num-prompts", str(REQUESTS), "--max-concurrency", "2",
         "--disable-tqdm", "--save-result", "--result-filename", "result.json", *flags],
        cwd=folder, VLLM_LOGGING_LEVEL="WARNING",
    )  # fmt: skip
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    assert result["completed"] == REQUESTS
    return result
