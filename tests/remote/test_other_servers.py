"""Against servers that are not ours, with the demo's model: transformers, llama.cpp, any other.

`transformers serve` is started here, and llama-cpp-python's server where it is installed. Any other
is tested where it is, if STARS_REMOTE_URL says so; STARS_REMOTE_SERVER, _MODEL and _TOKENIZER say
what it is.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx", reason="needs httpx, of the extra remote")

from helpers.server_process import free_port, other_server

from stars_fast import Engine, RemoteEngine, StarsParams, _core, demo

MODEL = str(demo.model_dir())
PROMPTS = ["The film", "This kettle", "I bought a phone"]
GREEDY = StarsParams(method="vanilla", temperature=0.0, segment_length=40, max_tokens=40)
PARAMS = StarsParams(
    segment_length=10, max_tokens=40, max_attempts=4, target_reward=1.5, beta=0.3, seed=3
)


@contextmanager
def transformers_server(folder: Path) -> Iterator[dict[str, Any]]:
    program = Path(sys.executable).with_name("transformers")
    for package in ("typer", "fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason=f"transformers serve needs {package}")
    if not program.exists():
        pytest.skip(f"needs the program {program}")
    port = free_port()
    command = [str(program), "serve", MODEL, "--port", str(port), "--device", "cpu"]
    with other_server(command, folder / "log", port) as url:
        # One call at a time: the seed that a call sets is the process's.
        yield {
            "base_url": f"{url}/v1", "model": MODEL, "server": "transformers", "max_concurrency": 1,
        }  # fmt: skip


@contextmanager
def llama_server(folder: Path) -> Iterator[dict[str, Any]]:
    for package in ("llama_cpp", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install 'llama-cpp-python[server]' gguf")
    script = Path(__file__).parents[2] / "scripts" / "demo_gguf.py"
    subprocess.run([sys.executable, str(script), str(folder / "demo.gguf")], check=True)
    port = free_port()
    command = [
        sys.executable, "-m", "llama_cpp.server", "--model", str(folder / "demo.gguf"),
        "--n_ctx", "512", "--n_threads", "1", "--port", str(port),
    ]  # fmt: skip
    with other_server(command, folder / "log", port) as url:
        yield {"base_url": f"{url}/v1"}


@contextmanager
def given_server(folder: Path) -> Iterator[dict[str, Any]]:
    url = os.environ.get("STARS_REMOTE_URL")
    if url is None:
        pytest.skip("no STARS_REMOTE_URL, the address of a server of the demo's model")
    named = ("model", "server", "tokenizer")
    found = {name: os.environ.get(f"STARS_REMOTE_{name.upper()}") for name in named}
    yield {"base_url": url, **{name: value for name, value in found.items() if value}}


SERVERS = {
    "transformers": transformers_server,
    "llama-cpp-python": llama_server,
    "given": given_server,
}


@pytest.fixture(scope="module", params=list(SERVERS))
def remote(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RemoteEngine]:
    with (
        SERVERS[request.param](tmp_path_factory.mktemp("server")) as options,
        RemoteEngine(reward_model=str(demo.reward_model_dir()), **options) as engine,
    ):
        yield engine


@pytest.fixture(scope="module")
def local() -> Engine:
    return Engine.demo(num_pages=200, reward_num_pages=200)


def texts(outputs: list[Any]) -> list[str]:
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [output.outputs[0].text for output in outputs]


def test_it_is_the_same_model(remote: RemoteEngine, local: Engine) -> None:
    wanted = texts(local.generate(PROMPTS, GREEDY, use_tqdm=False))
    assert texts(remote.generate(PROMPTS, GREEDY, use_tqdm=False)) == wanted
    short = replace(GREEDY, segment_length=7)
    assert texts(remote.generate(PROMPTS, short, use_tqdm=False)) == wanted


def test_stars(remote: RemoteEngine, local: Engine) -> None:
    outputs = remote.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert texts(remote.generate(PROMPTS, PARAMS, use_tqdm=False)) == texts(outputs)
    schedule = _core.Schedule(target_reward=1.5, alpha=0.5, beta=0.3, max_tokens=40, hard=False)
    kinds = set()
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        (completion,) = output.outputs
        (prompt_reward,) = local.score(prompt, [""])
        assert [completion.reward] == pytest.approx(
            local.score(prompt, [completion.text]), abs=1e-4
        )
        assert completion.segments[-1].reward == completion.reward
        position = 0
        for at, segment in enumerate(completion.segments):
            assert segment.start == position
            position = segment.end
            tau = schedule.threshold(prompt_reward, position)
            assert segment.threshold == pytest.approx(tau, abs=1e-4)
            if segment.accepted == "test":
                uniform = _core.accept_uniform(3, segment.start, segment.attempts - 1, at)
                assert schedule.accepts(segment.reward or 0.0, segment.threshold or 0.0, uniform)
            kinds.add((segment.accepted, segment.attempts > 1))
        if completion.finish_reason == "length":
            assert position == 40
    assert ("test", True) in kinds  # something was rejected, and something after it accepted


def test_sampled_text_is_the_model_s(remote: RemoteEngine, local: Engine) -> None:
    """Plain responses of both have rewards of the same mean, within 4 standard errors."""
    params = StarsParams(method="best_of_n", candidates=1, max_tokens=16, segment_length=8)
    prompts = ["The film"] * 40
    means, variances = [], []
    for engine in (remote, local):
        each = [replace(params, seed=100 + i) for i in range(len(prompts))]
        outputs = engine.generate(prompts, each, use_tqdm=False)
        rewards = [output.outputs[0].reward for output in outputs]
        assert len({output.outputs[0].text for output in outputs}) > 20
        mean = sum(rewards) / len(rewards)
        means.append(mean)
        variances.append(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    assert abs(means[0] - means[1]) < 4 * (sum(variances) / len(prompts)) ** 0.5
