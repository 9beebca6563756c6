"""The ways into vLLM side by side, on one `vllm serve`: over HTTP, inside, and in its scheduler.

    python benchmarks/stacks.py [--model DIR] [--reward-model DIR] [--requests 32] [--repeats 3] ...

Runs where vLLM and stars_fast are installed together. `remote` is a `RemoteEngine` in this process,
`remote, whole rounds` one with `overlap_scoring=False`, which is the other way's default; `plugin`
are the routes that stars_fast has in the server, `scheduler` are vLLM's own with `StarsScheduler`.
The same requests with the same seeds are there at once, streamed, and the ways take turns; before
each turn the prefix cache is emptied.

The tokens that vLLM computes are its own counts: prompt tokens that its cache did not have, and
drawn ones. Those that `StarsScheduler` draws do not leave it: an attempt there is fed one token of
what is before it, which tells their number. Seconds of the processor are those of the server's
processes and this one; they say more than the clock where the machine is not idle.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import numpy as np
import psutil
import torch

from stars_fast import RemoteEngine, StarsParams, demo
from stars_fast.benchmarks.clients import complete, many_connections, read_metrics
from stars_fast.benchmarks.flags import number
from stars_fast.benchmarks.measure import header
from stars_fast.benchmarks.vllm_server import vllm_server
from stars_fast.engine.async_engine import AsyncEngine
from stars_fast.tables import markdown_table

HERE = Path(__file__).resolve().parent
WAYS = ("remote", "remote, whole rounds", "plugin", "scheduler")


@dataclass
class Turn:
    """What one way did with all requests.

    Attributes
    ----------
    seconds
        Until the last one was answered.
    first
        Seconds until each request's first accepted segment.
    texts
        The responses.
    tokens
        Accepted ones.
    prompt_tokens
        Of all requests; 0 where it was not asked.
    computed
        Tokens that vLLM computed.
    processor
        Seconds of the processor, of all processes.
    """

    seconds: float
    first: list[float]
    texts: list[str]
    tokens: int
    prompt_tokens: int = 0
    computed: float = 0.0
    processor: float = 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the record if asked to."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    reward = str(options.reward_model)
    with _server(options, reward) as (url, process), contextlib.ExitStack() as engines:
        remote, whole = (
            engines.enter_context(
                RemoteEngine(
                    f"{url}/v1",
                    tokenizer=str(options.model),
                    reward_model=reward,
                    max_rows=options.rows,
                    overlap_scoring=overlap,
                )
            )
            for overlap in (True, False)
        )
        prompts = list(islice(cycle(_prompts(options)), options.requests))
        params = StarsParams(
            segment_length=options.segment_length,
            max_tokens=options.max_tokens,
            candidates=options.candidates,
            ignore_eos=True,
            alpha=1.0,
            target_reward=0.0,
        )
        target = remote.calibrate(prompts[:16], 0.5, params=params, use_tqdm=False).target_reward
        running = [AsyncEngine(engine) for engine in (remote, whole)]
        ways: dict[str, Way] = {
            name: partial(_remote, engine, prompts, replace(params, target_reward=target))
            for name, engine in zip(WAYS, running, strict=False)
        }
        stars = {
            "segment_length": options.segment_length,
            "candidates": options.candidates,
            "ignore_eos": True,
            "alpha": 1.0,
            "target_reward": target,
        }
        body = {"max_tokens": options.max_tokens, "stars": stars}
        ways["plugin"] = partial(_routes, f"{url}/plugins/stars", prompts, body)
        own = {name: value for name, value in stars.items() if name != "ignore_eos"}
        ways["scheduler"] = partial(
            _routes,
            url,
            prompts,
            {
                "model": str(options.model),
                "max_tokens": options.max_tokens,
                **{name: getattr(params, name) for name in ("temperature", "top_k", "ignore_eos")},
                "vllm_xargs": {"stars": json.dumps(own)},
            },
        )
        turns = asyncio.run(_turns(options, url, process, ways))
        for engine in running:
            engine.close()
    results = {way: _summary(turns[way][1:]) for way in WAYS}
    last = zip(*(turns[way][-1].texts for way in WAYS), strict=True)
    same = np.mean([len(set(texts)) == 1 for texts in last])
    for way, result in results.items():
        print(way, json.dumps(result))
    for way in WAYS[1:]:
        ratio = results[way]["tokens_per_second"] / results["remote"]["tokens_per_second"]
        print(f"{way} / remote: {ratio:.2f} accepted tokens a second")
    print(f"{same:.0%} of texts are the same")
    if options.out is not None:
        record = {
            **header(" ".join(["python benchmarks/stacks.py", *given]), torch.device("cpu")),
            "vllm": version("vllm"),
            "model": Path(options.model).name,
            "reward_model": Path(reward).name,
            "requests": options.requests,
            "segment_length": options.segment_length,
            "max_tokens": options.max_tokens,
            "candidates": options.candidates,
            "target_reward": target,
            "same_texts": float(same),
            "ways": results,
        }
        (HERE / options.out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


#: Runs all requests once, with the seeds of a repeat.
Way: TypeAlias = Callable[[int], Awaitable[Turn]]


async def _turns(
    options: argparse.Namespace, url: str, process: int, ways: Mapping[str, Way]
) -> dict[str, list[Turn]]:
    """Run each way once to warm up, and then as often as asked for."""
    turns: dict[str, list[Turn]] = {way: [] for way in ways}
    for repeat in range(options.repeats + 1):
        for name, way in ways.items():
            async with httpx.AsyncClient(base_url=url, timeout=60) as http:
                (await http.post("/reset_prefix_cache")).raise_for_status()
                before = _computed((await http.get("/metrics")).text), _processor(process)
                turn = await way(repeat)
                turn.processor = _processor(process) - before[1]
                turn.computed = _computed((await http.get("/metrics")).text) - before[0]
            if name == "scheduler":
                turn.computed = _with_drawn(turn, options)
            if turn.tokens != options.requests * options.max_tokens:
                raise SystemExit(f"{name}: {turn.tokens} tokens were returned")
            turns[name].append(turn)
            print(
                f"{name}: {turn.seconds:.2f} s, first segment {np.median(turn.first):.2f} s, "
                f"processor {turn.processor:.2f} s",
                flush=True,
            )
    return turns


def _processor(process: int) -> float:
    """Seconds of the processor that this process and a tree of others have had."""
    server = psutil.Process(process)
    times = [one.cpu_times() for one in (psutil.Process(), server, *server.children(True))]
    return float(sum(one.user + one.system for one in times))


async def _remote(
    engine: AsyncEngine, prompts: list[str], params: StarsParams, repeat: int
) -> Turn:
    begun = time.perf_counter()

    async def one(number: int, prompt: str) -> tuple[float, str, int]:
        own = replace(params, seed=1000 * repeat + number)
        first, text, tokens = 0.0, "", 0
        async for output in engine.generate(prompt, own):
            if output.error is not None:
                raise SystemExit(f"remote: {output.error}")
            first = first or time.perf_counter() - begun
            text, tokens = output.outputs[0].text, len(output.outputs[0].token_ids)
        return first, text, tokens

    found = await asyncio.gather(*(one(*pair) for pair in enumerate(prompts)))
    seconds = time.perf_counter() - begun
    return Turn(seconds, [f[0] for f in found], [f[1] for f in found], sum(f[2] for f in found))


async def _routes(url: str, prompts: list[str], body: dict[str, Any], repeat: int) -> Turn:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with many_connections() as session:
        begun = time.perf_counter()
        answers = await asyncio.gather(
            *(
                complete(
                    session,
                    url,
                    {**body, **options, "prompt": prompt, "seed": 1000 * repeat + number},
                )
                for number, prompt in enumerate(prompts)
            )
        )
        seconds = time.perf_counter() - begun
    for answer in answers:
        if answer.error is not None or not answer.complete:
            raise SystemExit(f"{url}: {answer.error}")
    first = [answer.chunks[0] for answer in answers]
    texts = [answer.text for answer in answers]
    tokens, prompt_tokens = (
        sum(getattr(answer, name) for answer in answers) for name in ("tokens", "prompt_tokens")
    )
    return Turn(seconds, first, texts, tokens, prompt_tokens)


def _computed(metrics: str) -> float:
    """Tokens that vLLM has computed: prompts' beside its prefix cache, and drawn ones."""
    values = read_metrics(metrics)

    def total(name: str) -> float:
        return sum(value for key, value in values.items() if key.startswith(f"vllm:{name}_total"))

    return total("prefix_cache_queries") - total("prefix_cache_hits") + total("generation_tokens")


