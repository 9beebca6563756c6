"""A round under way: its plan, its draft and its rewards.

Its rows are those of the draft, then those that ended in an earlier round and wait for an attempt
before theirs (`Plan.held`). A row whose segment has not ended goes on in the next round; it is not
scored, nor is what comes after it in the order of attempts.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from stars_fast import _core
from stars_fast.drafting.base import Draft
from stars_fast.engine.detokenize import find_step_end, find_stop
from stars_fast.engine.requests import Candidate, Response, candidate_text
from stars_fast.methods.decisions import effective_reward, merit
from stars_fast.rewards.base import ScoreJob, Scorer
from stars_fast.rewards.combine import CombinedReward


@dataclass
class Round:
    """A plan and the results of its device phases; lists have an entry per row.

    Attributes
    ----------
    plan
        Out until the round is committed.
    draft
        The drawn segments.
    responses, branches
        The response of each row, and its id at the scorer.
    tokens
        int64 ``[R, L]``, of these segments.
    drawn
        Tokens of each row that earlier rounds drew.
    unfinished
        uint8: the row goes on in the next round.
    decided
        Whether the commit decides the row: it and every attempt before it has ended.
    lengths, stopped, merits
        As `commit` of the scheduler takes them; merits are rewards, or what a method decides by in
        their place.
    errors
        Why a row has no valid result.
    make_candidates
        What gives `candidates`.
    prompt_rewards
        r(x) of the plan's new requests by handle, or why there is none.
    seconds
        Time of drafting its rows and of scoring them: the cost of rows, prompts left out.
    beside
        Seconds of its other phases up to its draft, prompts left out.
    """

    plan: _core.Plan
    draft: Draft
    responses: list[Response]
    branches: list[int]
    tokens: npt.NDArray[np.int64]
    drawn: list[int]
    unfinished: npt.NDArray[np.uint8]
    decided: list[bool]
    lengths: npt.NDArray[np.int32]
    stopped: npt.NDArray[np.uint8]
    merits: npt.NDArray[np.float64]
    errors: dict[int, str]
    make_candidates: Callable[[], list[Candidate]]
    prompt_rewards: dict[int, float | Exception] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    beside: float = 0.0

    @functools.cached_property
    def candidates(self) -> list[Candidate]:
        """The segment in each row, cut at a stop text; what earlier rounds drew of it is in front.

        Of rows that are as they were drawn they are made late, beside a device that scores them.
        """
        return self.make_candidates()

    @property
    def steps(self) -> int:
        """Token positions drafted, at least 1."""
        if self.draft.unfinished is not None:
            return max(1, self.draft.steps)
        return max(1, self.plan.draft.max_new)

    @property
    def read(self) -> int:
        """Tokens of the rows that the reward model reads."""
        rows = zip(self.responses, self.lengths.tolist(), self.decided, strict=True)
        return sum(length for response, length, decided in rows if response.judged and decided)

    @property
    def breaks(self) -> npt.NDArray[np.uint8] | None:
        """Which rows break a constraint, as `commit` of the scheduler takes it; None: none does."""
        breaking = [row for row, candidate in enumerate(self.candidates) if not candidate.keeps]
        if not breaking:
            return None
        breaks = np.zeros(len(self.responses), np.uint8)
        breaks[breaking] = 1
        return breaks

    def tested(self, row: int, threshold: float) -> Candidate:
        """Return a row's candidate with the threshold of its test; NaN: there was none."""
        candidate = self.candidates[row]
        candidate.threshold = None if math.isnan(threshold) else threshold
        return candidate


def cut_candidates(
    plan: _core.Plan,
    draft: Draft,
    responses: list[Response],
    branches: Iterator[int],
) -> Round:
    """Return the round with its candidates: cut at stop texts, bad logits noted as errors.

    `branches` gives each an id at the scorer. `responses` are those of all rows.
    """
    attempts = [*plan.attempt.tolist(), *plan.held_attempt.tolist()]
    drawn = plan.drawn.tolist()
    ids = [next(branches) for _ in drawn]
    held = len(responses) - len(drawn)
    goes_on = [False] * len(drawn) if draft.unfinished is None else draft.unfinished.tolist()
    goes_on += [False] * held
    done = Round(
        plan=plan,
        draft=draft,
        responses=responses,
        branches=ids,
        tokens=draft.tokens,
        drawn=drawn,
        unfinished=np.array(goes_on, np.uint8),
        decided=_decided(responses, attempts, goes_on),
        lengths=draft.lengths,
        stopped=draft.stopped.astype(np.uint8),
        merits=np.zeros(len(responses)),
        errors=dict(draft.errors),
        make_candidates=functools.partial(_drawn, draft, responses, attempts, ids),
    )
    broken = bool((draft.nan_step >= 0).any())
    if held or broken or any(drawn) or any(response.cuts for response in responses):
        _cut_rows(done, attempts, goes_on)
    for row in done.errors:
        done.merits[row] = np.nan
    return done


