"""Runs a step of the paper's setting: models, pools, target, and the observed run."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from stars_fast import Engine, StarsParams
from stars_fast.benchmarks import observe
from stars_fast.benchmarks.acceptance import target_for
from stars_fast.benchmarks.least import Machine
from stars_fast.benchmarks.measure import seconds_of
from stars_fast.benchmarks.models import (
    LLAMA_2_7B,
    LLAMA_3_1_8B,
    ONE_BILLION,
    TINY,
    id_engine,
    language_model,
    prompts,
    reward_model,
)
from stars_fast.benchmarks.paper_steps import CENTRE, Cell, Kind, Step
from stars_fast.benchmarks.roofline import PAGE_SIZE, max_rows, pages_needed, seeded
from stars_fast.benchmarks.setting import Setting, Tally
from stars_fast.models.pool import page_bytes

SHAPES = {"7B": LLAMA_2_7B, "8B": LLAMA_3_1_8B, "1B": ONE_BILLION, "tiny": TINY}

# Memory of a GPU that the pools leave to activations, logits and graphs.
RESERVED_BYTES = 6 << 30
# Tokens of a response, at most, in the runs that find a target.
TARGET_TOKENS = 128
# Prompts that the baselines take which run them one by one: without a cache, and with one.
LONE_PROMPTS = (1, 4)


class Bench:
    """Runs steps; keeps the models of the last one and the targets found so far.

    Parameters
    ----------
    device
        Where the models are.
    machine
        Its ceilings.
    small
        Whether cells are made small.
    """

    def __init__(self, device: torch.device, machine: Machine, *, small: bool) -> None:
        self._device = device
        self.machine = machine
        self._small = small
        self._dtype = torch.float32 if small else torch.bfloat16
        self._models: dict[str, tuple[str, Any]] = {}  # by role: the shapes' names, the model
        self._targets: dict[Cell, float] = {}  # by what acceptance depends on

    def measure(self, step: Step) -> dict[str, Any]:
        """Return the figures of a step, or its error."""
        cell = step.cell.small() if self._small else step.cell
        begun = time.perf_counter()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        try:
            found = self._measure(step.kind, cell)
        except Exception as error:  # noqa: BLE001 - the other steps are worth having
            # As text: the error itself holds the engine, and so the memory, through its frames.
            found = {"failed": f"{type(error).__name__}: {error}"[:2000]}
        found["cell"] = asdict(cell)
        found["seconds_in_all"] = time.perf_counter() - begun
        if self._device.type == "cuda":
            found["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self._device)
        self._clean()
        return found

    def _measure(self, kind: Kind, cell: Cell) -> dict[str, Any]:
        if kind == "first segment":
            return self._first_segment(cell)
        if kind == "overhead":
            return self._overhead(cell)
        if kind == "baselines":
            return self._baselines(cell)
        engine = self._engine(cell)
        asked = _prompts(cell, cell.requests)
        params = _vanilla(cell) if kind == "vanilla" else self._stars(engine, cell)
        observe.run(engine, asked, params, self.machine, batch=cell.batch)
        run = observe.run(engine, asked, params, self.machine, batch=cell.batch)
        return {**run.record(), **_pages(engine, cell)}

    def _first_segment(self, cell: Cell) -> dict[str, Any]:
        """Time a lone request's first segment, its K decode steps, and one pass of the rewards.

        The steps are those of an unaligned request, without its prefill; the pass is over a prompt
        and its segment, from nothing. Medians over prompts, the first left out.
        """
        engine = self._engine(cell)
        cell = replace(cell, max_tokens=cell.segment_length)
        stars, vanilla = self._stars(engine, cell)[:1], _vanilla(cell)[:1]
        taken: dict[str, list[float]] = {"first": [], "steps": [], "prefill": [], "pass": []}
        for ids in _prompts(cell, cell.requests):
            taken["first"] += observe.run(engine, [ids], stars, self.machine).first_segment
            plain = observe.run(engine, [ids], vanilla, self.machine)
            for phase in plain.phases:
                if phase.name in ("draft", "prefill"):
                    taken["steps" if phase.name == "draft" else "prefill"].append(phase.seconds)
            # Prompt and segment as one prompt: with a response behind it there would be two passes.
            begun = time.perf_counter()
            engine.score(ids + ids[: cell.segment_length], [""])
            taken["pass"].append(time.perf_counter() - begun)
        first, steps_, prefill, one_pass = (float(np.median(x[1:])) for x in taken.values())
        return {
            "first_segment_seconds_p50": first,
            "decode_steps_seconds": steps_,
            "reward_pass_seconds": one_pass,
            "prefill_seconds": prefill,
            "over": first / (steps_ + one_pass) - 1,
        }

    def _overhead(self, cell: Cell) -> dict[str, Any]:
        """Time alignment and plain sampling of the same requests in turn."""
        engine = self._engine(cell)
        repeats = 1 if self._small else 3
        asked = _prompts(cell, cell.requests)
        sides = {"stars": self._stars(engine, cell), "vanilla": _vanilla(cell)}
        runs: dict[str, list[observe.Run]] = {name: [] for name in sides}
        for _ in range(repeats + 1):
            for name, params in sides.items():
                runs[name].append(observe.run(engine, asked, params, self.machine))
        middle = {
            name: sorted(of[1:], key=lambda run: run.seconds)[repeats // 2]
            for name, of in runs.items()
        }
        return {
            "over": middle["stars"].seconds / middle["vanilla"].seconds - 1,
            **{name: run.record() for name, run in middle.items()},
            **_pages(engine, cell),
        }

    def _baselines(self, cell: Cell) -> dict[str, Any]:
        """Time the engine and the baselines on the same prompts; tokens per second, and how often.

        The loops that take one prompt after the other take but a few of them, and their rate is
        that of those.
        """
        engine = self._engine(cell)
        params = self._stars(engine, cell)[0]
        asked = _prompts(cell, cell.requests)
        language, reward = self._take_models(cell)
        setting = Setting(language, reward, engine, asked, len(asked), params, first_seed=0)
        lone, some = (asked[:count] for count in LONE_PROMPTS)
        sides: dict[str, list[Callable[[], Tally]]] = {
            "ours": [setting.run_engine],
            "a": [lambda: setting.run_one_by_one(lone, cached=False)],
            "b": [lambda: setting.run_one_by_one(some, cached=True)],
            "c": [setting.run_lockstep],
            "d": [functools.partial(setting.run_continuous, n) for n in (1, 2)],
        }
        setting.run_engine()  # captures
        rates: dict[str, float] = {}
        for side, forms in sides.items():
            for run in forms:
                given: list[Tally] = []
                seconds = seconds_of(lambda: given.append(run()), self._device)  # noqa: B023 - now
                rates[side] = max(rates.get(side, 0.0), given[0].tokens / seconds)
                if not setting.reference.same_acceptance(given[0]):
                    raise RuntimeError(
                        f"baseline ({side}) accepts {given[0].acceptance:.0%}, the engine "
                        f"{setting.reference.acceptance:.0%}"
                    )
        return {
            "accepted_tokens_per_second": rates["ours"],
            **{f"tokens_per_second_{side}": rates[side] for side in "abcd"},
            **{f"times_{side}": rates["ours"] / rates[side] for side in "abcd"},
        }

    def _stars(self, engine: Engine, cell: Cell) -> list[StarsParams]:
        """Return aligned parameters of each request, at the cell's acceptance rate."""
        # The threshold is the target throughout, so that it holds for any number of tokens.
        plain = StarsParams(
            segment_length=cell.segment_length,
            max_tokens=cell.max_tokens,
            candidates=cell.candidates,
            alpha=1.0,
            ignore_eos=True,
        )
        count = min(cell.requests, CENTRE.requests)
        short = replace(plain, max_tokens=min(cell.max_tokens, TARGET_TOKENS))
        key = replace(
            cell,
            batch=1,
            requests=count,
            max_tokens=short.max_tokens,
            candidates=1,
            kv_dtype="auto",
        )
        if key not in self._targets:
            # A rate moves in steps of about one attempt.
            segments = count * -(-short.max_tokens // cell.segment_length)
            self._targets[key] = target_for(
                engine,
                _prompts(cell, count),
                short,
                cell.acceptance,
                tolerance=max(0.2 if self._small else 0.04, 1 / segments),
            )
        return seeded(replace(plain, target_reward=self._targets[key]), cell.requests)

    def _engine(self, cell: Cell) -> Engine:
        """Return an engine whose pools fit the cell, or what memory is left."""
        language, reward = self._take_models(cell)
        rows = max_rows(cell.batch, cell.candidates)
        pages = _pages_wanted(cell)
        if self._device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._device)
            a_page = sum(page_bytes(x, PAGE_SIZE, cell.kv_dtype) for x in (language, reward))
            pages = min(pages, max(2, (free - RESERVED_BYTES) // a_page))
        on_kernels = self._device.type == "cuda" or cell.kv_dtype == "fp8"
        return id_engine(
            language,
            reward,
            SHAPES[cell.language],
            page_size=PAGE_SIZE,
            num_pages=pages,
            reward_num_pages=pages,
            max_rows=rows,
            prefix_caching=False,  # so that a repeat prefills again
            kv_dtype=cell.kv_dtype,
            backend="triton" if on_kernels else "pytorch",
            device_timing=self._device.type == "cuda",
        )

    def _take_models(self, cell: Cell) -> tuple[Any, Any]:
        """Return the cell's models; those of the step before that are not wanted go first."""
        vocabulary = SHAPES[cell.language].vocab_size
        wanted = {
            "language": (cell.language, SHAPES[cell.language], language_model),
            "reward": (
                f"{cell.reward} beside {cell.language}",
                replace(SHAPES[cell.reward], vocab_size=vocabulary),
                reward_model,
            ),
        }
        self._models = {
            role: held for role, held in self._models.items() if held[0] == wanted[role][0]
        }
        self._clean()
        for role, (name, shape, make) in wanted.items():
            if role not in self._models:
                self._models[role] = name, make(shape, device=self._device, dtype=self._dtype)
        return self._models["language"][1], self._models["reward"][1]

    def _clean(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _prompts(cell: Cell, count: int) -> list[list[int]]:
    return prompts(SHAPES[cell.language], count, cell.prompt, cell.prompt)


def _vanilla(cell: Cell) -> list[StarsParams]:
    """Return unaligned parameters of each request."""
    plain = StarsParams(
        method="vanilla",
        segment_length=cell.segment_length,
        max_tokens=cell.max_tokens,
        ignore_eos=True,
    )
    return seeded(plain, cell.requests)


def _pages_wanted(cell: Cell) -> int:
    rows = max_rows(cell.batch, cell.candidates)
    return pages_needed(
        cell.batch, rows, cell.prompt, cell.max_tokens, cell.segment_length, PAGE_SIZE
    )


def _pages(engine: Engine, cell: Cell) -> dict[str, int]:
    """Return the pages of each pool; where they are fewer than wanted, some requests wait."""
    stats = engine.stats()
    return {
        "pages": 1 + int(stats["pages_used"] + stats["pages_free"]),  # the first holds nothing
        "pages_wanted": _pages_wanted(cell),
        "reward_evictions": int(stats.get("rm_evictions", 0)),
    }
