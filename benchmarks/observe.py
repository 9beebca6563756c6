"""An observed run of an engine: what each phase had to do at the least, beside what it took.

The loop hands over each round that is drafted (`Loop.on_round`); its plan is kept with the lengths
that were drawn. The sums are made after the run, so that they cost it nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel

from stars_fast import Engine, StarsParams, _core
from stars_fast.benchmarks.least import Machine, ModelCost, Work, copy_work, forward_work, seen_keys
from stars_fast.benchmarks.measure import synchronize
from stars_fast.engine.loop import PHASES
from stars_fast.engine.round import Round
from stars_fast.models.paged import PagedModel
from stars_fast.rewards.causal import CausalScorer

#: Phases that have work to do; `plan` and `commit` have none that a machine's ceilings bound.
WORKING = ("fork", "prefill", "draft", "score")

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EngineCost:
    """What a token costs in an engine's models.

    Attributes
    ----------
    step
        In a decode step: the language model with its head.
    prefill
        In a prefill: the language model without its head.
    score
        In the reward model without its head, which a row asks once; None if the reward model is of
        a kind that does not run on pages.
    """

    step: ModelCost
    prefill: ModelCost
    score: ModelCost | None

    @classmethod
    def of(cls, engine: Engine) -> EngineCost:
        """Costs of an engine's models, in the dtypes that they and their pages have."""
        lm, scorer = engine.loop.model, engine.loop.scorer
        assert isinstance(lm, PagedModel)
        return cls(
            step=_cost(lm, lm.model),
            prefill=_cost(lm, _backbone(lm)),
            score=_cost(scorer.model, _backbone(scorer.model))
            if isinstance(scorer, CausalScorer)
            else None,
        )


def _cost(paged: PagedModel, module: PreTrainedModel) -> ModelCost:
    return ModelCost.of(module, kv_dtype=paged.kv_dtype)


def _backbone(paged: PagedModel) -> PreTrainedModel:
    return cast(PreTrainedModel, paged.model.base_model)


# The least work of a round


@dataclass(frozen=True)
class Drawn:
    """A round that was drawn: its plan, and the new tokens of each row of its draft.

    `read` are the tokens that the reward model reads of each row, those held included, and `scored`
    says of which it does.
    """

    plan: _core.Plan
    lengths: Ints
    read: Ints
    scored: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, done: Round) -> Drawn:
        """Return what matters of a round."""
        return cls(
            plan=done.plan,
            lengths=done.draft.lengths.astype(np.int64),
            read=done.lengths.astype(np.int64),
            scored=np.array([response.scored for response in done.responses], np.bool_)
            & np.array(done.decided, np.bool_),
        )


def round_passes(drawn: Drawn, cost: EngineCost) -> dict[str, list[Work]]:
    """Return the forward passes and copies that a round cannot do without, by phase.

    A decode step is a pass of its own, since it needs the token before. Prefill and scoring are one
    pass each: prompts whose r(x) is needed are run with the segments behind them. The prefix of a
    request is read once for all of its rows; one that several requests share counts for each.
    """
    plan = drawn.plan
    copied = int(plan.copies[2].sum())
    return {
        "fork": [copy_work(cost.step, copied)] if copied else [],
        "prefill": _prefill_passes(plan.prefill, cost.prefill),
        "draft": _draft_passes(plan.draft, drawn.lengths, cost.step),
        "score": [] if cost.score is None else _score_passes(drawn, cost.score),
    }


def _prefill_passes(batch: _core.Batch, cost: ModelCost) -> list[Work]:
    start, new = batch.row_start.astype(np.int64), batch.new_lengths.astype(np.int64)
    if not len(new):
        return []
    return [forward_work(cost, int(new.sum()), int(start.sum()), seen_keys(start, new))]