def _cut_rows(done: Round, attempts: list[int], goes_on: list[bool]) -> None:
    """Put rows together with what was drawn before, cut them, and add those that were held."""
    draft, responses, drawn = done.draft, done.responses, done.drawn
    candidates = []
    new = done.make_candidates()
    for row, bad in enumerate(draft.nan_step.tolist()):
        response, cut, ended = responses[row], new[row], False
        if drawn[row]:
            cut = _joined(response.under_way[attempts[row]], cut)
        if response.cuts:
            cut, ended = _cut(response, cut)
        if 0 <= bad < len(cut.token_ids) - drawn[row]:
            ended = True
            at = len(response.output.token_ids) + drawn[row] + bad
            reason = f"the model's logits at response position {at} are NaN or infinite"
            cut = replace(cut, error=reason)
        candidates.append(cut)
        goes_on[row] = goes_on[row] and not ended
    for row in range(len(drawn), len(responses)):  # held
        candidates.append(responses[row].under_way[attempts[row]])
        drawn.append(len(candidates[row].token_ids))
    done.make_candidates = lambda: candidates
    done.branches = [candidate.branch for candidate in candidates]
    if any(drawn):
        done.tokens = _table(candidates)
    done.unfinished = np.array(goes_on, np.uint8)
    done.decided = _decided(responses, attempts, goes_on)
    done.lengths = np.array([len(candidate.token_ids) for candidate in candidates], np.int32)
    done.stopped = np.array([candidate.stopped for candidate in candidates], np.uint8)
    errors = {row: c.error for row, c in enumerate(candidates) if c.error is not None}
    done.errors = errors | done.errors


def _drawn(
    draft: Draft, responses: list[Response], attempts: list[int], branches: list[int]
) -> list[Candidate]:
    """Return what each row has drawn in this round."""
    lengths = draft.lengths.tolist()
    tokens, logprobs = draft.tokens.tolist(), draft.logprobs.tolist()
    for row, length in enumerate(lengths):
        if length < len(tokens[row]):
            del tokens[row][length:], logprobs[row][length:]
    adjusted = draft.adjusted_logprobs
    ratios, stopped = draft.log_ratios, draft.stopped.tolist()
    return [
        Candidate(
            branch=branches[row],
            attempt=attempts[row],
            token_ids=tokens[row],
            logprobs=logprobs[row],
            adjusted_logprobs=logprobs[row]
            if adjusted is None
            else adjusted[row, :length].tolist(),
            top_logprobs=_top_logprobs(draft, row, length, count)
            if (count := responses[row].params.top_logprobs)
            else [],
            log_ratios=[] if ratios is None else ratios[row, :length].tolist(),
            stopped=stopped[row],
        )
        for row, length in enumerate(lengths)
    ]


def _joined(before: Candidate, new: Candidate) -> Candidate:
    """Return what a row has drawn behind what earlier rounds drew of it."""
    return replace(
        new,
        token_ids=before.token_ids + new.token_ids,
        logprobs=before.logprobs + new.logprobs,
        adjusted_logprobs=before.adjusted_logprobs + new.adjusted_logprobs,
        top_logprobs=before.top_logprobs + new.top_logprobs,
        log_ratios=before.log_ratios + new.log_ratios,
    )


def _cut(response: Response, candidate: Candidate) -> tuple[Candidate, bool]:
    """Return a candidate as far as a stop text or a step ends it, and whether one does."""
    params, ids = response.params, candidate.token_ids
    ended = False
    if params.stop_texts:
        held = params.min_tokens - len(response.output.token_ids)
        found = find_stop(response.text, ids, params.stop_texts, held)
        if found is not None:
            candidate = replace(_first(candidate, found[0]), stopped=True, stop_text_at=found[1])
            ended = True
    if params.segment_end == "step":
        ids = candidate.token_ids
        end = find_step_end(response.text, ids, params.step_text, params.min_segment_length)
        if end is not None and end < len(ids):  # the noise of the rest is drawn by no other
            candidate = replace(_first(candidate, end), stopped=False, stop_text_at=None)
        ended = ended or end is not None
    return candidate, ended


def _first(candidate: Candidate, length: int) -> Candidate:
    return replace(
        candidate,
        token_ids=candidate.token_ids[:length],
        logprobs=candidate.logprobs[:length],
        adjusted_logprobs=candidate.adjusted_logprobs[:length],
        top_logprobs=candidate.top_logprobs[:length],
        log_ratios=candidate.log_ratios[:length],
    )


