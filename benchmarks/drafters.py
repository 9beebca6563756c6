"""What a user would pick to draft on a CPU, side by side: llama.cpp and vLLM, and our own engine.

    python -m stars_fast.benchmarks.drafters --model DIR [--llama-python PY] [--vllm-python PY]
        [--requests 8] [--max-tokens 32] [--repeats 2] [--out FILE]

llama.cpp (llama-cpp-python's server, Q8_0 and float32; one call at a time) and vLLM for CPUs draft
for a `RemoteEngine`; the others are `Engine`, in float32 and with 8-bit weights. All have the same
weights, prompts, parameters and reward function, all requests are there at once, and one way runs
at a time, on as many threads. A way whose Python is not given is left out, and says so.

Tokens are those of the responses' texts by the model's tokenizer, for all ways alike. Before it is
timed, each way's greedy texts are compared with the engine's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from transformers import AutoTokenizer

from stars_fast import Engine, RemoteEngine, StarsParams
from stars_fast.benchmarks.flags import number
from stars_fast.benchmarks.measure import header
from stars_fast.benchmarks.served import started
from stars_fast.benchmarks.vllm_server import vllm_server
from stars_fast.engine.batches import BatchEngine
from stars_fast.tables import markdown_table

_TOPICS = ("a garden", "the sea", "bread", "a small town", "music", "winter", "maps", "a clock")
_SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "demo_gguf.py"
_CONTEXT = 512
#: Of greedy texts: a near tie may fall the other way, and one rounds to 8 bits.
_SAME = 0.5

Opens: TypeAlias = Callable[[], AbstractContextManager[BatchEngine]]


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    """The mean length of a response's words, in letters: its size says nothing of it."""
    words = (response.split() for response in responses)
    return [sum(map(len, some)) / max(len(some), 1) for some in words]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write the record if asked to."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def count(texts: list[str]) -> int:
        return sum(map(len, tokenizer(texts)["input_ids"]))

    prompts = [
        f"Write in plain words, for a reader who knows nothing of it. Tell me about "
        f"{_TOPICS[i % len(_TOPICS)]}, part {1 + i // len(_TOPICS)}:"
        for i in range(options.requests)
    ]
    params = StarsParams(
        segment_length=options.segment_length,
        max_tokens=options.max_tokens,
        alpha=1.0,
        beta=0.1,
        seed=1,
    )
    ways: dict[str, dict[str, Any]] = {}
    greedy: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, opens in _ways(options, Path(folder)).items():
            if isinstance(opens, str):
                print(f"{name}: left out, {opens}", flush=True)
                continue
            with opens() as engine:
                if not greedy:  # the engine, which is the first
                    found = engine.calibrate(prompts, 0.5, params=params, use_tqdm=False)
                    params = replace(params, target_reward=found.target_reward)
                texts = _texts(engine, prompts, _greedy(params))
                greedy = greedy or texts
                same = float(np.mean([a == b for a, b in zip(texts, greedy, strict=True)]))
                ways[name] = _turns(engine, prompts, params, options.repeats, count)
                ways[name]["same_greedy_texts"] = same
            print(name, json.dumps(ways[name]), flush=True)
            if same < _SAME and "8" not in name:
                raise SystemExit(f"{name}: {same:.0%} of greedy texts are the engine's")
    record = {
        **header(
            " ".join(["python -m stars_fast.benchmarks.drafters", *given]), torch.device("cpu")
        ),
        "model": Path(options.model).name,
        "requests": options.requests,
        "segment_length": options.segment_length,
        "max_tokens": options.max_tokens,
        "target_reward": params.target_reward,
        "ways": ways,
    }
    print(table(record))
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def table(record: Mapping[str, Any]) -> str:
    """Return the table of a record."""
    first = record["ways"]["engine"]["tokens_per_second"]
    return markdown_table(
        ("drafts", "accepted tokens/s (range)", "`engine` / this", "passed", "same greedy texts"),
        [
            (
                f"`{way}`",
                f"{one['tokens_per_second']:.1f} ({one['lowest']:.1f} to {one['highest']:.1f})",
                f"{first / one['tokens_per_second']:.2f}",
                f"{one['acceptance']:.0%}",
                f"{one['same_greedy_texts']:.0%}",
            )
            for way, one in record["ways"].items()
        ],
    )


def _greedy(params: StarsParams) -> StarsParams:
    return StarsParams(
        method="vanilla",
        temperature=0.0,
        segment_length=params.segment_length,
        max_tokens=params.segment_length,
    )


