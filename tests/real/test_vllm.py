"""The real vLLM, where it is installed beside stars_fast: `StarsLLM`, and the routes of vllm serve.

Models are tiny and random; float32 on a CPU, or on what vLLM finds.
"""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vllm: pip install '.[vllm]'", allow_module_level=True)

import httpx
from helpers.letter_law import World, next_probs, p_value, reward_model, reward_of, stars_law
from helpers.tiny_lm import letter_model, letter_tokenizer

from stars_fast import StarsParams
from stars_fast.benchmarks.clients import Answer, complete, many_connections, read_metrics
from stars_fast.benchmarks.vllm_server import vllm_server
from stars_fast.vllm import StarsLLM

pytestmark = pytest.mark.filterwarnings("ignore")

HEAD_DIM = 32
WORLD = World(partial(next_probs, head_dim=HEAD_DIM), reward_of)
STARS = StarsParams(
    segment_length=2,
    max_tokens=4,
    max_attempts=3,
    target_reward=0.5,
    alpha=0.7,
    beta=0.3,
    temperature=1.0,
    top_k=0,
)
REQUESTS = 120


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("letters")
    letter_model(HEAD_DIM).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llm(letters: Path) -> Any:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        environment.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
        from vllm import LLM

        options = {"enforce_eager": True, "enable_chunked_prefill": False}
        return LLM(str(letters), dtype="float32", max_model_len=256, **options)


def test_matches_the_closed_form(llm: Any) -> None:
    engine = StarsLLM(llm, reward_model)
    outputs = engine.generate(["ab"] * 1000, replace(STARS, candidates=2), use_tqdm=False)
    assert [output.error for output in outputs] == [None] * len(outputs)
    counts = Counter(tuple(output.outputs[0].token_ids) for output in outputs)
    assert p_value(counts, stars_law(STARS, WORLD)) > 1e-3
    for other in ({"max_attempts": 1}, {"beta": 1.0}, {"target_reward": 1.2}):
        assert p_value(counts, stars_law(replace(STARS, **other), WORLD)) < 1e-3, other


def test_greedy_equals_generate(llm: Any) -> None:
    from vllm import SamplingParams

    prompts = [[0, 1], [1, 0], [2, 2, 0], [0] * 40]
    params = StarsParams(
        method="vanilla", temperature=0.0, top_k=0, segment_length=5, max_tokens=24, ignore_eos=True
    )
    asked = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=2)
    wanted = llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
    outputs = StarsLLM(llm).generate(prompts, replace(params, top_logprobs=2), use_tqdm=False)
    for output, whole in zip(outputs, wanted, strict=True):
        (found,), (expected,) = output.outputs, whole.outputs
        assert found.token_ids == list(expected.token_ids)
        places = zip(found.logprobs, found.token_ids, expected.logprobs, strict=True)
        assert all(abs(one - place[token].logprob) < 1e-5 for one, token, place in places)
        assert all(len(likely) == 2 for likely in found.top_logprobs)


@pytest.fixture(scope="module")
def server(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    options = {
        "reward_model": {"function": "helpers.letter_law:reward_model"},
        "params": {"target_reward": 0.5, "top_k": 0, "segment_length": 4, "ignore_eos": True},
    }
    log = tmp_path_factory.mktemp("vllm") / "log"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        with vllm_server(str(letters), log, options, ["--max-model-len", "256"]) as (url, _):
            yield url


def test_each_request_is_answered_once_and_every_block_is_free_again(server: str) -> None:
    """A third streams to its end, a third leaves halfway, a third is cut off before it begins."""
    ours = f"{server}/plugins/stars"
    whole = {"prompt": "ab", "max_tokens": 32, "stream": True}
    long = {"prompt": "ba", "max_tokens": 200, "stream": True}

    async def cut_off(session: Any, body: dict[str, Any]) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(complete(session, ours, body), 0.05)

    async def all_at_once() -> list[Answer]:
        async with many_connections() as session:
            calls: list[Any] = []
            for number in range(REQUESTS // 3):
                body = {"seed": number}
                calls += [
                    complete(session, ours, whole | body),
                    complete(session, ours, long | body, leave_after=2),
                    cut_off(session, long | body),
                ]
            answers = await asyncio.gather(*calls)
        return [answer for answer in answers[::3] if answer is not None]

    answers = asyncio.run(all_at_once())
    assert len(answers) == REQUESTS // 3
    assert all(answer.complete and answer.error is None for answer in answers)
    again = asyncio.run(all_at_once())
    assert [len(a.chunks) for a in again] == [len(a.chunks) for a in answers]
    deadline = time.monotonic() + 30
    while not is_idle(server):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    counted = read_metrics(httpx.get(f"{ours}/metrics").text)
    assert counted['stars:http_requests_total{status="200"}'] == len(answers) + len(again)
    assert counted["stars:num_requests_running"] == counted["stars:num_requests_waiting"] == 0


def is_idle(url: str) -> bool:
    values = read_metrics(httpx.get(f"{url}/metrics").text)
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    busy = [v for k, v in values.items() if k.startswith(tuple(f"vllm:{n}{{" for n in names))]
    return len(busy) == len(names) and not any(busy)


def test_chunks_add_up_to_the_answer(server: str) -> None:
    body = {"prompt": "ab", "max_tokens": 20, "seed": 3, "logprobs": 1}
    ours = f"{server}/plugins/stars/v1/completions"
    whole = httpx.post(ours, json=body, timeout=60).json()
    assert whole["usage"]["completion_tokens"] == 20
    (choice,) = whole["choices"]
    assert len(choice["logprobs"]["token_logprobs"]) == 20

    async def streamed() -> Answer:
        async with many_connections() as session:
            return await complete(session, f"{server}/plugins/stars", {**body, "stream": True})

    assert asyncio.run(streamed()).text == choice["text"]
