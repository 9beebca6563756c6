"""The target and the attempts that a cost allows, from unaligned samples.

Cost is in operations, as `stars_fast.eval.cost` counts them, relative to plain sampling of the same
prompts. With P prompt and L response tokens on average, D drafted ones, and rho what scoring a
token costs over what drawing it does,

    cost = (1 + rho) (P + D) / (P + L).

D follows from walks along rewards. Unaligned samples give the length of each segment, whether it
ended the response, and its reward. Of a segment of prompt i at token t, with the reward r before,

    r' = m_i + e                        the first
    r' = a + b r + c t + e              those behind, by least squares

m_i = mu + w (ybar_i - mu) is the mean of the prompt's first rewards, pooled towards that of all
by w = v / (v + s^2 / n_i) as in `prompt_targets`. An attempt takes length, end and residual e from
a sample drawn at random: of all first segments, or of those that began near t. Attempts are tested
as the request's are; its first to pass, or best of R, is where the walk goes on. D' is the mean
over walks, scaled so that with R = 1 it is L. What the walks leave out, a pilot shows: the prompts
run once with the parameters that D' gives for the budget of the calibration, and

    D = L + g (D' - L),    g = 1 + w (G - 1),    G = (D of the pilot - L) / (D' - L)

for every budget, with w = u^2 / (u^2 + e^2): e is the standard error of G, by the spread of the
pilot's responses, and u = `_DOUBT` how far the walks may be wrong. The same random numbers serve
every target, so that D rises with it, and bisection finds the target.

R is twice the mean number of attempts that the budget pays for, and at least `LEAST_ATTEMPTS`:
with fewer, prompts that seldom pass get nothing, with more they take all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from stars_fast.outputs import CompletionOutput, SampleWalks
from stars_fast.params import StarsParams

Values = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

LEAST_ATTEMPTS = 4

#: What segments, and how they are drawn, depend on.
SETTINGS = (
    "method", "segment_length", "segment_end", "step_text", "min_segment_length",
    "entropy_threshold", "temperature", "top_k", "top_p", "min_p", "guide_weight",
)  # fmt: skip

_WALKS = 512  # at least
_BIN = 128  # samples that began near a token, about
_NEAR = 32  # of which those behind about the same reward are drawn from
_HALVINGS = 24
_DOUBT = 0.3
_SEED = 20


def walks_of(
    samples: Sequence[Sequence[CompletionOutput]],
    params: StarsParams,
    *,
    prompt_tokens: int,
    prompt_rewards: Sequence[float] | None,
    scoring: float,
) -> SampleWalks:
    """Gather what `within_budget` needs of unaligned samples.

    Parameters
    ----------
    samples
        Of each prompt, with the rewards of their segments.
    params
        They were drawn with.
    prompt_tokens
        Of all prompts.
    prompt_rewards
        r(x) of each; None: thresholds are flat.
    scoring
        Operations of scoring them over those of drawing them.
    """
    ends, rewards, owners, stopped = [], [], [], []
    for number, of_prompt in enumerate(samples):
        for sample in of_prompt:
            if any(segment.reward is None for segment in sample.segments):
                continue
            owners.append(number)
            ends.append(tuple(segment.end for segment in sample.segments))
            rewards.append(tuple(float(s.reward or 0.0) for s in sample.segments))
            stopped.append(sample.finish_reason == "stop")
    if not owners:
        raise ValueError("budget needs samples whose segments have rewards, got none")
    return SampleWalks(
        settings={name: getattr(params, name) for name in SETTINGS},
        prompts=tuple(owners),
        ends=tuple(ends),
        rewards=tuple(rewards),
        stopped=tuple(stopped),
        prompt_rewards=None if prompt_rewards is None else tuple(prompt_rewards),
        prompt_tokens=prompt_tokens / len(samples),
        scoring=scoring,
    )


def within_budget(params: StarsParams, walks: SampleWalks) -> StarsParams:
    """Return the parameters with a target, attempts and candidates in the place of a budget.

    `max_attempts` and `candidates` other than their defaults are kept.

    Raises
    ------
    ValueError
        Segments are other than those of the samples, or nothing costs as much, or as little.
    """
    for name, value in walks.settings.items():
        mine = getattr(params, name)
        if mine != value:
            raise ValueError(
                f"budget was calibrated with {name}={value!r}, got {mine!r}: "
                "call Engine.calibrate with the request's params"
            )
    if params.alpha < 1 and "alpha" in params.kind.parameters and walks.prompt_rewards is None:
        raise ValueError(
            f"budget was calibrated for flat thresholds, got alpha={params.alpha}: "
            "call Engine.calibrate with the request's params"
        )
    tests = _tests_of(params)
    most = params.max_attempts
    attempts = None if most == StarsParams.max_attempts else most
    candidates = 1 if params.candidates == "auto" else params.candidates
    assert params.budget is not None
    target, attempts = _search(walks, tests, params.budget, attempts, candidates)
    return replace(
        params, budget=None, target_reward=target, max_attempts=attempts, candidates=candidates
    )


@dataclass(frozen=True)
class _Tests:
    """What segments are tested by but the target; as in `StarsParams`."""

    max_tokens: int
    alpha: float
    beta: float
    hard: bool


def _tests_of(params: StarsParams) -> _Tests:
    return _Tests(params.max_tokens, params.alpha, params.beta, params.acceptance == "hard")


def after_pilot(walks: SampleWalks, params: StarsParams, drafted: Sequence[int]) -> SampleWalks:
    """Return the walks with the g of a pilot.

    Parameters
    ----------
    walks
        Of the samples.
    params
        Of the pilot, from `within_budget`.
    drafted
        Tokens that it drafted for each response, at least one.
    """
    model = _Model(walks, _tests_of(params))
    assert isinstance(params.target_reward, float)
    assert isinstance(params.candidates, int)
    foreseen = model.drafted(params.target_reward, params.max_attempts, params.candidates)
    if len(drafted) < 2 or foreseen - model.plain < 0.01 * model.plain:
        return walks  # of one the error is not known; or next to nothing is rejected
    beyond = foreseen - model.plain
    ratio = (float(np.mean(drafted)) - model.plain) / beyond
    noise = float(np.var(drafted, ddof=1)) / len(drafted) / beyond**2
    weight = _DOUBT**2 / (_DOUBT**2 + noise)
    return replace(walks, excess=max(0.5, 1 + weight * (ratio - 1)))


@lru_cache(maxsize=64)
def _search(
    walks: SampleWalks, tests: _Tests, budget: float, attempts: int | None, candidates: int
) -> tuple[float, int]:
    model = _Model(walks, tests)
    if attempts is None:
        attempts = max(LEAST_ATTEMPTS, math.ceil(2 * model.attempts_for(budget)))
    low, high = model.span()
    least = model.cost(low, attempts, candidates)
    most = model.cost(high, attempts, candidates)
    if not least <= budget <= most:
        raise ValueError(
            f"budget must be in [{least:.3g}, {most:.3g}], the cost of one attempt for each "
            f"segment and of {attempts}, got {budget}"
        )
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if model.cost(middle, attempts, candidates) <= budget:
            low = middle
        else:
            high = middle
    return low, attempts


#: Where a segment begins, the reward before, its length, its reward, whether it ended the response.
_Later = tuple[int, float, int, float, bool]


class _Model:
    """Walks along rewards, drawn like those of the samples; `plain` is L."""

    def __init__(self, walks: SampleWalks, tests: _Tests) -> None:
        self._tests = tests
        self._walks = walks
        firsts, others = [], []
        for owner, ends, rewards, stopped in zip(
            walks.prompts, walks.ends, walks.rewards, walks.stopped, strict=True
        ):
            starts = (0, *ends[:-1])
            for k, (start, end, reward) in enumerate(zip(starts, ends, rewards, strict=True)):
                over = stopped and k == len(ends) - 1
                if k == 0:
                    firsts.append((owner, end, reward, over))
                else:
                    others.append((start, rewards[k - 1], end - start, reward, over))
        self._owner, self._first_length, first, self._first_over = _columns(firsts, 4)
        self._mean = _pooled_means(self._owner.astype(int), first)
        self._first_rest = _rests(self._owner.astype(int), first)
        at, before, self._length, behind, self._over = _columns(self._binned(others), 5)
        self._before = before
        terms = np.stack([np.ones_like(at), before, at])
        self._line: Values = np.zeros(3)
        if len(others) >= 8:
            self._line = np.asarray(np.linalg.lstsq(terms.T, behind, rcond=None)[0], np.float64)
        self._rest = behind - self._line @ terms
        lengths = [min(ends[-1], tests.max_tokens) for ends in walks.ends]
        self.plain = float(np.mean(lengths))
        self._scale = 1.0
        self._scale = self.plain / self._walked(self.span()[0], 1, 1)

    def span(self) -> tuple[float, float]:
        """Return targets that everything passes, and nothing."""
        rewards = [reward for walk in self._walks.rewards for reward in walk]
        rewards += self._walks.prompt_rewards or ()
        low, high = min(rewards), max(rewards)
        beyond = 4 * (high - low) + 40 * (0.0 if self._tests.hard else self._tests.beta) + 1e-6
        return low - beyond, high + beyond

    def cost(self, target: float, attempts: int, candidates: int) -> float:
        """Return the cost relative to plain sampling."""
        drawn = self._walks.prompt_tokens + self.drafted(target, attempts, candidates)
        return (1 + self._walks.scoring) * drawn / (self._walks.prompt_tokens + self.plain)

    def attempts_for(self, budget: float) -> float:
        """Return how many attempts a segment can have on average."""
        prompt = self._walks.prompt_tokens
        drawn = budget * (prompt + self.plain) / (1 + self._walks.scoring) - prompt
        return drawn / self.plain

    def drafted(self, target: float, attempts: int, candidates: int) -> float:
        """Return D, tokens drafted for a response."""
        foreseen = self._scale * self._walked(target, attempts, candidates)
        return self.plain + self._walks.excess * (foreseen - self.plain)

    def _walked(self, target: float, attempts: int, candidates: int) -> float:
        tests, samples = self._tests, len(self._owner)
        owner = np.tile(self._owner.astype(int), -(-_WALKS // samples))
        shape = (len(owner), attempts)
        numbers = np.random.default_rng(_SEED)
        start = np.full(len(owner), target)
        if self._walks.prompt_rewards is not None and tests.alpha < 1:
            alone = np.asarray(self._walks.prompt_rewards)[owner]
            start = (1 - tests.alpha) * alone + tests.alpha * target
        at, reward = np.zeros(len(owner)), np.zeros(len(owner))
        going = np.ones(len(owner), bool)
        columns, everybody = np.arange(attempts), np.arange(len(owner))
        drafted, first = 0.0, True
        while going.any() and (first or len(self._before)):
            chance, uniform = numbers.random(shape), numbers.random(shape)
            if first:
                donor = (chance * samples).astype(int)
                lengths, over = self._first_length[donor], self._first_over[donor]
                rewards = self._mean[owner][:, None] + self._first_rest[donor]
            else:
                donor = self._donors(at, reward, chance)
                lengths, over = self._length[donor], self._over[donor]
                line = self._line
                rewards = (line[0] + line[1] * reward + line[2] * at)[:, None] + self._rest[donor]
            left = tests.max_tokens - at
            over = over.astype(bool) & (lengths <= left[:, None])
            lengths = np.minimum(lengths, left[:, None])
            tau = np.minimum(
                target,
                start[:, None]
                + (target - start)[:, None] * (at[:, None] + lengths) / tests.max_tokens,
            )
            passed = rewards >= tau
            if not tests.hard:
                passed |= np.log(uniform) < (rewards - tau) / tests.beta
            passes = passed.any(axis=1)
            taken = np.where(passes, passed.argmax(axis=1), rewards.argmax(axis=1))
            made = np.where(passes, taken + 1, attempts)
            made = np.minimum(-(-made // candidates) * candidates, attempts)
            drafted += float(lengths[going[:, None] & (columns < made[:, None])].sum())
            at = at + lengths[everybody, taken]
            reward = rewards[everybody, taken]
            going &= (at < tests.max_tokens) & ~over[everybody, taken]
            first = False
        return drafted / len(owner)

    def _binned(self, rows: list[_Later]) -> list[_Later]:
        """Return segments in bins of where they begin, and in each by the reward before."""
        rows = sorted(rows)
        bins = max(1, len(rows) // _BIN)
        self._bins = np.arange(bins + 1) * len(rows) // bins
        self._from = np.array([rows[at][0] for at in self._bins[:-1]]) if rows else np.zeros(1)
        found: list[_Later] = []
        for low, high in itertools.pairwise(self._bins.tolist()):
            found += sorted(rows[low:high], key=lambda row: row[1])
        return found

    def _donors(self, at: Values, reward: Values, chance: Values) -> Counts:
        """Draw a sample's segment that began near each token, behind about such a reward."""
        place = np.maximum(np.searchsorted(self._from, at, side="right") - 1, 0)
        low, high = self._bins[place], self._bins[place + 1]
        middle = np.zeros(len(at), int)
        for number, (first, last) in enumerate(itertools.pairwise(self._bins.tolist())):
            mine = place == number
            middle[mine] = first + np.searchsorted(self._before[first:last], reward[mine])
        width = np.minimum(_NEAR, high - low)
        first = np.clip(middle - width // 2, low, high - width)
        return np.asarray(first[:, None] + chance * width[:, None], np.int64)


def _columns(rows: Sequence[tuple[float, ...]], count: int) -> list[Values]:
    return list(np.asarray(rows, np.float64).reshape(-1, count).T)


def _pooled_means(owner: Counts, values: Values) -> Values:
    """Return each owner's mean, pooled towards that of all; NaN of owners without values."""
    counts = np.bincount(owner).astype(float)
    with np.errstate(invalid="ignore"):
        means = np.bincount(owner, values) / counts
    known = counts > 0
    overall = float(means[known].mean())
    freedom = float((counts[known] - 1).sum())
    if freedom < 1 or known.sum() < 2:
        return np.where(known, overall, np.nan)
    within = float(((values - means[owner]) ** 2).sum()) / freedom
    spread = float(means[known].var(ddof=1))
    between = max(0.0, spread - within * float((1 / counts[known]).mean()))
    weight = between / (between + within / np.maximum(counts, 1)) if between else 0.0 * counts
    return np.asarray(overall + weight * (means - overall), np.float64)


def _rests(owner: Counts, values: Values) -> Values:
    """Return what values are apart from their owner's mean, widened by the mean's own part."""
    counts = np.bincount(owner)
    if counts.max() == 1:
        return np.asarray(values - values.mean(), np.float64)
    with np.errstate(invalid="ignore"):
        means = np.bincount(owner, values) / counts
    n = np.maximum(counts[owner], 2)
    return np.asarray((values - means[owner]) * np.sqrt(n / (n - 1)), np.float64)
