"""A round under way: its plan, its draft and its rewards."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
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
    responses, candidates
        The response of each row and the segment in it, cut at a stop text.
    lengths, stopped, merits
        As `commit` of the scheduler takes them; merits are rewards, or what a method decides by in
        their place.
    errors
        Why a row has no valid result.
    prompt_rewards
        r(x) of the plan's new requests by handle, or why there is none.
    seconds
        Time of drafting its rows and of scoring them: the cost of rows, prompts left out.
    """

    plan: _core.Plan
    draft: Draft
    responses: list[Response]
    candidates: list[Candidate]
    lengths: npt.NDArray[np.int32]
    stopped: npt.NDArray[np.uint8]
    merits: npt.NDArray[np.float64]
    errors: dict[int, str]
    prompt_rewards: dict[int, float | Exception] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Token positions drafted, at least 1."""
        return max(1, self.plan.draft.max_new)

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

    `branches` gives each an id at the scorer.
    """
    rows = len(responses)
    done = Round(
        plan=plan,
        draft=draft,
        responses=responses,
        candidates=[],
        lengths=draft.lengths.copy(),
        stopped=draft.stopped.astype(np.uint8),
        merits=np.zeros(rows),
        errors={},
    )
    attempts = plan.attempt.tolist()
    for row, response in enumerate(responses):
        length = int(done.lengths[row])
        ids = draft.tokens[row, :length].tolist()
        stop_at = None
        if response.params.stop_texts:
            held = response.params.min_tokens - len(response.output.token_ids)
            found = find_stop(response.text, ids, response.params.stop_texts, held)
            if found is not None:
                length, stop_at = found
                done.lengths[row], done.stopped[row] = length, 1
        if response.params.segment_end == "step":
            params = response.params
            end = find_step_end(
                response.text, ids[:length], params.step_text, params.min_segment_length
            )
            if end is not None and end < length:  # the noise of the rest is drawn by no other
                length, stop_at = end, None
                done.lengths[row], done.stopped[row] = length, 0
        logprobs = draft.logprobs[row, :length].tolist()
        adjusted = draft.adjusted_logprobs
        done.candidates.append(
            Candidate(
                branch=next(branches),
                attempt=attempts[row],
                token_ids=ids[:length],
                logprobs=logprobs,
                adjusted_logprobs=logprobs if adjusted is None else adjusted[row, :length].tolist(),
                top_logprobs=_top_logprobs(draft, row, length, response.params.top_logprobs),
                stopped=bool(done.stopped[row]),
                stop_text_at=stop_at,
            )
        )
        bad = int(draft.nan_step[row])
        if 0 <= bad < length:
            at = len(response.output.token_ids) + bad
            done.errors[row] = f"the model's logits at response position {at} are NaN or infinite"
    done.errors |= draft.errors
    for row in done.errors:
        done.merits[row] = np.nan
    return done


def _top_logprobs(draft: Draft, row: int, length: int, count: int) -> list[dict[int, float]]:
    """The `count` most likely tokens at each position of a row, none if none are asked for."""
    if not count:
        return []
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

    rows = [
        row
        for row, response in enumerate(done.responses)
        if response.scored
        and not response.finished
        and row not in done.errors
        and not isinstance(done.prompt_rewards.get(response.handle), Exception)
    ]
    if not rows:
        return
    begun = time.perf_counter()
    jobs = [_job(done.responses[row], done.candidates[row], scorer) for row in rows]
    for row, reward in zip(rows, scorer.score(jobs), strict=True):
        if isinstance(reward, Exception):
            done.errors[row] = f"reward: {reward}"
            done.merits[row] = np.nan
            continue
        response, candidate = done.responses[row], done.candidates[row]
        if isinstance(reward, CombinedReward):
            candidate.rewards, candidate.keeps = reward.rewards, reward.keeps
        tokens = len(response.output.token_ids) + len(candidate.token_ids)
        shown = effective_reward(response.params, reward, candidate, tokens, response.prefixes)
        # Methods may use log-probabilities, in which equal candidates differ by rounding.
        known = response.known.setdefault(tuple(candidate.token_ids), (shown, candidate.logprobs))
        candidate.reward, same = known[0], candidate
        if known[1] is not candidate.logprobs:
            same = replace(candidate, logprobs=known[1])
        done.merits[row] = merit(response.params, known[0], same)
    done.seconds["score"] = time.perf_counter() - begun


def _job(
    response: Response,
    candidate: Candidate,
    scorer: Scorer,
) -> ScoreJob:
    ids = response.output.token_ids + candidate.token_ids
    text = ""
    if scorer.needs_text:
        text = candidate_text(response, candidate).whole[: candidate.stop_text_at]
    return ScoreJob(response.handle, candidate.branch, ids, text)
