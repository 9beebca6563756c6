"""The paper's setting (arXiv 2511.03827) on a GPU, one axis at a time.

    python benchmarks/paper.py [--out results/NAME.json] [--minutes 8] [--only STEP ...]

Language and reward model have the shape of Llama-2-7B and random weights: what is measured is the
engine, not the text. The acceptance rate is set by the target reward. Steps, the most important
first:

``centre``          batch 64, K 15, M 128, prompt 128, candidates auto, 50 % accepted, bfloat16
``vanilla``         the same without alignment: the floor
``first segment``   at batch 1, against K decode steps and one pass of the reward model
``overhead``        all accepted, a small reward model: time over that of ``vanilla``
others              the centre with one setting changed, named after it

After ``--minutes`` no further step begins, and what was left out is listed. A step that fails is
recorded with its error. The requests of a batch are there from its start; the same ones run once
before, so that what is timed neither compiles nor captures.

Without a GPU, or with ``--small``, the same steps run on models of a few thousand parameters: that
the code works is all this shows, and nothing is written.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from stars_fast.benchmarks.interpreter import ON_GPU, interpret_without_gpu

interpret_without_gpu()

import numpy as np  # noqa: E402 - after the choice of the interpreter
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from stars_fast import Engine, StarsParams  # noqa: E402
from stars_fast.benchmarks import observe  # noqa: E402
from stars_fast.benchmarks.acceptance import target_for  # noqa: E402
from stars_fast.benchmarks.least import Machine  # noqa: E402
from stars_fast.benchmarks.measure import ceilings, default_device, header  # noqa: E402
from stars_fast.benchmarks.models import (  # noqa: E402
    LLAMA_2_7B,
    LLAMA_3_1_8B,
    ONE_BILLION,
    TINY,
    id_tokenizer,
    language_model,
    prompts,
    reward_model,
)
from stars_fast.benchmarks.roofline import (  # noqa: E402
    PAGE_SIZE,
    max_rows,
    pages_needed,
    seeded,
)
from stars_fast.models.pool import KvDtype, page_bytes  # noqa: E402

HERE = Path(__file__).resolve().parent
SHAPES = {"7B": LLAMA_2_7B, "8B": LLAMA_3_1_8B, "1B": ONE_BILLION, "tiny": TINY}

# Memory of a GPU that the pools leave to activations, logits and graphs.
RESERVED_BYTES = 6 << 30
# Tokens of a response, at most, in the runs that find a target.
TARGET_TOKENS = 128

Kind = Literal["stars", "vanilla", "first segment", "overhead"]


# What is measured


@dataclass(frozen=True)
class Cell:
    """A setting.

    Attributes
    ----------
    language, reward
        Names of shapes in `SHAPES`; the reward model takes the language model's vocabulary.
    batch, requests
        Requests that are there at once, and in all: a small batch is measured several times, since
        prompts differ much in how many attempts they take.
    segment_length, max_tokens, prompt
        K, M, and tokens of each prompt.
    candidates, acceptance, kv_dtype
        As for `StarsParams`; part of the attempts that pass; as for `Engine`.
    """

    language: str = "7B"
    reward: str = "7B"
    batch: int = 64
    requests: int = 64
    segment_length: int = 15
    max_tokens: int = 128
    prompt: int = 128
    candidates: int | Literal["auto"] = "auto"
    acceptance: float = 0.5
    kv_dtype: KvDtype = "auto"

    def small(self) -> Cell:
        """Return the same setting for a run in seconds."""
        made = replace(
            self,
            language="tiny",
            reward="tiny",
            batch=min(self.batch, 4),
            requests=min(self.requests, 4),
            segment_length=max(2, self.segment_length // 6),
            max_tokens=16 if self.max_tokens <= 128 else 24,
            prompt=8 if self.prompt <= 128 else 24,
        )
        if self.kv_dtype == "auto":
            return made
        # On the kernels, and so in Triton's interpreter.
        return replace(
            made, batch=1, requests=1, max_tokens=4, prompt=4, candidates=1, acceptance=1.0
        )


@dataclass(frozen=True)
class Step:
    """A measurement of a cell, by its name."""

    name: str
    cell: Cell
    kind: Kind = "stars"


CENTRE = Cell()


def steps() -> list[Step]:
    """Return every step, the most important first."""

    def varied(name: str, **changed: Any) -> Step:
        return Step(name, replace(CENTRE, **changed))

    lone = replace(CENTRE, batch=1, requests=8, acceptance=1.0)
    return [
        Step("centre", CENTRE),
        Step("vanilla", CENTRE, "vanilla"),
        Step("first segment", lone, "first segment"),
        Step("overhead", replace(CENTRE, reward="1B", acceptance=1.0), "overhead"),
        *(varied(f"batch {n}", batch=n, requests=m) for n, m in ((1, 16), (256, 256), (16, 64))),
        *(varied(f"acceptance {p:.0%}", acceptance=p) for p in (1.0, 0.8, 0.3)),
        *(varied(f"candidates {n}", candidates=n) for n in (1, 4, 8)),
        *(varied(f"K {k}", segment_length=k) for k in (30, 60, 8)),
        varied("fp8 KV", kv_dtype="fp8"),
        varied("prompt 2048", prompt=2048),
        varied("1B models", language="1B", reward="1B"),
        varied("8B models", language="8B", reward="8B"),
        varied("M 1024", max_tokens=1024),
    ]


# What is asked for


@dataclass(frozen=True)
class Target:
    """A figure that the project aims at, and where a record has it.

    Attributes
    ----------
    name
        With its unit.
    step, key
        The step, and the name of the figure in its record.
    bound
        Largest, or with `at_least` smallest, value that meets it.
    """

    name: str
    step: str
    key: str
    bound: float
    at_least: bool = False

    def judge(self, recorded: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return the target, the value measured and whether it is met; None where it was not."""
        found = recorded.get(self.step, {}).get(self.key)
        met = None
        if found is not None:
            met = found >= self.bound if self.at_least else found <= self.bound
        sign = "at least" if self.at_least else "at most"
        return {"name": self.name, "asked": f"{sign} {self.bound:g}", "measured": found, "met": met}


