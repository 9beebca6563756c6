"""What test_tensor_parallel runs: in one process, and by torchrun in two, which meddle with rank 1.

Run as a script, it writes what this rank saw to `rank<N>.pickle` in the folder it is given.
"""

from __future__ import annotations

import asyncio
import pickle
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

import stars_fast.drafting.rows
import stars_fast.engine.loop
import stars_fast.engine.round
from stars_fast import Engine, LogRatio, Reward, StarsParams
from stars_fast.engine.async_engine import AsyncEngine
from stars_fast.models.paged import PagedModel
from stars_fast.outputs import RequestOutput
from stars_fast.rewards import Persona

PROMPTS = ["The film was slow at first, but", "A terrible kettle", "Not bad at all. " * 3]
_SHORT: dict[str, Any] = {"max_tokens": 18, "temperature": 1.0, "top_k": 50, "seed": 7}
_FEW = {**_SHORT, "max_tokens": 8}
_SEGMENTS: dict[str, Any] = {**_SHORT, "segment_length": 6, "target_reward": 3.0, "beta": 0.4}
PARAMS = {
    "stars": StarsParams(**_SEGMENTS, candidates="auto", max_attempts=4),
    "stars, calibrated": StarsParams(
        **{**_SEGMENTS, "target_reward": "auto"}, max_attempts=4, calibrate_prefixes=True
    ),
    "vanilla": StarsParams("vanilla", **_SHORT),
    "best_of_n": StarsParams("best_of_n", **_SHORT, candidates=3),
    "cards": StarsParams("cards", **{**_SEGMENTS, "segment_length": 8}, entropy_threshold=2.5),
    "smc": StarsParams("smc", **_SHORT, segment_length=6, candidates=4, beta=0.5),
    "mara": StarsParams("mara", **_FEW, max_attempts=5),
}
PERSONA = StarsParams("persona_judge", **_FEW, max_attempts=5)
LOG_RATIO = StarsParams(**{**_SEGMENTS, "target_reward": 0.5}, max_attempts=3)


def engine(folder: Path, reward: Any = "directory", **options: Any) -> Engine:
    """The engine of the saved models."""
    settings: dict[str, Any] = {
        "device": "cpu",
        "num_pages": 400,
        "page_size": 8,
        "max_rows": 32,
        "reward_template": "plain" if isinstance(reward, str) else None,
    }
    reward = str(folder / "rm") if reward == "directory" else reward
    return Engine(str(folder / "lm"), reward, **{**settings, **options})


def generated(one: Engine, params: StarsParams) -> list[RequestOutput]:
    return one.generate(PROMPTS, params, use_tqdm=False)


def every_method(one: Engine) -> dict[str, list[RequestOutput]]:
    return {name: generated(one, params) for name, params in PARAMS.items()}


def text_reward(prompts: list[str], responses: list[str]) -> list[float]:
    return [((len(r) * 7919 + sum(map(ord, r[-6:]))) % 100) / 50 - 1 for r in responses]


async def _serve(one: Engine) -> list[RequestOutput]:
    """Three requests at once, and one that is aborted after its first segment."""
    running = AsyncEngine(one)
    last: dict[int, RequestOutput] = {}

    async def read(number: int) -> None:
        async for output in running.generate(PROMPTS[number], PARAMS["stars"]):
            last[number] = output

    async def leave() -> None:
        async for _ in running.generate(PROMPTS[0], PARAMS["stars"], request_id="left"):
            break

    await asyncio.gather(*(read(number) for number in range(3)), leave())
    await running.drain()
    return [last[number] for number in range(3)]


def lead(one: Engine) -> dict[str, Any]:
    """What a serving stack does with an engine; some of it is refused, some is aborted."""
    found: dict[str, Any] = {
        "calibration": one.calibrate(PROMPTS, samples_per_prompt=2, use_tqdm=False)
    }
    found["auto"] = generated(one, PARAMS["stars, calibrated"])
    in_turn = replace(PARAMS["stars"], candidates=1)  # how far a step gets depends on no clock
    one.add_request("a", PROMPTS[0], in_turn)
    one.add_request("b", PROMPTS[1], in_turn)
    found["refused"] = []
    for bad in ("a", PROMPTS[0]), ("c", ""), ("d", "x " * 600):
        try:
            one.add_request(*bad, PARAMS["stars"])
        except ValueError as error:
            found["refused"].append(str(error))
    one.step()
    found["aborted"] = one.abort("a")
    done = []
    while one.has_unfinished():
        done += [output for output in one.step() if output.finished]
    found["b"] = done
    found["score"] = one.score(PROMPTS, [" wonderful", " it leaks", ""])
    found["served"] = asyncio.run(_serve(one))
    return found


