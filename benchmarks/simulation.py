"""Load on the real scheduler, with a synthetic clock in the place of a GPU.

The C++ scheduler plans and commits round after round. Nothing is computed in between: a round takes
the time that its work needs at the machine's ceilings (`least`), rewards are drawn, and the clock
moves on. So a million requests take minutes, and the queue, the pages and the choice of candidates
are the real ones. The times are not: see docs/capacity.md for what they leave out.

A *wait* is the time from a request's arrival to the start of the first round that drafts for it. A
*row* is a candidate segment drafted in a round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from stars_fast import _core
from stars_fast.benchmarks.least import Machine, ModelCost, copy_work, forward_work
from stars_fast.benchmarks.models import (
    LLAMA_2_7B,
    LLAMA_3_1_8B,
    ONE_BILLION,
    Shape,
    language_model,
    reward_model,
)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

#: Of `Scheduler.add`: as many candidates as pay off.
AUTO = 0
#: Part of the requests, the first to arrive, that no figure counts.
WARM_UP = 0.1
# Purpose of the draws, in the counter of the generator: the engine uses 0 and 1.
_PURPOSE = 2


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet: ceilings of bfloat16, and memory in bytes."""

    machine: Machine
    memory_bytes: float


#: Dense bfloat16, without sparsity. NVIDIA's data sheets of the SXM cards.
GPUS = {
    "h200": Gpu(Machine("H200", 4.8e12, 989e12), 141e9),
    "h100": Gpu(Machine("H100 SXM", 3.35e12, 989e12), 80e9),
    "a100": Gpu(Machine("A100 80GB SXM", 2.04e12, 312e12), 80e9),
}
MODELS = {
    "llama-2-7b": LLAMA_2_7B,
    "llama-3.1-8b": LLAMA_3_1_8B,
    "llama-3.2-1b": ONE_BILLION,
}


# What arrives


@dataclass(frozen=True)
class Requests:
    """Requests in order of arrival, ``[n]`` each.

    Attributes
    ----------
    arrival
        Seconds.
    prompt_length, response_length
        Tokens, at least 1; a response ends at the latest at the `max_tokens` of its workload. The
        scheduler does not know where.
    pass_rate
        Probability that an attempt passes, whatever the segment.
    """

    arrival: Floats
    prompt_length: Ints
    response_length: Ints
    pass_rate: Floats

    def __len__(self) -> int:
        return len(self.arrival)


@dataclass(frozen=True)
class Workload:
    """What users ask for.

    Attributes
    ----------
    prompt_mean, prompt_spread, prompt_max
        Prompt lengths are log-normal: the mean in tokens before the cut at `prompt_max`, and the
        standard deviation of their logarithm.
    response_mean, max_tokens
        A response ends after each token with probability 1 / `response_mean`, at the latest after
        `max_tokens`.
    segment_length, max_attempts
        Of every request, as `StarsParams` has them.
    pass_rate, pass_concentration
        Each request draws the pass probability of its attempts from a Beta distribution of mean
        `pass_rate` and parameters a + b = `pass_concentration`: the smaller, the more requests
        differ. With `pass_rate` 1 every attempt passes.
    """

    prompt_mean: float = 512.0
    prompt_spread: float = 0.6
    prompt_max: int = 2048
    response_mean: float = 128.0
    max_tokens: int = 256
    segment_length: int = 32
    max_attempts: int = 20
    pass_rate: float = 0.5
    pass_concentration: float = 4.0

    def draw(self, count: int, requests_per_second: float, seed: int) -> Requests:
        """Draw requests that arrive as a Poisson process; infinite load: all are there at once.

        With one seed the requests are the same at every load, and so are the gaps between them up
        to the scale.
        """
        random = np.random.default_rng(seed)
        gaps = random.exponential(size=count)
        location = np.log(self.prompt_mean) - self.prompt_spread**2 / 2
        prompts = np.rint(random.lognormal(location, self.prompt_spread, count))
        responses = random.geometric(1.0 / self.response_mean, count)
        a = self.pass_rate * self.pass_concentration
        b = self.pass_concentration - a
        return Requests(
            arrival=np.cumsum(gaps) / requests_per_second,
            prompt_length=np.clip(prompts, 1, self.prompt_max).astype(np.int64),
            response_length=np.minimum(responses, self.max_tokens).astype(np.int64),
            pass_rate=random.beta(a, b, count) if b > 0.0 else np.ones(count),
        )