TARGETS = (
    Target("accepted tokens/s at the centre", "centre", "accepted_tokens_per_second", 4600, True),
    Target("share of the roofline at the centre", "centre", "share_of_the_least", 0.6, True),
    Target("alignment over vanilla, all accepted, small reward model", "overhead", "over", 0.1),
    Target("first segment over K steps and one reward pass", "first segment", "over", 0.15),
)


def judged(recorded: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return every target with what was measured.

    Parameters
    ----------
    recorded
        Figures by step; a step may be missing, or hold its error alone.
    """
    return [target.judge(recorded) for target in TARGETS]


# Measuring


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
        self._machine = machine
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
        engine = self._engine(cell)
        asked = _prompts(cell, cell.requests)
        params = _vanilla(cell) if kind == "vanilla" else self._stars(engine, cell)
        observe.run(engine, asked, params, self._machine, batch=cell.batch)
        run = observe.run(engine, asked, params, self._machine, batch=cell.batch)
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
            taken["first"] += observe.run(engine, [ids], stars, self._machine).first_segment
            plain = observe.run(engine, [ids], vanilla, self._machine)
            for phase in plain.phases:
                if phase.name in ("draft", "prefill"):
                    taken["steps" if phase.name == "draft" else "prefill"].append(phase.seconds)
            # Prompt and segment as one prompt: with a response behind it there would be two passes.
            whole = engine._reader.read(ids + ids[: cell.segment_length], 0)
            begun = time.perf_counter()
            engine._loop.score_whole([(whole, [], "")])
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
                runs[name].append(observe.run(engine, asked, params, self._machine))
        middle = {
            name: sorted(of[1:], key=lambda run: run.seconds)[repeats // 2]
            for name, of in runs.items()
        }
        return {
            "over": middle["stars"].seconds / middle["vanilla"].seconds - 1,
            **{name: run.record() for name, run in middle.items()},
            **_pages(engine, cell),
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
        tokenizer = id_tokenizer(SHAPES[cell.language])
        on_kernels = self._device.type == "cuda" or cell.kv_dtype == "fp8"
        return Engine(
            language,
            reward,
            tokenizer=tokenizer,
            reward_tokenizer=tokenizer,
            reward_template="plain",
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
    scorer = engine._scorer
    return {
        "pages": engine._lm.num_pages,
        "pages_wanted": _pages_wanted(cell),
        "reward_evictions": 0 if scorer is None else scorer.stats().get("rm_evictions", 0),
    }


# The run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; return how many failed."""
    options = _parser().parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    small = options.small or not ON_GPU
    device = default_device()
    machine = ceilings(device, torch.float32 if small else torch.bfloat16, quick=small)
    command = " ".join(["python benchmarks/paper.py", *given])
    record: dict[str, Any] = {
        **header(command, device, options.commit),
        "weights": "random, so the acceptance rate is set by the target reward",
        "machine": asdict(machine),
        "steps": {},
        "left_out": [],
    }
    if small:
        print("small models, to see that the code works: no figures, nothing is written")
    chosen = [step for step in steps() if not options.only or step.name in options.only]
    bench = Bench(device, machine, small=small)
    begun = time.monotonic()
    with tqdm(chosen, unit="step", file=sys.stdout) as bar:
        for number, step in enumerate(bar):
            if time.monotonic() - begun > 60 * options.minutes:
                record["left_out"] = [step.name for step in chosen[number:]]
                break
            bar.set_description(step.name)
            record["steps"][step.name] = bench.measure(step)
            bar.write(line(step.name, record["steps"][step.name], small=small))
            record["targets"] = judged(record["steps"])
            _write(record, None if small else options.out)
    _write(record, None if small else options.out)
    print(f"\nrandom weights; left out: {', '.join(record['left_out']) or 'nothing'}")
    if not small:
        print(targets_table(judged(record["steps"])))
    return sum("failed" in found for found in record["steps"].values())


def _write(record: dict[str, Any], out: Path | None) -> None:
    if out is None:
        return
    target = HERE / out
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def line(name: str, found: Mapping[str, Any], *, small: bool = False) -> str:
    """Return a step's figures in a line or two; `small`: that it ran, and no figures."""
    if "failed" in found:
        return f"{name:<16} FAILED: {found['failed'][:300]}"
    if small:
        return f"{name:<16} ran"
    if "decode_steps_seconds" in found:
        parts = {
            "first segment": found["first_segment_seconds_p50"],
            "K steps": found["decode_steps_seconds"],
            "reward pass": found["reward_pass_seconds"],
            "prefill": found["prefill_seconds"],
        }
        shown = ", ".join(f"{label} {1e3 * value:.1f} ms" for label, value in parts.items())
        return f"{name:<16} {shown}: {found['over']:+.1%}"
    if "over" in found:
        shown = ", ".join(
            f"{side} {found[side]['accepted_tokens_per_second']:,.0f} tokens/s"
            for side in ("stars", "vanilla")
        )
        return f"{name:<16} {shown}: {found['over']:+.1%}"
    ratios = ", ".join(
        f"{phase['name']} {phase['measured_over_least']:.2f}"
        for phase in found["phases"]
        if phase["measured_over_least"] is not None
    )
    memory = f", {found['peak_memory_bytes'] / 1e9:.1f} GB" if "peak_memory_bytes" in found else ""
    return (
        f"{name:<16} {found['accepted_tokens_per_second']:,.0f} accepted tokens/s, "
        f"{found['drafted_tokens_per_second']:,.0f} drafted, {found['acceptance_rate']:.0%} pass, "
        f"first segment {1e3 * found['first_segment_seconds_p50']:.0f} ms, "
        f"{found['share_of_the_least']:.0%} of the roofline\n"
        f"{'':<16} measured / least: {ratios}; pages {found['pages_used']} of {found['pages']}"
        f"{memory}"
    )


def targets_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the targets beside what was measured, a line each."""
    words = {None: "not measured", True: "met", False: "missed"}
    lines = []
    for target in found:
        value = "-" if target["measured"] is None else f"{target['measured']:.4g}"
        lines.append(
            f"{target['name']:<58} {target['asked']:>14}  {value:>9}  {words[target['met']]}"
        )
    return "\n".join(lines)


# The command line


def _parser() -> argparse.ArgumentParser:
    names = [step.name for step in steps()]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, help="where to write the figures, from benchmarks/")
    add("--commit", default=None, help="if the checkout has no .git")
    add("--minutes", type=_minutes, default=8.0, help="after which no further step begins")
    shown = ", ".join(names).replace("%", "%%")
    add("--only", nargs="+", choices=names, metavar="STEP", help=shown)
    add("--small", action="store_true", help="tiny models; always so without a GPU")
    return parser


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
