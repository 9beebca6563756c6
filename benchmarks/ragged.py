"""What segments of unequal length cost: rounds that wait for their longest row, or go on without.

    python -m stars_fast.benchmarks.ragged --model DIR --out ragged.json

STARS with segments that end at clauses, on a language model and a reward model of its first layers
(its head is random, the target a quantile of what plain samples get), or on the demo's models.
Both ways draw the same tokens, in one process, beside plain sampling. Printed are seconds,
operations, forward passes of the language model, the rows of these (row-steps), and the share of
them whose row had ended.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from stars_fast import Engine, StarsParams
from stars_fast.benchmarks.measure import default_device, header
from stars_fast.demo import model_dir, reward_model_dir
from stars_fast.demo.openings import prompts as openings
from stars_fast.eval.cost import cost_of
from stars_fast.tables import text_table

_ATTEMPTS = 4
_QUANTILE = 0.7  # of plain samples' rewards: the target


@dataclass(frozen=True)
class Run:
    """One run of all prompts.

    Attributes
    ----------
    token_ids
        Of each response.
    seconds
        From the first round to the last.
    flops
        See `stars_fast.eval.cost`.
    calls, row_steps
        Forward passes of the language model, and their rows in decode steps.
    idle
        Share of the row-steps whose row had ended.
    """

    token_ids: list[list[int]]
    seconds: float
    flops: float
    calls: int
    row_steps: int
    idle: float


class Ragged:
    """The engine, its prompts, and both sides.

    Parameters
    ----------
    model
        Directory of a causal LM with its tokenizer; None: the demo's models.
    prompts
        How many.
    max_tokens
        Of a response.
    max_rows
        Of the engine.
    """

    def __init__(
        self, model: str | None, *, prompts: int, max_tokens: int, max_rows: int = 256
    ) -> None:
        self.engine = _engine(model, max_rows)
        self.prompts = openings(prompts)
        self.plain = StarsParams(
            method="vanilla", segment_length=32, max_tokens=max_tokens, temperature=1.0,
            ignore_eos=True,
        )  # fmt: skip
        outputs = self.engine.generate(self.prompts, self._each(self.plain), use_tqdm=False)
        texts = [output.outputs[0].text for output in outputs]
        rewards = np.array(self.engine.score(self.prompts, texts))
        self.stars = self.plain.with_method(
            "stars", segment_end="clause", target_reward=float(np.quantile(rewards, _QUANTILE)),
            alpha=1.0, beta=max(1e-3, float(rewards.std()) / 4), max_attempts=_ATTEMPTS,
        )  # fmt: skip

    def _each(self, params: StarsParams) -> list[StarsParams]:
        return [replace(params, seed=seed) for seed in range(len(self.prompts))]

    def run(self, params: StarsParams, *, spans: bool) -> Run:
        """Run all prompts; `spans`: rounds may end before all of their rows have."""
        engine = self.engine
        if engine.loop.pace is not None:
            engine.loop.pace.spans = spans
        before, begun = engine.stats(), time.perf_counter()
        outputs = engine.generate(self.prompts, self._each(params), use_tqdm=False)
        seconds, after = time.perf_counter() - begun, engine.stats()
        failed = next((output.error for output in outputs if output.error is not None), None)
        if failed is not None:
            raise RuntimeError(f"a request failed: {failed}")
        cost = cost_of(
            before, after, seconds=seconds, parameters=engine.num_parameters(),
            prompt_tokens=sum(len(output.prompt_token_ids) for output in outputs),
        )  # fmt: skip
        row_steps = int(after["row_steps"] - before["row_steps"])
        return Run(
            token_ids=[output.outputs[0].token_ids for output in outputs],
            seconds=seconds,
            flops=cost.flops,
            calls=cost.lm_calls,
            row_steps=row_steps,
            idle=1 - cost.drafted_tokens / row_steps,
        )

    def warm_up(self) -> None:
        """Let the engine learn what a round costs and how often an attempt is accepted."""
        self.run(replace(self.stars, max_tokens=16), spans=True)

    def sides(self) -> dict[str, Run]:
        """Run plain sampling, whole rounds and spanning ones, in turn."""
        return {
            "plain": self.run(self.plain, spans=True),
            "whole": self.run(self.stars, spans=False),
            "spanning": self.run(self.stars, spans=True),
        }


def _engine(directory: str | None, max_rows: int) -> Engine:
    device = default_device()
    if directory is None:
        return Engine(
            str(model_dir()), str(reward_model_dir()), device=str(device), max_rows=max_rows
        )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = AutoConfig.from_pretrained(directory)
    layers = max(1, config.num_hidden_layers * 3 // 4)
    torch.manual_seed(1)
    reward: Any = AutoModelForSequenceClassification.from_pretrained(
        directory, num_hidden_layers=layers, num_labels=1, dtype=torch.float32
    )
    reward.config.pad_token_id = reward.config.pad_token_id or 0
    with torch.no_grad():
        reward.score.weight.normal_(std=config.hidden_size**-0.5)
    return Engine(
        directory, reward.to(device).eval(), device=str(device), max_rows=max_rows,
        reward_tokenizer=tokenizer, reward_template="plain",
    )  # fmt: skip


def summary(runs: Sequence[dict[str, Run]]) -> list[dict[str, float | str]]:
    """Return a row of each side: medians of its seconds, the rest of its last run."""
    seconds = {name: statistics.median(run[name].seconds for run in runs) for name in runs[0]}
    plain = runs[-1]["plain"]
    rows: list[dict[str, float | str]] = []
    for name, run in runs[-1].items():
        relative = seconds[name] / seconds["plain"], run.flops / plain.flops
        rows.append(
            {
                "side": name, "seconds": seconds[name], "seconds_over_plain": relative[0],
                "flops_over_plain": relative[1], "seconds_over_flops": relative[0] / relative[1],
                "lm_calls": run.calls, "row_steps": run.row_steps, "idle": run.idle,
            }
        )  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="directory of a causal LM (default: the demo's models)")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", metavar="FILE", help="write the record as JSON")
    args = parser.parse_args(arguments)
    ragged = Ragged(args.model, prompts=args.prompts, max_tokens=args.max_tokens)
    ragged.warm_up()
    runs = [ragged.sides() for _ in range(args.repeats)]
    found = summary(runs)
    head = tuple(found[0])
    cells = [
        tuple(f"{v:.3g}" if isinstance(v, float) else str(v) for v in r.values()) for r in found
    ]
    print("\n".join(text_table([head, *cells], left=(0,))))
    alike = sum(
        a == b
        for a, b in zip(runs[-1]["whole"].token_ids, runs[-1]["spanning"].token_ids, strict=True)
    )
    print(f"the same tokens both ways: {alike} of {args.prompts} responses")
    if args.out:
        record = header("python -m stars_fast.benchmarks.ragged", default_device())
        text = json.dumps(record | {"ragged": found}, indent=1)
        Path(args.out).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