# What serves it


@dataclass(frozen=True)
class Replica:
    """A GPU with a language model and a reward model.

    Attributes
    ----------
    machine
        The rates that its rounds reach.
    step, prefill, score
        What a token costs in a decode step of the language model, in its prefill (without the
        head), and in the reward model.
    num_pages
        Of each model's pool; one is never given out.
    page_size
        Tokens.
    max_rows, max_prefill_tokens, fixed_cost_rows
        Of the scheduler; the defaults are the engine's on a GPU.
    overhead
        Seconds of a round that do not depend on its work: the host between launches.
    """

    machine: Machine
    step: ModelCost
    prefill: ModelCost
    score: ModelCost
    num_pages: int
    page_size: int = 16
    max_rows: int = 256
    max_prefill_tokens: int = 8192
    fixed_cost_rows: float = 256.0
    overhead: float = 1e-3

    @classmethod
    def of(
        cls,
        gpu: Gpu,
        language: Shape,
        reward: Shape,
        *,
        efficiency: float = 0.6,
        memory_share: float = 0.9,
        page_size: int = 16,
        max_rows: int = 256,
        max_prefill_tokens: int = 8192,
        overhead: float = 1e-3,
    ) -> Replica:
        """Return a replica whose models are in bfloat16 and whose pages fill the memory left.

        Parameters
        ----------
        gpu
            That holds both models.
        language, reward
            Shapes of the models.
        efficiency
            Part of the GPU's ceilings that rounds reach, in (0, 1].
        memory_share
            Part of the memory that weights and pages take; the rest is for activations.
        page_size, max_rows, max_prefill_tokens, overhead
            See the class.

        Raises
        ------
        ValueError
            If the models leave no room for pages.
        """
        lm, rm = language_model(language, device="meta"), reward_model(reward, device="meta")
        dtype = torch.bfloat16
        step = ModelCost.of(lm, dtype)
        prefill, score = (
            ModelCost.of(cast(PreTrainedModel, model.base_model), dtype) for model in (lm, rm)
        )
        weights = sum(p.numel() for model in (lm, rm) for p in model.parameters()) * dtype.itemsize
        left = gpu.memory_bytes * memory_share - weights
        num_pages = int(left // (page_size * (step.kv_bytes + score.kv_bytes)))
        if num_pages < 2:
            raise ValueError(
                f"the models' weights take {weights / 1e9:.1f} GB, which leaves no pages in "
                f"{memory_share:g} of the {gpu.memory_bytes / 1e9:.0f} GB of {gpu.machine.name}"
            )
        machine = Machine(
            gpu.machine.name,
            gpu.machine.bytes_per_second * efficiency,
            gpu.machine.operations_per_second * efficiency,
        )
        return cls(
            machine,
            step,
            prefill,
            score,
            num_pages,
            page_size=page_size,
            max_rows=max_rows,
            max_prefill_tokens=max_prefill_tokens,
            overhead=overhead,
        )


@dataclass(frozen=True)
class RoundTime:
    """Seconds of a round by phase.

    `score_segments` is what of `score` the segments alone would take: with `draft`, what the engine
    tells the scheduler, which learns from it what rows cost.
    """

    fork: float
    prefill: float
    draft: float
    score: float
    overhead: float
    score_segments: float

    @property
    def total(self) -> float:
        """Of the whole round."""
        return self.fork + self.prefill + self.draft + self.score + self.overhead


def round_time(plan: _core.Plan, lengths: npt.NDArray[np.int32], replica: Replica) -> RoundTime:
    """Return the time of a round on a replica.

    Every row runs in every decode step, as in a captured graph. The prefix of a request is read
    once for all of its rows. A row's own tokens grow from step to step, which counts as their mean.
    The reward model runs the prompts in the pass that scores the segments.

    Parameters
    ----------
    plan
        Of the round.
    lengths
        Tokens of each row that the reward model reads, ``[R]``.
    replica
        That runs it.
    """
    machine = replica.machine
    slots = int(plan.copies[2].sum())
    fork = copy_work(replica.step, slots) + copy_work(replica.score, slots)

    chunk = plan.prefill
    begin, new = chunk.row_start.astype(np.int64), chunk.new_lengths.astype(np.int64)
    prompt_tokens, prompt_prefix = chunk.num_tokens, int(begin.sum())
    prompt_keys = _seen_keys(begin, new)
    prefill = forward_work(replica.prefill, prompt_tokens, prompt_prefix, prompt_keys)

    batch = plan.draft
    rows, steps = batch.num_rows, batch.max_new
    cached = int((batch.group_extent - (batch.hole_end - batch.hole_start)).sum())
    start = batch.row_start.astype(np.int64)
    own = (steps - 1) / 2  # tokens of the segment before the step, on average
    step = forward_work(
        replica.step, rows, cached + rows * own, float(start.sum()) + rows * (own + 1)
    )

    # What the first decode step feeds, the last committed token, the reward model has seen already.
    segments = forward_work(
        replica.score,
        int(lengths.sum()),
        cached + batch.num_groups,
        _seen_keys(start + 1, lengths.astype(np.int64)),
    )
    read = forward_work(
        replica.score,
        int(lengths.sum()) + prompt_tokens,
        cached + batch.num_groups + prompt_prefix,
        _seen_keys(start + 1, lengths.astype(np.int64)) + prompt_keys,
    )
    return RoundTime(
        fork=fork.seconds(machine),
        prefill=prefill.seconds(machine) if prompt_tokens else 0.0,
        draft=steps * step.seconds(machine) if rows else 0.0,
        score=read.seconds(machine) if rows or prompt_tokens else 0.0,
        overhead=replica.overhead,
        score_segments=segments.seconds(machine) if rows else 0.0,
    )


def _seen_keys(start: Ints, new: Ints) -> int:
    """Sum over the tokens of all rows of the keys that each sees, itself included."""
    return int((new * start + new * (new + 1) // 2).sum())


# What comes of it


@dataclass(frozen=True)
class Rounds:
    """What happened in each round, ``[rounds]`` each.

    Attributes
    ----------
    begin, seconds
        Of the simulated clock.
    requests, rows
        That were drafted for, and drafted.
    pages
        In use while the round ran.
    drafted, accepted
        Tokens; a fallback counts as accepted, since it becomes part of the response.
    segments
        Rows that became part of a response.
    preemptions
        Requests that lost their pages.
    """

    begin: Floats
    seconds: Floats
    requests: Ints
    rows: Ints
    pages: Ints
    drafted: Ints
    accepted: Ints
    segments: Ints
    preemptions: Ints


@dataclass(frozen=True)
class Outcome:
    """A simulation, to its last request's end.

    Attributes
    ----------
    requests
        As they arrived.
    start, first, end
        Of each request, ``[n]``: when the first round that drafts for it began, when its first
        segment was there, and its last. Seconds of the simulated clock.
    tokens, ends
        Response tokens that each request got, and how often it finished, ``[n]``.
    rounds
        All of them.
    stats
        Of the scheduler.
    num_pages
        That can be given out.
    pages_held
        When nothing was left to do.
    """

    requests: Requests
    start: Floats
    first: Floats
    end: Floats
    tokens: Ints
    ends: Ints
    rounds: Rounds
    stats: dict[str, int]
    num_pages: int
    pages_held: int

    @property
    def wait(self) -> Floats:
        """Seconds from arrival to the start of the first round, ``[n]``."""
        return self.start - self.requests.arrival

    def summary(self) -> dict[str, float]:
        """Return the figures without warm-up and end.

        Of requests: all but the first tenth to arrive. Of rounds: those that began between the
        arrival of the first request that counts and that of the last one.
        """
        arrival, rounds = self.requests.arrival, self.rounds
        counted = np.arange(len(arrival)) >= int(WARM_UP * len(arrival))
        begin, end = float(arrival[counted][0]), float(arrival[-1])
        inside = (rounds.begin >= begin) & (rounds.begin <= end)
        if not inside.any():
            raise ValueError(f"no round began between {begin:g} and {end:g} s: simulate more")
        seconds, rows = rounds.seconds[inside], rounds.rows[inside]
        drafted, accepted, segments, preemptions = (
            int(x[inside].sum())
            for x in (rounds.drafted, rounds.accepted, rounds.segments, rounds.preemptions)
        )
        window = max(float((rounds.begin + rounds.seconds)[inside].max()), end) - begin
        share = rounds.pages[inside] / self.num_pages
        found = {
            "requests": float(len(arrival)),
            "rounds": float(inside.sum()),
            "busy_share": float(seconds.sum()) / window,
            "accepted_tokens_per_second": accepted / window,
            "drafted_per_accepted": drafted / accepted,
            "rows_not_accepted_share": 1.0 - segments / int(rows.sum()),
            "round_seconds_mean": float(seconds.mean()),
            "rows_mean": float(rows.mean()),
            "rows_per_request_mean": float(rows.sum() / rounds.requests[inside].sum()),
            "requests_mean": float(rounds.requests[inside].mean()),
            "page_share_mean": float(np.average(share, weights=seconds)),
            "page_share_max": float(share.max()),
            "preemptions_per_request": preemptions / int(counted.sum()),
        }
        for name, times in (("wait", self.start), ("first", self.first), ("end", self.end)):
            at = np.quantile((times - arrival)[counted], [0.5, 0.99])
            found[f"{name}_seconds_p50"], found[f"{name}_seconds_p99"] = at.tolist()
        return found


def simulate(
    requests: Requests,
    workload: Workload,
    replica: Replica,
    candidates: int,
    *,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Outcome:
    """Serve requests on one replica until the last one ends.

    Whether an attempt passes depends on the seed, the request, the position and the attempt alone,
    as in the engine: so every number of candidates accepts the same attempts.

    Parameters
    ----------
    requests
        What arrives.
    workload
        Whose segment length, attempts and `max_tokens` the requests have.
    replica
        That serves them.
    candidates
        Rows of each request in a round; `AUTO`: as many as pay off.
    seed
        Of the passes, in [0, 2**32).
    progress
        Called after a round with the number of requests that ended in it.

    Raises
    ------
    ValueError
        If a request does not fit the replica's pages.
    """
    count = len(requests)
    scheduler = _core.Scheduler(
        num_pages=replica.num_pages,
        page_size=replica.page_size,
        max_rows=replica.max_rows,
        max_prefill_tokens=replica.max_prefill_tokens,
        prefix_caching=False,
        fixed_cost_rows=replica.fixed_cost_rows,
    )
    draws = _Draws(requests, replica.max_rows, seed)
    prompt = np.zeros(int(requests.prompt_length.max(initial=1)), np.int64)
    prompt_length = requests.prompt_length.tolist()
    arrival = requests.arrival.tolist()
    no_tokens = np.zeros((replica.max_rows, workload.segment_length), np.int64)
    start, first, end = (np.full(count, np.nan) for _ in range(3))
    tokens, ends = np.zeros(count, np.int64), np.zeros(count, np.int64)
    log: list[tuple[float, ...]] = []
    now, arrived = 0.0, 0
    while arrived < count or scheduler.has_unfinished:
        if not scheduler.has_unfinished:
            now = max(now, arrival[arrived])
        while arrived < count and arrival[arrived] <= now:
            scheduler.add(
                arrived,
                prompt[: prompt_length[arrived]],
                scored=True,
                segment_length=workload.segment_length,
                max_tokens=workload.max_tokens,
                max_attempts=workload.max_attempts,
                candidates=candidates,
                target_reward=0.0,
                hard=True,
            )
            arrived += 1
        plan = scheduler.plan()
        pages = scheduler.pages_used
        start[plan.unscored] = now
        for request in plan.unscored.tolist():
            scheduler.set_prompt_reward(request, 0.0)
        rows = plan.draft.num_rows
        lengths, stopped, rewards = draws.of(plan)
        taken = round_time(plan, lengths, replica)
        decision = scheduler.commit(
            no_tokens[:rows],
            lengths,
            stopped,
            rewards,
            # As the engine has it, per step.
            (taken.draft + taken.score_segments) / max(1, plan.draft.max_new),
        )
        began, now = now, now + taken.total
        changed = decision.request
        tokens[changed] += decision.length
        first[changed[decision.start == 0]] = now
        ended = changed[decision.finish != _core.FINISH_NONE]
        end[ended] = now
        ends[ended] += 1
        log.append(
            (
                began,
                taken.total,
                plan.draft.num_groups,
                rows,
                pages,
                int(lengths.sum()),
                int(decision.length.sum()),
                len(changed),
                len(plan.preempted),
            )
        )
        if progress is not None:
            progress(len(ended))
    scheduler.check()
    columns = np.array(log, np.float64).reshape(-1, 9).T
    return Outcome(
        requests=requests,
        start=start,
        first=first,
        end=end,
        tokens=tokens,
        ends=ends,
        rounds=Rounds(columns[0], columns[1], *columns[2:].astype(np.int64)),
        stats=dict(scheduler.stats),
        num_pages=replica.num_pages - 1,
        pages_held=scheduler.pages_used,
    )


class _Draws:
    """What the rows of a round come to: where they end, and whether they pass."""

    def __init__(self, requests: Requests, max_rows: int, seed: int) -> None:
        self._response_length = requests.response_length.astype(np.int32)
        # Of a 32-bit word: passes where it is below, so that a rate of 1 always does.
        self._limit = np.rint(requests.pass_rate * 2.0**32)
        self._counters = np.zeros((max_rows, 4), np.uint32)
        self._counters[:, 3] = _PURPOSE
        self._keys = np.full((max_rows, 2), seed, np.uint32)

    def of(self, plan: _core.Plan) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8], Floats]:
        """Return the lengths, the stops and the rewards, +1 or -1, as `commit` takes them."""
        request, rows = plan.request, len(plan.request)
        counters, keys = self._counters[:rows], self._keys[:rows]
        counters[:, 1] = plan.position
        counters[:, 2] = plan.attempt
        keys[:, 0] = request
        words = _core.philox4x32(counters, keys)[:, 0]
        rewards = np.where(words < self._limit[request], 1.0, -1.0)
        left = self._response_length[request] - plan.position
        lengths = np.minimum(plan.draft.new_lengths, left)
        return lengths, (lengths == left).astype(np.uint8), rewards


# What a replica can do, and how many it takes


def saturation(
    workload: Workload,
    replica: Replica,
    candidates: int,
    *,
    count: int,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> float:
    """Return the requests per second of a replica that always has a queue.

    All requests are there at the start; those that end between a tenth and six tenths of the way
    count, so the queue has neither just begun nor come to its end. Give several times as many as
    run at once.
    """
    requests = workload.draw(count, np.inf, seed)
    outcome = simulate(requests, workload, replica, candidates, seed=seed, progress=progress)
    ends = np.sort(outcome.end)
    low, high = int(0.1 * count), int(0.6 * count)
    return float((high - low) / (ends[high] - ends[low]))


@dataclass(frozen=True)
class Limits:
    """What users must get: upper limits in seconds of the summary's figures; None: no limit."""

    wait_seconds_p99: float | None = None
    first_seconds_p99: float | None = None
    end_seconds_p99: float | None = None

    def hold(self, summary: dict[str, float]) -> bool:
        """Whether all of them hold."""
        limits = asdict(self).items()
        return all(limit is None or summary[name] <= limit for name, limit in limits)


def replicas_needed(
    workload: Workload,
    replica: Replica,
    candidates: int,
    load: float,
    limits: Limits,
    *,
    count: int,
    most: int,
    seed: int = 0,
) -> tuple[int, dict[str, float]] | None:
    """Return the least number of replicas that holds the limits, and the figures of one of them.

    Each request goes to one of the replicas at random, so that each has a Poisson load.

    Parameters
    ----------
    workload, replica, candidates, seed
        As `simulate` takes them.
    load
        Requests per second in all.
    limits
        To be held.
    count
        Requests of each trial.
    most
        Replicas to try, at most.

    Returns
    -------
    tuple or None
        None: `most` replicas do not hold the limits.
    """
    # Fewer cannot keep up at all, whatever a short trial says.
    low = int(load // saturation(workload, replica, candidates, count=count, seed=seed))
    tried: dict[int, dict[str, float]] = {}

    def holds(replicas: int) -> bool:
        requests = workload.draw(count, load / replicas, seed)
        tried[replicas] = simulate(requests, workload, replica, candidates, seed=seed).summary()
        return limits.hold(tried[replicas])

    # `low` replicas do not hold the limits; steps that double find some that do.
    high, step = low + 1, 1
    while high <= most and not holds(high):
        low, high, step = high, high + step, 2 * step
    if high > most:
        if low >= most or not holds(most):
            return None
        high = most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high, tried[high]


def describe(workload: Workload, replica: Replica) -> dict[str, Any]:
    """Return what was simulated, for a record."""
    return {"workload": asdict(workload), "replica": asdict(replica)}
