"""The memory of an engine with two float32 models on a CPU, against weights and pages in use.

    python -m stars_fast.benchmarks.memory MODEL_DIR REWARD_DIR [--loaded] [--tokens 32]

Runs in a process of its own, since memory that is freed does not all go back to the system. The
demo's models run first, so that what libraries take is not counted. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from stars_fast import Engine, StarsParams
from stars_fast.benchmarks.flags import number

_REQUESTS = 8
_PROMPT = 24  # tokens
_MiB = 1 << 20


def in_a_process(model: Path, reward: Path, *, loaded: bool, tokens: int) -> dict[str, float]:
    """Return what `measure` does, run in a process of its own."""
    command = [sys.executable, "-m", "stars_fast.benchmarks.memory", str(model), str(reward)]
    command += ["--tokens", str(tokens), *(["--loaded"] if loaded else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{done.stderr[-4000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(model: Path, reward: Path, *, loaded: bool, tokens: int) -> dict[str, float]:
    """Make an engine, run STARS on some requests, and look at this process.

    Parameters
    ----------
    model, reward
        Directories of a language model and of a classifier, saved in float32.
    loaded
        Give the engine models that are loaded already, which keep their weights.
    tokens
        Of each response.

    Returns
    -------
    dict
        In MiB: ``weights``, the files' size; ``pages``, of both pools, at the round with the most;
        ``resident`` and ``peak``, the process' memory above what it was before, and its
        ``anonymous`` part, which the system cannot read again from a file. ``ratio`` is resident
        memory over weights and pages, ``peak_ratio`` likewise.
    """
    params = StarsParams(segment_length=8, max_tokens=tokens, target_reward=0.0, ignore_eos=True)
    first = Engine.demo(num_pages=100, reward_num_pages=100)
    first.generate(["The film"], params, use_tqdm=False)
    del first
    before = _status()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    tokenizer = AutoTokenizer.from_pretrained(model)
    models: list[Any] = [str(model), str(reward)]
    if loaded:
        models = [
            AutoModelForCausalLM.from_pretrained(model).eval(),
            AutoModelForSequenceClassification.from_pretrained(reward).eval(),
        ]
    engine = Engine(
        *models, tokenizer=tokenizer, reward_tokenizer=tokenizer, reward_template="plain"
    )
    for at in range(_REQUESTS):
        engine.add_request(str(at), list(range(3 + at, 3 + at + _PROMPT)), params)
    most = 0.0
    while engine.has_unfinished():
        engine.step()
        most = max(most, engine.stats()["pages_used"])
    scorer: Any = engine.loop.scorer
    page = sum(x._pools.token_bytes * x.page_size for x in (engine._lm, scorer.model))
    after = _status()
    taken = {name: (after[name] - before[name]) / _MiB for name in ("VmRSS", "RssAnon")}
    peak = (after["VmHWM"] - before["VmRSS"]) / _MiB
    weights = sum(f.stat().st_size for x in (model, reward) for f in x.glob("*.safetensors"))
    needed = (weights + most * page) / _MiB
    return {
        "weights": weights / _MiB,
        "pages": most * page / _MiB,
        "resident": taken["VmRSS"],
        "anonymous": taken["RssAnon"],
        "peak": peak,
        "ratio": taken["VmRSS"] / needed,
        "peak_ratio": peak / needed,
    }


def _status() -> dict[str, int]:
    """Return this process' numbers of bytes, by their names in /proc."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {x[0].rstrip(":"): int(x[1]) << 10 for x in lines if len(x) == 3 and x[2] == "kB"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("reward", type=Path)
    parser.add_argument("--loaded", action="store_true", help="models that the user holds")
    parser.add_argument("--tokens", type=number(int, low=1), default=32)
    options = parser.parse_args(arguments)
    found = measure(options.model, options.reward, loaded=options.loaded, tokens=options.tokens)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
