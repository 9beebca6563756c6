"""Two workers of a real cluster, one of them killed: bulk and online."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers.ray_records import MODELS, POOLS, assert_same

from stars_fast import Engine, StarsParams, demo
from stars_fast.cli import main

for package in ("ray.data", "ray.serve", "fastapi", "openai"):
    pytest.importorskip(package, reason=f"needs {package}, of the extras ray and test")

import httpx  # noqa: E402
import openai  # noqa: E402
import ray.data  # noqa: E402
from ray import serve  # noqa: E402

from stars_fast.cluster.bulk import StarsMapper, calibrate, map_rows  # noqa: E402
from stars_fast.cluster.files import read_records, remaining, write_records  # noqa: E402
from stars_fast.cluster.rows import read_rows  # noqa: E402
from stars_fast.cluster.serve import build_app  # noqa: E402
from stars_fast.cluster.serve_args import ServeArgs  # noqa: E402

PARAMS = StarsParams(segment_length=4, max_tokens=12, target_reward="auto")
SEED = 5
ONLINE: dict[str, Any] = {"segment_length": 4, "max_tokens": 16, "target_reward": 4.0, "beta": 2.0}
PROMPTS = [*demo.prompts(11), "Killed"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster of this machine, with places for two workers and what writes their records."""
    patch = pytest.MonkeyPatch()
    # Nothing of these tests leaves the machine.
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # Workers import from where Ray was started; in the checkout the package is not installed.
    patch.chdir(tmp_path_factory.mktemp("cluster"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(
            num_cpus=3,
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            log_to_driver=False,
            logging_level="ERROR",
        )
    patch.undo()
    yield
    ray.shutdown()


def requests() -> list[dict[str, Any]]:
    """Requests of every kind, some of them wrong."""
    found: list[dict[str, Any]] = [{"prompt": p, "id": i} for i, p in enumerate(demo.prompts(20))]
    found[3] = {"prompt": ""}
    found[7]["params"] = {"beta": -1}
    found[9]["params"] = {"method": "vanilla", "n": 2}
    found[12] = {"prompt_token_ids": [5, 6, 7], "id": "ids", "params": {"seed": 3}}
    found[15] = {"prompt_token_ids": [10**6]}
    return found


def of_the_command(source: Path, folder: Path) -> list[dict[str, Any]]:
    """Records of ``stars-fast generate`` for the same file."""
    output = folder / "alone.jsonl"
    flags = ["--segment-length", "4", "--max-tokens", "12", "--target-reward", "auto"]
    memory = ["--num-pages", "300", "--device", "cpu", "--seed", str(SEED)]
    models = ["--model", MODELS[0], "--reward-model", MODELS[1]]
    files = ["--input", str(source), "--output", str(output), "--on-error", "record"]
    assert main(["generate", *models, *files, *flags, *memory]) == 0
    return sorted(map(json.loads, output.read_text().splitlines()), key=lambda r: int(r["line"]))


def killed_once(marker: Path, line: int) -> type[StarsMapper]:
    """A mapper whose process dies in the middle of the first batch that has the line."""

    class Killed(StarsMapper):
        def records(self, rows: Any) -> list[dict[str, Any]]:
            rows = list(rows)
            if line in [row["line"] for row in rows] and not marker.exists():
                step, steps = self._engine.step, iter(range(100))

                def dies() -> Any:
                    if next(steps) == 2:  # some segments are done, no request is
                        assert self._engine.stats()["segments"] > 0
                        marker.write_text(str(os.getpid()))
                        os.kill(os.getpid(), signal.SIGKILL)
                    return step()

                self._engine.step = dies  # type: ignore[method-assign]
            return super().records(rows)

    return Killed


def test_two_workers_one_of_them_killed_give_what_one_engine_gives(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(request) + "\n" for request in requests()))
    expected = of_the_command(source, tmp_path)
    assert sum(record["error"] is not None for record in expected) == 3
    rows = read_rows(source)
    calibration = calibrate(rows, *MODELS, params=PARAMS, seed=SEED, **POOLS)
    sidecar = json.loads((tmp_path / "alone.jsonl.calibration.json").read_text())
    assert calibration.target_reward == pytest.approx(sidecar["target_reward"], abs=1e-5)

    marker = tmp_path / "killed"
    monkeypatch.setattr("stars_fast.cluster.bulk.StarsMapper", killed_once(marker, line=6))
    results = map_rows(
        ray.data.from_items(rows),
        *MODELS,
        workers=2,
        batch_size=4,
        params=PARAMS,
        seed=SEED,
        calibration=calibration,
        **POOLS,
    )
    write_records(results, tmp_path / "out")
    assert marker.exists()
    written = [
        json.loads(line)
        for path in (tmp_path / "out").iterdir()
        for line in path.read_text().splitlines()
    ]
    assert sorted(record["line"] for record in written) == list(range(1, 21))
    assert_same(read_records(tmp_path / "out"), expected)
    assert [row["line"] for row in remaining(rows, tmp_path / "out")] == [4, 8, 16]


def rewards(marker: Path) -> Callable[[list[str], list[str]], list[float]]:
    """A reward whose process dies once, when it has scored the fatal prompt for the third time."""
    calls = iter(range(10**6))

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        fatal = any(prompt.startswith("Killed") for prompt in prompts)
        if fatal and next(calls) == 2 and not marker.exists():
            marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return [float(len(response) % 7) for response in responses]

    return reward


@pytest.fixture
def url(cluster: None) -> Iterator[str]:
    """Where Ray's proxy listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}/v1"
    serve.shutdown()


def test_two_replicas_one_of_them_killed_answer_as_one_engine(url: str, tmp_path: Path) -> None:
    (tmp_path / "alone").touch()  # this engine is not to die
    engine = Engine(str(demo.model_dir()), rewards(tmp_path / "alone"), num_pages=400, device="cpu")
    each = [StarsParams(**ONLINE, seed=i) for i in range(len(PROMPTS))]
    expected = [o.outputs[0] for o in engine.generate(PROMPTS, each, use_tqdm=False)]

    marker = tmp_path / "killed"
    told = {
        "model": str(demo.model_dir()),
        "reward_model": rewards(marker),
        "params": json.dumps(ONLINE),
        "served_model_name": "demo",
        "device": "cpu",
        "num_pages": "400",  # as `serve run` gives it
        "min_replicas": 2,
        "max_replicas": 2,
    }
    serve.run(build_app(told), name="stars", route_prefix="/")
    # With the same seed the answer is the same, so trying again is safe.
    statuses: list[int] = []
    seen = httpx.Client(
        timeout=60, event_hooks={"response": [lambda r: statuses.append(r.status_code)]}
    )
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=5, http_client=seen)

    def ask(number: int) -> openai.types.Completion:
        return client.completions.create(model="demo", prompt=PROMPTS[number], seed=number)

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(ask, range(len(PROMPTS))))
    assert marker.exists()
    for answer, want in zip(answers, expected, strict=True):
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason) == (want.text, want.finish_reason)
    # Each once, those of the killed replica after an error.
    assert statuses.count(200) == len(PROMPTS)
    assert set(statuses) == {200, 500}

    stream = client.completions.create(model="demo", prompt=PROMPTS[0], seed=0, stream=True)
    chunks = [chunk.choices[0].text for chunk in stream]
    assert "".join(chunks) == expected[0].text
    assert len(chunks) == len(expected[0].segments) > 1
    with pytest.raises(openai.BadRequestError, match="beta must be"):
        client.completions.create(model="demo", prompt="p", extra_body={"stars": {"beta": -1}})
    client.close()


SLOW = {"segment_length": 1, "max_attempts": 1, "target_reward": 0.0}


def slow_rewards(folder: Path) -> Callable[[list[str], list[str]], list[float]]:
    """A reward that takes its time, and keeps when its process was last asked."""

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        time.sleep(0.1)
        (folder / str(os.getpid())).write_text(str(time.time()))
        return [float(len(response) % 7) for response in responses]

    return reward


def running_replicas() -> int:
    """Replicas that take requests."""
    (deployment,) = serve.status().applications["slow"].deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


def wait_for(number: int, what: str, count: Callable[[], int]) -> None:
    """Wait until there are that many."""
    deadline = time.monotonic() + 300  # on a busy machine
    while (found := count()) != number:
        assert time.monotonic() < deadline, f"{found} {what}, not {number}"
        time.sleep(0.1)


def test_replicas_follow_the_load_and_finish_what_they_have(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy replica brings a second one; of two that have little to do one is drained."""
    options = ServeArgs.deployment_options

    def impatient(self: ServeArgs) -> dict[str, Any]:
        told = options(self)
        return told | {
            "autoscaling_config": told["autoscaling_config"]
            | {"metrics_interval_s": 0.2, "look_back_period_s": 0.5}
        }

    monkeypatch.setattr(ServeArgs, "deployment_options", impatient)
    told = {
        "model": str(demo.model_dir()), "reward_model": slow_rewards(tmp_path), "params": SLOW,
        "served_model_name": "demo", "device": "cpu", "num_pages": 400, "max_replicas": 2,
        "target_ongoing_requests": 4, "upscale_delay_s": 0, "downscale_delay_s": 1,
    }  # fmt: skip
    serve.run(build_app(told), name="slow", route_prefix="/")
    assert running_replicas() == 1
    enough = threading.Event()

    def ask(tokens: int) -> int:
        body = {"model": "demo", "prompt": "p", "max_tokens": tokens, "ignore_eos": True}
        answer = httpx.post(f"{url}/completions", json=body, timeout=60)
        answer.raise_for_status()
        return int(answer.json()["usage"]["completion_tokens"])

    def load() -> None:
        while not enough.is_set():
            assert ask(4) == 4

    with ThreadPoolExecutor(12) as pool:
        busy = [pool.submit(load) for _ in range(8)]
        wait_for(2, "replicas", running_replicas)
        # Not before both were asked for rewards: a replica that has just begun may get no request.
        wait_for(2, "replicas with rewards", lambda: len(list(tmp_path.iterdir())))
        enough.set()
        for one in busy:
            one.result()
        # Three requests are not enough for two replicas.
        long = [pool.submit(ask, 80) for _ in range(3)]
        wait_for(1, "replicas", running_replicas)
        # The one that takes no more requests has finished its own.
        assert [one.result() for one in long] == [80, 80, 80]