# In two processes


def _meddle(rank: int) -> None:
    """Give rank 1 another clock, and other draws and logits' figures than rank 0 has."""
    if rank == 0:
        return
    slow = random.Random(5)
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() * slow.uniform(1, 1000))
    stars_fast.engine.loop.time = stars_fast.engine.round.time = clock  # type: ignore[attr-defined]
    sample = stars_fast.drafting.rows.ops.sample

    def other(logits: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        token, logprob, truncated, entropy, ok = sample(logits, *arguments, **options)
        return (token + 1) % logits.shape[1], logprob - 1, truncated, entropy + 1, ok

    stars_fast.drafting.rows.ops = SimpleNamespace(sample=other)  # type: ignore[attr-defined]


class _Rewards:
    """A reward function that is random, and that tells how often it was called."""

    def __init__(self, rank: int) -> None:
        self._random = random.Random(rank)
        self.calls = 0

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        self.calls += 1
        return [self._random.gauss(1.0, 1.0) for _ in responses]


def _error(call: Any) -> str:
    begun = time.monotonic()
    try:
        call()
    except Exception as error:  # noqa: BLE001 - whatever it is
        late = ", late" if time.monotonic() - begun > 20 else ""
        return f"{type(error).__name__}{late}: {error}"
    return ""


def main(folder: Path) -> None:
    found: dict[str, Any] = {}

    split = engine(folder, tensor_parallel=True)
    rank = split.rank
    _meddle(rank)
    found["layout"] = split.loop.model._pools.k_pages[0].shape
    found["methods"] = every_method(split)
    found["stats"] = split.stats()
    found["parameters"] = split.num_parameters()

    rewards = _Rewards(rank)
    several = [
        Reward("random", rewards),
        Reward("split", folder / "rm", weight=0, template="plain", at_least=-1e9),
    ]
    alone = engine(folder, several, tensor_parallel=True)
    found["random rewards"] = generated(alone, PARAMS["stars"])
    found["reward calls"] = rewards.calls
    failing = engine(folder, lambda p, r: 1 / 0, tensor_parallel=True)
    found["failing rewards"] = [o.error for o in generated(failing, PARAMS["stars"])]
    judge = engine(folder, Persona(template="Human: {prompt}"), tensor_parallel=True)
    found["persona"] = generated(judge, PERSONA)
    ratio = engine(folder, LogRatio(folder / "dpo"), tensor_parallel=True)
    found["log ratio"] = generated(ratio, LOG_RATIO)

    loaded = AutoModelForCausalLM.from_pretrained(
        folder / "lm", distributed_config=DistributedConfig(tp_plan="auto", tp_size=2)
    )
    found["not told"] = _error(lambda: Engine(loaded.eval(), device="cpu"))
    loaded = Engine(loaded, tensor_parallel=True, num_pages=400, page_size=8, max_rows=32)
    found["loaded"] = generated(loaded, PARAMS["vanilla"])
    found["whole"] = _error(
        lambda: Engine(AutoModelForCausalLM.from_pretrained(folder / "lm"), tensor_parallel=True)
    )
    found["overlap"] = _error(lambda: engine(folder, tensor_parallel=True, overlap_scoring=True))

    led = engine(folder, text_reward, tensor_parallel=True)
    if rank == 0:
        found["follow"] = _error(led.follow)
        with led.lead():
            found["led"] = lead(led)
    else:
        found["lead"] = _error(lambda: led.lead().__enter__())
        led.follow()
    found["led stats"] = led.stats()

    odd = engine(folder, text_reward, tensor_parallel=True)
    if rank == 0:
        with odd.lead():
            found["only 0 can"] = _error(lambda: generated(odd, PARAMS["stars"]))
    else:
        odd._reader = None  # type: ignore[assignment]
        found["only 0 can"] = _error(odd.follow)

    differ = engine(folder, text_reward, tensor_parallel=True)
    found["differ"] = _error(
        lambda: differ.generate(PROMPTS[rank], PARAMS["stars"], use_tqdm=False)
    )
    found["after"] = _error(differ.step)

    if rank == 1:

        def forward(*_: Any) -> None:
            raise MemoryError("no room")

        PagedModel.forward_decode = forward  # type: ignore[method-assign, assignment]
    found["one fails"] = _error(lambda: generated(split, PARAMS["stars"]))
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