def _with_drawn(turn: Turn, options: argparse.Namespace) -> float:
    """Tokens that vLLM has computed in a turn of the scheduler, of which it counts the prompts'.

    It has drawn a segment for each token of a prompt that was computed and is of no request's.
    Where prompts share blocks, which are computed once, that tells nothing: NaN.
    """
    fed = turn.computed - turn.tokens
    attempts = fed - (turn.prompt_tokens - options.requests)
    if attempts * options.segment_length < turn.tokens:
        return float("nan")
    return float(fed + attempts * options.segment_length)


def _summary(turns: list[Turn]) -> dict[str, float]:
    tokens = sum(turn.tokens for turn in turns)
    return {
        "tokens_per_second": float(np.median([turn.tokens / turn.seconds for turn in turns])),
        "lowest": min(turn.tokens / turn.seconds for turn in turns),
        "highest": max(turn.tokens / turn.seconds for turn in turns),
        "processor_ms_per_token": 1e3 * sum(turn.processor for turn in turns) / tokens,
        "computed_per_accepted": sum(turn.computed for turn in turns) / tokens,
        "first_segment_seconds": float(np.median([s for turn in turns for s in turn.first])),
    }


def table(record: Mapping[str, Any]) -> str:
    """Return the table of a record, as docs/stacks.md has it."""
    headings = (
        *("way", "accepted tokens/s (range)", "processor ms a token"),
        *("computed a token", "first segment, s"),
    )
    return markdown_table(
        headings,
        [
            (
                f"`{way}`",
                f"{one['tokens_per_second']:.0f} ({one['lowest']:.0f} to {one['highest']:.0f})",
                f"{one['processor_ms_per_token']:.1f}",
                f"{one['computed_per_accepted']:.2f}",
                f"{one['first_segment_seconds']:.1f}",
            )
            for way, one in record["ways"].items()
        ],
    )


