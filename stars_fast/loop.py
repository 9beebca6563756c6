"""The round: plan, fork, prefill, draft, score, commit (DESIGN: the C++ scheduler decides)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from stars_fast import _core
from stars_fast.drafter import Draft, RowSampling, draft
from stars_fast.models.paged import PagedModel
from stars_fast.outputs import Attempt, CompletionOutput, FinishReason, Segment
from stars_fast.params import StarsParams
from stars_fast.responses import Candidate, Response, decode, find_stop
from stars_fast.rewards.base import Prompt, ScoreJob, Scorer

PHASES = ("plan", "fork", "prefill", "draft", "score", "commit")

_FINISH: dict[int, FinishReason | None] = {
    _core.FINISH_NONE: None,
    _core.FINISH_STOP: "stop",
    _core.FINISH_LENGTH: "length",
}


@dataclass
class _Round:
    """What the device phases of a round produced, a row each."""

    draft: Draft
    responses: list[Response]
    candidates: list[Candidate]
    lengths: npt.NDArray[np.int32]
    stopped: npt.NDArray[np.uint8]
    rewards: npt.NDArray[np.float64]
    errors: dict[int, str]  # why a row has no valid result
    seconds_per_step: float


class Loop:
    """Runs responses round by round.

    Parameters
    ----------
    model
        The language model on pages.
    scheduler
        Owns the page tables of `model` and decides.
    scorer
        The reward model; None: responses that need one must not be started.
    tokenizer
        For texts; None leaves them empty.
    """

    def __init__(
        self,
        model: PagedModel,
        scheduler: _core.Scheduler,
        scorer: Scorer | None,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self._model = model
        self._scheduler = scheduler
        self._scorer = scorer
        self._tokenizer = tokenizer
        self._responses: dict[int, Response] = {}
        self._handles = itertools.count()
        self._branches = itertools.count()
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @property
    def has_unfinished(self) -> bool:
        """Whether any response is queued or running."""
        return self._scheduler.has_unfinished

    def start(
        self,
        prompt: Prompt,
        params: StarsParams,
        *,
        seed: int,
        stop_token_ids: tuple[int, ...],
    ) -> Response:
        """Queue a response.

        Raises
        ------
        ValueError
            If it does not fit the page pool or the reward model; nothing is queued then.
        """
        handle = next(self._handles)
        scored = params.method == "stars"
        target = params.target_reward if scored else 0.0
        if not isinstance(target, int | float):
            raise ValueError(f"target_reward must be a number by now, got {target!r}")
        if scored:
            self.scorer.start(handle, prompt, params.max_tokens)
        try:
            self._scheduler.add(
                handle,
                np.array(prompt.token_ids, np.int64),
                scored=scored,
                segment_length=params.segment_length,
                max_tokens=params.max_tokens,
                max_attempts=params.attempts_per_segment,
                candidates=0 if params.candidates == "auto" or not scored else params.candidates,
                seed=seed,
                target_reward=float(target),
                alpha=params.alpha,
                beta=params.beta,
                hard=params.acceptance == "hard",
            )
        except BaseException:
            if scored:
                self.scorer.finish(handle)
            raise
        sampling = RowSampling(
            params.temperature, params.top_k, params.top_p, params.min_p, stop_token_ids
        )
        response = Response(handle, params, sampling, CompletionOutput(0))
        self._responses[handle] = response
        return response

    @property
    def scorer(self) -> Scorer:
        """The reward model. Raises ValueError if there is none."""
        if self._scorer is None:
            raise ValueError("a reward model is needed: pass Engine(..., reward_model=...)")
        return self._scorer

    def abort(self, response: Response) -> None:
        """Stop a response; its finish reason becomes ``"abort"`` unless it has one."""
        if self._scheduler.abort(response.handle):
            self._end(response, "abort")

    def step(self) -> list[Response]:
        """Run one round; return the responses with a new segment and those that failed.

        If a phase raises, the round is undone and can be run again.
        """
        with torch.inference_mode():
            with self._clock("plan"):
                plan = self._scheduler.plan()
            failed: list[Response] = []
            try:
                done = self._run(plan, failed)
            except BaseException:
                self._scheduler.cancel()
                self._prune(plan)
                raise
            with self._clock("commit"):
                return failed + self._commit(plan, done)

    # The phases on the device

    def _run(self, plan: _core.Plan, failed: list[Response]) -> _Round:
        with self._clock("fork"):
            self._model.copy_pages(*plan.copies)
        with self._clock("prefill"):
            if plan.prefill.num_rows:
                ids = torch.from_numpy(plan.prefill_tokens).to(self._model.device)
                self._model.prefill(plan.prefill, ids)
        begun = time.perf_counter()
        responses = [self._responses[handle] for handle in plan.request.tolist()]
        with self._clock("draft"):
            drafted = draft(self._model, plan, [r.sampling for r in responses])
        drafting = time.perf_counter() - begun
        with self._clock("score"):
            self._score_prompts(plan, failed)
            begun = time.perf_counter()
            done = self._candidates(plan, drafted, responses)
            self._score(done)
        steps = max(1, plan.draft.max_new)
        done.seconds_per_step = (drafting + time.perf_counter() - begun) / steps
        return done

    def _candidates(self, plan: _core.Plan, drafted: Draft, responses: list[Response]) -> _Round:
        rows = len(responses)
        done = _Round(
            draft=drafted,
            responses=responses,
            candidates=[],
            lengths=drafted.lengths.copy(),
            stopped=drafted.stopped.astype(np.uint8),
            rewards=np.zeros(rows),
            errors={},
            seconds_per_step=0.0,
        )
        attempts = plan.attempt.tolist()
        for row, response in enumerate(responses):
            length = int(done.lengths[row])
            ids = drafted.tokens[row, :length].tolist()
            stop_at = None
            if response.params.stop_texts and self._tokenizer is not None:
                committed = response.output.token_ids
                found = find_stop(self._tokenizer, committed, ids, response.params.stop_texts)
                if found is not None:
                    length, stop_at = found
                    done.lengths[row], done.stopped[row] = length, 1
            done.candidates.append(
                Candidate(
                    branch=next(self._branches),
                    attempt=attempts[row],
                    token_ids=ids[:length],
                    logprobs=drafted.logprobs[row, :length].tolist(),
                    stop_text_at=stop_at,
                )
            )
            bad = int(drafted.bad_step[row])
            if 0 <= bad < length:
                at = len(response.output.token_ids) + bad
                done.errors[row] = (
                    f"the model's logits at response position {at} are NaN or infinite"
                )
                done.rewards[row] = np.nan
        return done

    def _score_prompts(self, plan: _core.Plan, failed: list[Response]) -> None:
        """Set r(x) of the round's new requests; end those whose r(x) cannot be had."""
        handles = plan.unscored.tolist()
        jobs = [ScoreJob(handle, next(self._branches), [], "") for handle in handles]
        if not jobs:
            return
        for handle, job, reward in zip(handles, jobs, self.scorer.score(jobs), strict=True):
            if isinstance(reward, Exception):
                response = self._responses[handle]
                response.error = f"reward of the prompt: {reward}"
                self._scheduler.abort(handle)
                self._end(response, "error")
                failed.append(response)
            else:
                self._scheduler.set_prompt_reward(handle, reward)
                self.scorer.accept(handle, job.branch)

    def _score(self, done: _Round) -> None:
        rows = [
            row
            for row, response in enumerate(done.responses)
            if response.scored and not response.finished and row not in done.errors
        ]
        if not rows:
            return
        jobs = [self._job(done.responses[row], done.candidates[row]) for row in rows]
        for row, reward in zip(rows, self.scorer.score(jobs), strict=True):
            if isinstance(reward, Exception):
                done.errors[row] = f"reward: {reward}"
                done.rewards[row] = np.nan
            else:
                done.rewards[row] = reward

    def _job(self, response: Response, candidate: Candidate) -> ScoreJob:
        ids = response.output.token_ids + candidate.token_ids
        text = ""
        if self.scorer.needs_text:
            text = decode(self._tokenizer, ids)[: candidate.stop_text_at]
        return ScoreJob(response.handle, candidate.branch, ids, text)

    # What the scheduler decided

    def _commit(self, plan: _core.Plan, done: _Round) -> list[Response]:
        decision = self._scheduler.commit(
            done.draft.tokens, done.lengths, done.stopped, done.rewards, done.seconds_per_step
        )
        thresholds = decision.threshold.tolist()
        self._settle_rows(done, decision.outcome.tolist(), thresholds)
        changed = []
        events = zip(
            decision.request.tolist(),
            decision.kind.tolist(),
            decision.row.tolist(),
            decision.start.tolist(),
            decision.attempts.tolist(),
            decision.finish.tolist(),
            strict=True,
        )
        for handle, kind, row, start, attempts, finish in events:
            response = self._responses[handle]
            changed.append(response)
            if kind == _core.EVENT_FAILED:
                response.error = done.errors[row]
                self._end(response, "error")
                continue
            candidate = response.kept if row < 0 else done.candidates[row]
            if candidate is None:
                raise RuntimeError(f"request {handle} fell back to an attempt it does not have")
            if row >= 0 and response.scored:
                candidate = replace(
                    candidate, reward=float(done.rewards[row]), threshold=thresholds[row]
                )
            segment = Segment(
                start=start,
                end=start + len(candidate.token_ids),
                reward=candidate.reward,
                threshold=candidate.threshold,
                attempts=attempts,
                accepted="fallback" if kind == _core.EVENT_FALLBACK else "test",
            )
            response.commit(candidate, segment)
            if response.scored:
                self.scorer.accept(handle, candidate.branch)
            self._write_text(response, candidate, _FINISH[finish])
            if finish != _core.FINISH_NONE:
                self._end(response, _FINISH[finish])
        self._prune(plan)
        return changed

    def _settle_rows(
        self, done: _Round, outcomes: Sequence[int], thresholds: Sequence[float]
    ) -> None:
        """Remember the best of the rejected, and with ``trace`` every rejected attempt."""
        for row, response in enumerate(done.responses):
            if not response.scored or response.finished or thresholds[row] != thresholds[row]:
                continue  # nothing was tested: no reward, or an attempt before it had passed
            reward = float(done.rewards[row])
            candidate = done.candidates[row]
            if response.params.trace:
                response.rejected.append(
                    Attempt(candidate.attempt, tuple(candidate.token_ids), reward)
                )
            if outcomes[row] == _core.ROW_KEPT:
                response.kept = replace(candidate, reward=reward, threshold=thresholds[row])
                self.scorer.keep(response.handle, candidate.branch)

    def _write_text(
        self, response: Response, candidate: Candidate, finish: FinishReason | None
    ) -> None:
        ids = response.output.token_ids
        if finish == "stop" and candidate.stop_text_at is None:
            ids = ids[:-1]  # the stop token is no part of the text
        response.output.text = decode(self._tokenizer, ids)[: candidate.stop_text_at]

    def _prune(self, plan: _core.Plan) -> None:
        for handle in dict.fromkeys(plan.request.tolist()):
            response = self._responses.get(handle)
            if response is not None and response.scored:
                self.scorer.prune(handle)

    def _end(self, response: Response, reason: FinishReason | None) -> None:
        response.output.finish_reason = reason
        response.kept = None
        self._responses.pop(response.handle, None)
        if response.scored:
            self.scorer.finish(response.handle)

    def score_whole(
        self, texts: Sequence[tuple[Prompt, list[int], str]]
    ) -> list[float | Exception]:
        """Return the reward of each (prompt, response ids, response text), or its error."""
        jobs: list[ScoreJob] = []
        errors: dict[int, Exception] = {}
        for number, (prompt, ids, text) in enumerate(texts):
            handle = next(self._handles)
            try:
                self.scorer.start(handle, prompt, len(ids))
            except ValueError as error:
                errors[number] = error
            else:
                jobs.append(ScoreJob(handle, next(self._branches), ids, text))
        try:
            with torch.inference_mode():
                scored = iter(self.scorer.score(jobs))
        finally:
            for job in jobs:
                self.scorer.finish(job.request)
        return [errors[i] if i in errors else next(scored) for i in range(len(texts))]

    @contextmanager
    def _clock(self, phase: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - begun
