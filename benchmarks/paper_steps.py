"""The steps of the paper's setting, and the figures that the project aims at there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from stars_fast.config import KvDtype

Kind = Literal["stars", "vanilla", "first segment", "overhead", "baselines"]


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
        Step("baselines", CENTRE, "baselines"),
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
    Target("times (a), the public loop", "baselines", "times_a", 50, True),
    Target("times (b), the same with a cache", "baselines", "times_b", 8, True),
    Target("times (c), the same as a batch in lockstep", "baselines", "times_c", 3, True),
    Target("times (d), transformers' continuous batching", "baselines", "times_d", 2, True),
)


def judged(recorded: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return every target with what was measured.

    Parameters
    ----------
    recorded
        Figures by step; a step may be missing, or hold its error alone.
    """
    return [target.judge(recorded) for target in TARGETS]