def _texts(engine: BatchEngine, prompts: list[str], params: StarsParams) -> list[str]:
    outputs = engine.generate(prompts, params, use_tqdm=False)
    for output in outputs:
        if output.error is not None:
            raise SystemExit(output.error)
    return [output.outputs[0].text for output in outputs]


def _turns(
    engine: BatchEngine,
    prompts: list[str],
    params: StarsParams,
    repeats: int,
    count: Callable[[list[str]], int],
) -> dict[str, Any]:
    """Run all requests once to warm up, then `repeats` times; the same seeds by all ways."""
    rates, attempts, passed = [], 0, 0
    for repeat in range(repeats + 1):
        seeded = [replace(params, seed=1000 * repeat + i) for i in range(len(prompts))]
        begun = time.perf_counter()
        outputs = engine.generate(prompts, seeded, use_tqdm=False)
        seconds = time.perf_counter() - begun
        for output in outputs:
            if output.error is not None:
                raise SystemExit(output.error)
        if not repeat:
            continue
        responses = [output.outputs[0] for output in outputs]
        texts = [response.text for response in responses]
        rates.append(count(texts) / seconds)
        segments = [segment for response in responses for segment in response.segments]
        attempts += sum(segment.attempts for segment in segments)
        passed += sum(segment.accepted == "test" for segment in segments)
    return {
        "tokens_per_second": float(np.median(rates)),
        "lowest": min(rates),
        "highest": max(rates),
        "acceptance": passed / attempts,
    }


def _ways(options: argparse.Namespace, folder: Path) -> dict[str, Opens | str]:
    """What opens each way's engine, by name, or why there is none; the engine is the first."""
    model = str(options.model)
    ways: dict[str, Opens | str] = {
        "engine": lambda: contextlib.nullcontext(Engine(model, reward)),
        "engine int8": lambda: contextlib.nullcontext(Engine(model, reward, quantize="int8")),
    }
    why = "without --llama-python" if options.llama_python is None else ""
    if not why and find_spec("gguf") is None:
        why = "gguf is not installed"
    for kind in ("Q8_0", "float32"):
        opens = partial(_on_llama, options, folder, kind)
        ways[f"remote llama.cpp {kind}"] = why or opens
    ways["remote vllm"] = "without --vllm-python"
    if options.vllm_python is not None:
        ways["remote vllm"] = partial(_on_vllm, options, folder)
    return ways


@contextmanager
def _on_llama(options: argparse.Namespace, folder: Path, kind: str) -> Iterator[BatchEngine]:
    file, log = folder / f"{kind}.gguf", folder / f"{kind}.log"
    runpy.run_path(str(_SCRIPT))["write"](options.model, file, q8_0=kind == "Q8_0")
    command = [options.llama_python, "-m", "llama_cpp.server", "--model", str(file)]
    command += ["--n_ctx", str(_CONTEXT), "--host", "127.0.0.1", "--port", "0"]
    command += ["--verbose", "False"]
    for flag in ("--n_threads", "--n_threads_batch"):
        command += [flag, str(options.threads)]
    with (
        started(command, log) as (url, _),
        RemoteEngine(f"{url}/v1", reward_model=reward, server="llama-cpp-python") as engine,
    ):
        yield engine


@contextmanager
def _on_vllm(options: argparse.Namespace, folder: Path) -> Iterator[BatchEngine]:
    flags = ["--max-model-len", str(_CONTEXT), "--block-size", "32"]
    served = vllm_server(
        str(options.model), folder / "vllm.log", None, flags,
        python=options.vllm_python, threads=options.threads,
    )  # fmt: skip
    with (
        served as (url, _),
        RemoteEngine(f"{url}/v1", tokenizer=str(options.model), reward_model=reward) as engine,
    ):
        yield engine


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a Llama with tied embeddings, in float32")
    add("--llama-python", help="a Python that has llama-cpp-python[server]")
    add("--vllm-python", help="a Python that has vLLM for CPUs")
    add("--requests", type=number(int, low=1), default=8)
    add("--segment-length", type=number(int, low=1), default=16, help="K")
    add("--max-tokens", type=number(int, low=1), default=32, help="M")
    add("--repeats", type=number(int, low=1), default=2)
    add("--threads", type=number(int, low=1), default=torch.get_num_threads())
    add("--out", type=Path, help="where to write the figures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