def _draft_passes(batch: _core.Batch, lengths: Ints, cost: ModelCost) -> list[Work]:
    start = batch.row_start.astype(np.int64)
    passes = []
    for step in range(int(lengths.max(initial=0))):
        live = lengths > step
        tokens = int(live.sum())
        prefix = _once_a_group(batch.row_group[live], start[live]) + tokens * step
        passes.append(forward_work(cost, tokens, prefix, int((start[live] + step + 1).sum())))
    return passes


def _score_passes(drawn: Drawn, cost: ModelCost) -> list[Work]:
    plan, scored = drawn.plan, drawn.scored
    if not scored.any():
        return []
    # A segment's first token follows the last committed one, which its first decode step feeds.
    own = plan.draft.row_start.astype(np.int64) + 1 - plan.drawn
    position = plan.position - plan.drawn
    request = np.concatenate((plan.request, plan.held))
    _, first, which = np.unique(request, return_index=True, return_inverse=True)
    start, position = own[first][which], position[first][which]  # a request is in the draft, too
    new = drawn.read
    tokens, keys = int(new[scored].sum()), seen_keys(start[scored], new[scored])
    # The prompts of new requests are run in this pass, so there is no cache of theirs to read.
    fresh = np.isin(request, plan.unscored)
    cached = scored & ~fresh
    prefix = _once_a_group(request[cached], start[cached])
    _, first = np.unique(request[fresh], return_index=True)
    prompts = (start - position)[fresh][first]
    tokens += int(prompts.sum())
    keys += seen_keys(np.zeros_like(prompts), prompts)
    return [forward_work(cost, tokens, prefix, keys)]


def _once_a_group(groups: npt.NDArray[np.signedinteger[Any]], prefix: Ints) -> int:
    """Sum the prefixes of rows, that of each group once."""
    _, first = np.unique(groups, return_index=True)
    return int(prefix[first].sum())


# A run


@dataclass
class Observation:
    """What an observed engine did.

    Attributes
    ----------
    cost
        Of its models.
    rounds
        In order.
    pages, reward_pages
        The most in use of each pool when a round was drawn.
    """

    cost: EngineCost
    rounds: list[Drawn] = field(default_factory=list)
    pages: int = 0
    reward_pages: int = 0

    def passes(self) -> dict[str, list[Work]]:
        """Return the passes of all rounds by phase."""
        found: dict[str, list[Work]] = {phase: [] for phase in WORKING}
        for drawn in self.rounds:
            for phase, passes in round_passes(drawn, self.cost).items():
                found[phase] += passes
        return found


@contextmanager
def observed(engine: Engine) -> Iterator[Observation]:
    """Observe an engine's rounds for as long as the context lasts.

    Raises
    ------
    RuntimeError
        If the engine is observed already.
    """
    loop = engine.loop
    if loop.on_round is not None:
        raise RuntimeError("the engine is observed already")
    seen = Observation(EngineCost.of(engine))

    def note(done: Round) -> None:
        seen.pages = max(seen.pages, loop.pages_used)
        if loop.scorer is not None:
            used = loop.scorer.stats().get("rm_pages_used", 0)
            seen.reward_pages = max(seen.reward_pages, used)
        seen.rounds.append(Drawn.of(done))

    loop.on_round = note
    try:
        yield seen
    finally:
        loop.on_round = None


@dataclass(frozen=True)
class Phase:
    """What a phase took, in seconds, and its least: bytes, operations and their seconds."""

    name: str
    seconds: float
    least_seconds: float
    work: Work

    @property
    def ratio(self) -> float | None:
        """Measured / least; None where the least is nothing."""
        return self.seconds / self.least_seconds if self.least_seconds else None