def _table(candidates: list[Candidate]) -> npt.NDArray[np.int64]:
    """Return int64 ``[R, L]``: the tokens of each candidate, 0 behind them."""
    longest = max(len(candidate.token_ids) for candidate in candidates)
    table = np.zeros((len(candidates), longest), np.int64)
    for row, candidate in enumerate(candidates):
        table[row, : len(candidate.token_ids)] = candidate.token_ids
    return table


def _decided(responses: list[Response], attempts: list[int], goes_on: list[bool]) -> list[bool]:
    """Return whether each row and all earlier attempts of its response have ended."""
    if not any(goes_on):
        return [True] * len(responses)
    first: dict[int, int] = {}  # attempt that goes on, by handle
    for response, attempt, more in zip(responses, attempts, goes_on, strict=True):
        if more:
            first[response.handle] = min(attempt, first.get(response.handle, attempt))
    return [
        response.handle not in first or attempt < first[response.handle]
        for response, attempt in zip(responses, attempts, strict=True)
    ]


def _top_logprobs(draft: Draft, row: int, length: int, count: int) -> list[dict[int, float]]:
    """The `count` most likely tokens at each position of a row, at least one."""
    assert draft.top_tokens is not None
    assert draft.top_logprobs is not None
    tokens = draft.top_tokens[row, :length, :count].tolist()
    logprobs = draft.top_logprobs[row, :length, :count].tolist()
    return [dict(zip(*pair, strict=True)) for pair in zip(tokens, logprobs, strict=True)]


def score_round(
    done: Round,
    scorer: Scorer,
    branches: Iterator[int],
) -> None:
    """Fill in the rewards: r(x) of new requests, then the candidates of scored responses.

    Touches nothing but the round and the scorer, so it may run beside the next round's draft.
    """
    handles = done.plan.unscored.tolist()
    if handles:
        jobs = [ScoreJob(handle, next(branches), [], "") for handle in handles]
        for job, reward in zip(jobs, scorer.score(jobs), strict=True):
            done.prompt_rewards[job.request] = reward
            if not isinstance(reward, Exception):
                scorer.accept(job.request, job.branch)

    failed = {
        handle for handle, reward in done.prompt_rewards.items() if isinstance(reward, Exception)
    }
    decided, errors = done.decided, done.errors
    rows = [
        row
        for row, response in enumerate(done.responses)
        if decided[row]
        and row not in errors
        and response.judged
        and not response.finished
        and response.handle not in failed
    ]
    if not rows:
        return
    begun = time.perf_counter()
    lengths = done.lengths.tolist()
    jobs = [_job(done, row, lengths[row], scorer) for row in rows]
    scorer.on_launch = lambda: done.candidates
    try:
        rewards = scorer.score(jobs)
    finally:
        scorer.on_launch = None
    candidates = done.candidates
    merits: list[float] = []
    for row, reward in zip(rows, rewards, strict=True):
        if isinstance(reward, Exception):
            errors[row] = f"reward: {reward}"
            merits.append(math.nan)
            continue
        candidate = candidates[row]
        if isinstance(reward, CombinedReward):
            candidate.rewards, candidate.keeps = reward.rewards, reward.keeps
        merits.append(_weigh(done.responses[row], candidate, reward))
    done.merits[rows] = merits
    done.seconds["score"] = time.perf_counter() - begun


def _weigh(response: Response, candidate: Candidate, reward: float) -> float:
    """Set a candidate's effective reward; what the scheduler decides by."""
    params, shown = response.params, reward
    if response.reads_logprobs or response.prefixes is not None:
        tokens = len(response.output.token_ids) + len(candidate.token_ids)
        shown = effective_reward(params, reward, candidate, tokens, response.prefixes)
    if not response.reads_logprobs:
        candidate.reward = shown
        return shown
    # In log-probabilities equal candidates differ by rounding.
    known = response.known.setdefault(tuple(candidate.token_ids), (shown, candidate.logprobs))
    candidate.reward, same = known[0], candidate
    if known[1] is not candidate.logprobs:
        same = replace(candidate, logprobs=known[1])
    return merit(params, known[0], same)


def _job(done: Round, row: int, length: int, scorer: Scorer) -> ScoreJob:
    response = done.responses[row]
    text = ""
    if scorer.needs_text:
        candidate = done.candidates[row]
        text = candidate_text(response, candidate).whole[: candidate.stop_text_at]
    new = done.tokens[row, :length]
    return ScoreJob(response.handle, done.branches[row], new, text, response.token_ids)
