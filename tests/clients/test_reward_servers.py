"""Reward models on servers of others: vLLM gives the rewards of the same model here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers.client_programs import program
from helpers.server_process import free_port, other_server

from stars_fast import Engine, RemoteReward, StarsParams, demo

PROMPTS = ["The film was", "I bought this lamp and", "Our stay at the hotel was"]
RESPONSES = [" a delight from the first scene.", " it broke.", " fine"]


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM on the demo's reward model; yields its address."""
    serve = program("vllm")
    port = free_port()
    command = [
        serve, "serve", str(demo.reward_model_dir()), "--runner", "pooling", "--dtype", "float32",
        "--max-model-len", "512", "--enforce-eager", "--port", str(port),
        "--served-model-name", "reward",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("vllm") / "log"
    with other_server(command, log, port, VLLM_CPU_KVCACHE_SPACE="1") as url:
        yield url


@pytest.mark.parametrize("path", ["/classify", "/pooling", "/score"])
def test_vllm_gives_the_same_rewards(path: str, vllm: str) -> None:
    remote = RemoteReward(vllm + path, model="reward", batch_size=2)
    local = Engine.demo()
    expected = local.score(PROMPTS, RESPONSES)
    assert remote.score(PROMPTS, RESPONSES) == pytest.approx(expected, abs=1e-4)
    params = StarsParams(segment_length=8, max_tokens=24, target_reward=1.0, seed=3, max_attempts=3)
    (wanted,) = local.generate(PROMPTS[:1], params, use_tqdm=False)
    engine = Engine(demo.model_dir(), remote)
    (output,) = engine.generate(PROMPTS[:1], params, use_tqdm=False)
    assert output.error is None
    assert output.outputs[0].token_ids == wanted.outputs[0].token_ids
    remote.close()
