"""SmolLM2-135M-Instruct and Gemma 3 270M, from the folder that STARS_REAL_MODELS names.

`scripts/real_models.py` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.client_programs import program
from helpers.real_models import real_model
from helpers.server_process import free_port, other_server, server_process
from transformers import AutoModelForCausalLM, AutoTokenizer

from stars_fast import Engine, RemoteEngine, StarsParams, demo
from stars_fast.cli import main

PLAIN = [
    "The capital of France is",
    "One, two, three,",
    "def add(a, b):\n    return",
    "Once upon a time there was a small kettle. " * 8,
    "日本の首都は",
]
CHATS = [
    [{"role": "user", "content": "Say hello."}],
    [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And of Italy?"},
    ],
]
GREEDY = StarsParams(method="vanilla", temperature=0.0, segment_length=8, max_tokens=32)
STARS = StarsParams(segment_length=8, max_tokens=24, max_attempts=4, target_reward=1.0, seed=3)


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def folder(request: pytest.FixtureRequest) -> Path:
    found = real_model(request.param)
    if found is None:
        pytest.skip("needs STARS_REAL_MODELS, a folder: python scripts/real_models.py FOLDER")
    return found


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[Any]:
    return PLAIN + CHATS if (folder / "chat_template.jinja").exists() else PLAIN


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    options = {"num_pages": 400, "max_rows": 16, "device": "cpu"}
    return Engine(str(folder), str(demo.reward_model_dir()), **options)


@pytest.fixture(scope="module")
def generated(folder: Path, prompts: list[Any]) -> list[tuple[list[int], list[int]]]:
    """Each prompt's ids, and those that transformers' generate adds."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    pairs = []
    for prompt in prompts:
        if isinstance(prompt, str):
            inputs = tokenizer(prompt, return_tensors="pt")
        else:
            inputs = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        with torch.inference_mode():
            whole = model.generate(**inputs, do_sample=False, max_new_tokens=GREEDY.max_tokens)
        start = inputs.input_ids.shape[1]
        pairs.append((whole[0, :start].tolist(), whole[0, start:].tolist()))
    return pairs


def test_greedy_equals_generate(
    engine: Engine, prompts: list[Any], generated: list[tuple[list[int], list[int]]]
) -> None:
    tokenizer = engine.tokenizer
    outputs = engine.generate(prompts, GREEDY, use_tqdm=False)
    for output, (prompt_ids, wanted) in zip(outputs, generated, strict=True):
        assert output.error is None
        assert output.prompt_token_ids == prompt_ids
        found = output.outputs[0]
        assert found.token_ids == wanted
        prompt, whole = (
            tokenizer.decode(ids, skip_special_tokens=True)
            for ids in (prompt_ids, prompt_ids + wanted)
        )
        assert prompt + found.text == whole


def test_the_number_of_candidates_changes_no_token(engine: Engine, prompts: list[Any]) -> None:
    each = [
        [
            output.outputs[0]
            for output in engine.generate(prompts, replace(STARS, candidates=n), use_tqdm=False)
        ]
        for n in (1, 4)
    ]
    assert [one.token_ids for one in each[0]] == [one.token_ids for one in each[1]]
    assert all(segment.reward is not None for one in each[0] for segment in one.segments)


def test_the_server_answers(
    folder: Path, generated: list[tuple[list[int], list[int]]], tmp_path: Path
) -> None:
    httpx = pytest.importorskip("httpx", reason="needs httpx, of the extra test")
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(package, reason=f"needs {package}, of the extra server")
    flags = ["--model", str(folder), "--method", "vanilla", "--num-pages", "400"]
    body = {"prompt": PLAIN, "max_tokens": GREEDY.max_tokens, "temperature": 0}
    with server_process(flags, tmp_path / "log") as (url, _):
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for choice, (prompt_ids, ids) in zip(answer["choices"], generated, strict=False):
        whole = tokenizer.decode(prompt_ids + ids, skip_special_tokens=True)
        assert whole == tokenizer.decode(prompt_ids, skip_special_tokens=True) + choice["text"]


def test_eval_compares_methods(folder: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": prompt}) for prompt in PLAIN[:2]]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    methods = ["stars:segment_length=4,target_reward=1", "best_of_n:candidates=2", "vanilla"]
    reward = str(demo.reward_model_dir())
    argv = ["eval", "--model", str(folder), "--reward-model", reward, "--gold", reward,
            "--prompts", str(tmp_path / "prompts.jsonl"), "--common", "max_tokens=8",
            "--num-pages", "400", "--no-plots", "--out", str(tmp_path / "out")]  # fmt: skip
    assert main([*argv, *(part for method in methods for part in ("--method", method))]) == 0
    written = (tmp_path / "out" / "responses.jsonl").read_text().splitlines()
    assert len(written) == len(methods) * 2


@pytest.fixture(scope="module")
def vllm(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real vLLM that serves the model."""
    port, log = free_port(), tmp_path_factory.mktemp("vllm") / "log"
    command = [program("vllm"), "serve", str(folder), "--port", str(port), "--dtype", "float32",
               "--max-model-len", "512", "--enforce-eager"]  # fmt: skip
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1"}
    with other_server(command, log, port, **settings) as address:
        yield address


def test_a_remote_model_says_the_same(
    vllm: str, folder: Path, engine: Engine, prompts: list[Any]
) -> None:
    wanted = engine.generate(prompts, GREEDY, use_tqdm=False)
    with RemoteEngine(
        f"{vllm}/v1",
        model=str(folder),
        tokenizer=str(folder),
        reward_model=str(demo.reward_model_dir()),
    ) as remote:
        found = remote.generate(prompts, GREEDY, use_tqdm=False)
        assert [output.error for output in found] == [None] * len(prompts)
        for one, other in zip(found, wanted, strict=True):
            assert one.outputs[0].text == other.outputs[0].text
        aligned = remote.generate(PLAIN[:2], STARS, use_tqdm=False)
        assert all(output.outputs[0].segments for output in aligned)