def _prompts(options: argparse.Namespace) -> list[str]:
    if options.model == demo.model_dir():
        return [str(prompt) for prompt in demo.prompts(32)]
    topics = ("a garden", "the sea", "bread", "a small town", "music", "winter", "maps", "a clock")
    return [
        f"{'Write in plain words, for a reader who knows nothing of it. ' * 3}Tell me about {topic}"
        f", part {part}:"
        for part in range(1, 5)
        for topic in topics
    ]


@contextmanager
def _server(options: argparse.Namespace, reward: str) -> Iterator[tuple[str, int]]:
    own = {
        "reward_model": reward,
        "max_rows": options.rows,
        "logprobs": options.logprobs,
        "params": {"target_reward": 0.0},
    }
    with tempfile.TemporaryDirectory() as folder:
        log = options.log or Path(folder) / "log"
        flags = ["--max-model-len", "512", "--block-size", str(options.block_size)]
        flags += ["--scheduler-cls", "stars_fast.vllm.StarsScheduler"]
        with vllm_server(str(options.model), log, own, flags) as found:
            yield found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=demo.model_dir(), help="(default: the demo's)")
    add("--reward-model", type=Path, default=demo.reward_model_dir(), help="(default: the demo's)")
    add("--requests", type=number(int, low=1), default=32)
    add("--rows", type=number(int, low=1), default=256, help="candidates in a round at most")
    add("--candidates", type=number(int, low=1), default=4)
    add("--segment-length", type=number(int, low=1), default=16, help="K")
    add("--max-tokens", type=number(int, low=1), default=64, help="M")
    add("--block-size", type=number(int, low=1), default=32, help="of vLLM's cache, in tokens")
    add("--logprobs", action=argparse.BooleanOptionalAction, default=True, help="of the plugin")
    add("--repeats", type=number(int, low=1), default=3)
    add("--log", type=Path, help="file for what vLLM says (default: a temporary one)")
    add("--out", type=Path, help="where to write the figures, from benchmarks/")
    return parser


if __name__ == "__main__":
    sys.exit(main())