@dataclass(frozen=True)
class Run:
    """An observed run.

    Attributes
    ----------
    seconds
        From the first request's arrival to the last one's end.
    first_segment
        Seconds from each request's arrival to its first segment, in order.
    counts
        Differences of `Engine.stats`, seconds left out.
    phases
        Those of a round, and ``rest``: what the host did between them.
    pages, reward_pages
        The most in use.
    """

    seconds: float
    first_segment: list[float]
    counts: dict[str, float]
    phases: list[Phase]
    pages: int
    reward_pages: int

    @property
    def least_seconds(self) -> float:
        """Sum over the phases."""
        return sum(phase.least_seconds for phase in self.phases)

    @property
    def acceptance_rate(self) -> float:
        """Tests passed / attempts."""
        passed = self.counts["segments"] - self.counts["fallbacks"]
        return passed / self.counts["attempts"]

    def record(self) -> dict[str, Any]:
        """Return the figures for a file."""
        return {
            "seconds": self.seconds,
            "accepted_tokens_per_second": self.counts["accepted_tokens"] / self.seconds,
            "drafted_tokens_per_second": self.counts["drafted_tokens"] / self.seconds,
            "acceptance_rate": self.acceptance_rate,
            "rounds": self.counts["rounds"],
            "preemptions": self.counts["preemptions"],
            "first_segment_seconds_p50": float(np.median(self.first_segment)),
            "least_seconds": self.least_seconds,
            "share_of_the_least": self.least_seconds / self.seconds,
            "pages_used": self.pages,
            "reward_pages_used": self.reward_pages,
            "phases": [
                {
                    "name": phase.name,
                    "seconds": phase.seconds,
                    "least_seconds": phase.least_seconds,
                    "measured_over_least": phase.ratio,
                    "least_bytes": phase.work.bytes,
                    "operations": phase.work.operations,
                }
                for phase in self.phases
            ],
        }


def run(
    engine: Engine,
    prompts: Sequence[list[int]],
    params: Sequence[StarsParams],
    machine: Machine,
    *,
    batch: int | None = None,
) -> Run:
    """Run prompts to their end and observe it.

    Parameters
    ----------
    engine
        Warm, and without requests.
    prompts, params
        Token ids, and the parameters of each. With prefix caching, prompts that the engine has seen
        before make the run cheaper than it would be.
    machine
        Whose ceilings bound the least.
    batch
        Requests that are there at once, at least 1: when they have ended, the next ones come; None:
        all.

    Raises
    ------
    ValueError
        If a request is refused.
    RuntimeError
        If one fails.
    """
    names = [f"run-{number}" for number in range(len(prompts))]
    asked = list(zip(names, prompts, params, strict=True))
    batch = batch or max(1, len(asked))
    first: dict[str, float] = {}
    device = engine.loop.model.device
    before = engine.stats()
    with observed(engine) as seen:
        synchronize(device)
        begun = time.perf_counter()
        for at in range(0, len(asked), batch):
            arrived = time.perf_counter()
            for name, prompt, one in asked[at : at + batch]:
                engine.add_request(name, prompt, one)
            while engine.has_unfinished():
                for output in engine.step():
                    if output.error is not None:
                        raise RuntimeError(f"{output.request_id}: {output.error}")
                    first.setdefault(output.request_id, time.perf_counter() - arrived)
        synchronize(device)
        seconds = time.perf_counter() - begun
    after = engine.stats()
    moved = {name: after[name] - before[name] for name in after}
    return Run(
        seconds=seconds,
        first_segment=[first[name] for name in names],
        counts={name: value for name, value in moved.items() if not name.startswith("seconds_")},
        phases=_phases(moved, seconds, seen.passes(), machine),
        pages=seen.pages,
        reward_pages=seen.reward_pages,
    )


def _phases(
    moved: dict[str, float], seconds: float, passes: dict[str, list[Work]], machine: Machine
) -> list[Phase]:
    phases = []
    for name in PHASES:
        work = passes.get(name, [])
        phases.append(
            Phase(
                name=name,
                seconds=moved[f"seconds_{name}"],
                # Pass by pass, since one bound by memory does not make up for one that is not.
                least_seconds=sum(one.seconds(machine) for one in work),
                work=sum(work, Work()),
            )
        )
    rest = seconds - sum(phase.seconds for phase in phases)
    return [*phases, Phase("rest", rest, 0.0, Work())]
