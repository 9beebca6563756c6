"""The round: plan, fork, prefill, draft, score, commit (DESIGN: the C++ scheduler decides)."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from stars_fast import _core
from stars_fast.distributed import ALONE, Ranks
from stars_fast.drafting.base import Draft, Drafter, LaunchingDrafter, RowSampling
from stars_fast.drafting.grammar import Grammars, GrammarState
from stars_fast.drafting.pace import Pace
from stars_fast.engine.clock import PhaseClock
from stars_fast.engine.detokenize import response_text
from stars_fast.engine.outcomes import Outcomes, rows_of
from stars_fast.engine.requests import Response
from stars_fast.engine.round import Round, cut_candidates, score_round
from stars_fast.engine.sampling import continued, counts_of, row_sampling
from stars_fast.methods.decisions import scheduler_options
from stars_fast.models.images import ImageEncoder, ImageRows, SeenPrompt
from stars_fast.outputs import (
    CompletionOutput,
    PrefixCalibration,
)
from stars_fast.params import StarsParams
from stars_fast.rewards.base import Prompt, ScoreJob, Scorer
from stars_fast.seeds import derive_seed
from stars_fast.text.decoders import Decodes
from stars_fast.text.words import word_tokens

_log = logging.getLogger(__name__)

PHASES = ("plan", "fork", "prefill", "draft", "score", "commit")


class LanguageModel(Protocol):
    """What rounds need of the language model besides drafts: its pages, if they are local."""

    @property
    def model(self) -> PreTrainedModel | None:
        """The model; None where it is not here."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        ...

    @property
    def copied_bytes(self) -> int:
        """Bytes moved by page copies so far."""
        ...

    def copy_pages(
        self,
        source: npt.NDArray[np.int32],
        target: npt.NDArray[np.int32],
        count: npt.NDArray[np.int32],
    ) -> None:
        """Copy the first `count` tokens of pages, all layers."""
        ...

    def prefill(
        self, batch: _core.Batch, token_ids: torch.Tensor, images: ImageRows | None = None
    ) -> None:
        """Run tokens of prompts; `images`: the same with the features of their pictures."""
        ...


@dataclass
class _Launched:
    """A round up to its draft, which may still run."""

    plan: _core.Plan
    responses: list[Response]
    read: Callable[[], Draft]  # waits for it
    beside: float  # seconds before its prefill
    drafting: float  # seconds of launching its draft


class Loop:
    """Runs responses round by round.

    Parameters
    ----------
    model
        The language model on pages.
    drafter
        Draws segments with it.
    scheduler
        Owns the page tables of `model` and decides.
    scorer
        The reward model; None: responses that need one must not be started.
    tokenizer
        For texts; None leaves them empty.
    clock
        Clock of `PHASES`.
    overlap
        Score a round on a thread of its own while the next one, of other requests, is drafted; the
        scheduler has two lanes then.
    ranks
        Ranks that run the same rounds; only one with `overlap`.
    grammars
        Compiles the grammars of requests; None: none has one.
    pace
        Told what rounds cost; the drafter's, if that ends rounds of which some rows go on.
    images
        Encodes the pictures of prompts; None: none has any.
    ahead
        Launch the next round's draft before the texts and outputs of a round are made, so that the
        device drafts meanwhile and until the next `step`; not with `overlap`.

    Attributes
    ----------
    model, drafter, scorer, pace
        As given.
    on_round
        Called with each round that is drafted, before it is scored; None: nobody is told.
    before_plan
        Called in `step` before a draft is launched ahead: what is added then takes part in it.
    lm_calls, row_steps
        Forward passes of the language model; rows x steps of those that drafted.
    discarded
        Drafted tokens behind the first that was not accepted.
    """

    def __init__(
        self,
        model: LanguageModel,
        drafter: Drafter,
        scheduler: _core.Scheduler,
        scorer: Scorer | None,
        tokenizer: Decodes | None,
        clock: PhaseClock,
        *,
        overlap: bool = False,
        ranks: Ranks = ALONE,
        grammars: Grammars | None = None,
        pace: Pace | None = None,
        images: ImageEncoder | None = None,
        ahead: bool = False,
    ) -> None:
        self.pace = pace
        self.images = images
        self._grammars = grammars
        self.model = model
        self.drafter = drafter
        self.on_round: Callable[[Round], None] | None = None
        self.before_plan: Callable[[], None] | None = None
        self._scheduler = scheduler
        self.scorer = scorer
        self._tokenizer = tokenizer
        self._responses: dict[int, Response] = {}
        self._outcomes = Outcomes(self._responses, scorer)
        self._handles = itertools.count()
        self._branches = itertools.count()
        self._clock = clock
        self._ranks = ranks
        self._ahead = ahead
        self._launched: _Launched | None = None
        self._worker = futures.ThreadPoolExecutor(1, "stars-fast-score") if overlap else None
        self._scoring: futures.Future[Round] | None = None
        self._planned: deque[_core.Plan] = deque()  # out, the oldest first
        self.lm_calls = 0
        self.row_steps = 0
        self.discarded = 0

    @property
    def has_unfinished(self) -> bool:
        """Whether any response is queued or running."""
        return self._scheduler.has_unfinished

    @property
    def pages_used(self) -> int:
        """Pages of the language model's pool in use."""
        return self._scheduler.pages_used

    def stats(self) -> dict[str, float]:
        """Return the counters of `BaseEngine.stats`."""
        scheduler = self._scheduler
        drafted = scheduler.stats["drafted_tokens"] + self.discarded
        scorer = {} if self.scorer is None else self.scorer.stats()
        return {
            **scheduler.stats,
            "drafted_tokens": drafted,
            "lm_calls": self.lm_calls,
            "row_steps": self.row_steps,
            "copied_bytes": self.model.copied_bytes,
            "pages_used": scheduler.pages_used,
            "pages_free": scheduler.pages_free,
            "requests_running": scheduler.num_running,
            "requests_waiting": scheduler.num_waiting,
            **scorer,
            **{f"seconds_{phase}": value for phase, value in self._clock.seconds().items()},
        }

    def clear_cache(self) -> None:
        """Forget the cached pages of finished prompts; nothing may be unfinished."""
        self.wait_for_scoring()
        self._scheduler.clear_cache()

    def start(
        self,
        prompt: Prompt,
        params: StarsParams,
        *,
        seed: int,
        stop_token_ids: tuple[int, ...],
        prefixes: PrefixCalibration | None = None,
    ) -> list[Response]:
        """Queue a response: itself, or the paths of which one will be it.

        Raises
        ------
        ValueError
            If it does not fit the page pool or the reward model; nothing is queued then.
        """
        seen = None
        if prompt.images is not None:
            if self.images is None:
                raise ValueError("the language model sees no images, and the prompt has some")
            if params.guide_weight and not self.images.guides_see:
                raise ValueError(
                    "guide_weight must be 0 for a prompt with images: not every guide is a model "
                    "of the language model's type, which sees them"
                )
            if params.kind.draft is not None:
                raise ValueError(
                    f"method={params.method!r} is not for a prompt with images: no draft model "
                    "sees any"
                )
            self.wait_for_scoring()  # the reward model may be the same
            seen = self.images.see(prompt)
        ids = np.array(prompt.token_ids, np.int64) if seen is None else seen.scheduler_ids
        if params.kind.decides != "paths":
            options = scheduler_options(params)

            def queue(handles: list[int]) -> None:
                self._scheduler.add(handles[0], ids, seed=seed, **options)

            return self._start(prompt, params, 1, stop_token_ids, prefixes, queue, seen)

        count = params.num_candidates

        def queue_paths(handles: list[int]) -> None:
            self._scheduler.add_group(
                handles,
                [derive_seed(seed, 1 + number) for number in range(count)],
                ids,
                resample=params.kind.resamples,
                segment_length=params.draft_length,
                max_tokens=params.max_tokens,
                seed=seed,
                beta=params.beta,
                ess_threshold=params.ess_threshold,
                rejection_rate=params.rejection_rate,
            )

        return self._start(prompt, params, count, stop_token_ids, prefixes, queue_paths, seen)

    def _start(
        self,
        prompt: Prompt,
        params: StarsParams,
        count: int,
        stop_token_ids: tuple[int, ...],
        prefixes: PrefixCalibration | None,
        queue: Callable[[list[int]], None],
        seen: SeenPrompt | None,
    ) -> list[Response]:
        """Tell the scorer and, through `queue`, the scheduler; all or nothing."""
        self.wait_for_scoring()
        handles: list[int] = []
        try:
            for _ in range(count):
                handle = next(self._handles)
                if params.scored:
                    self._needed_scorer.start(handle, prompt, params.longest_response)
                handles.append(handle)
            queue(handles)
        except BaseException:
            if params.scored:
                for handle in handles:
                    self._needed_scorer.finish(handle)
            raise
        words = word_tokens(self._tokenizer, params.bad_words or ())
        sampling = row_sampling(params, stop_token_ids, words)
        if seen is not None:
            sampling = replace(sampling, position_shift=seen.shift)
        responses = [
            Response(
                handle,
                params,
                replace(sampling, counts=counts_of(params, prompt), grammar=self._grammar(params)),
                CompletionOutput(0),
                response_text(self._tokenizer, prompt),
                prefixes=prefixes,
                is_path=params.kind.decides == "paths",
                seen=seen,
            )
            for handle in handles
        ]
        self._responses |= {response.handle: response for response in responses}
        return responses

    def _grammar(self, params: StarsParams) -> GrammarState | None:
        if params.guided is None:
            return None
        assert self._grammars is not None  # checked when the request came
        return self._grammars.start(params.guided)

    @property
    def _needed_scorer(self) -> Scorer:
        """The reward model. Raises ValueError if there is none."""
        if self.scorer is None:
            raise ValueError("a reward model is needed: pass Engine(..., reward_model=...)")
        return self.scorer

    def abort(self, response: Response) -> None:
        """Stop a response; its finish reason becomes ``"abort"`` unless it has one."""
        self.wait_for_scoring()
        self._record()
        if response.handle in self._responses:
            self._scheduler.abort(response.handle)  # of paths the first takes the others along
            self._outcomes.end(response, "abort")
            if not self.has_unfinished:
                self._finish_rounds()  # no further step will run, and the round holds pages

    def step(self) -> list[Response]:
        """Run one round; return the responses with a new segment and those that failed.

        Where scoring overlaps, those are of the round before, and the new one is being scored when
        this returns; where drafts are launched ahead, the next one is being drafted. If a phase
        raises, the rounds under way are undone and can be run again.
        """
        with torch.inference_mode(), self._together():
            try:
                self._run()
                if self._ahead:
                    self._launch_ahead()
            except BaseException:
                self._undo()
                raise
            self._record()
        return self._outcomes.take_changed()

    def _together(self) -> contextlib.AbstractContextManager[None]:
        return self._ranks.together()

    def wait_for_scoring(self) -> None:
        """Wait until the scorer is free, so that the caller's thread may use it."""
        if self._scoring is not None:
            futures.wait([self._scoring])

    # The phases of a round

    def _run(self) -> None:
        self._record()  # of a step that was interrupted
        launched, self._launched = self._launched or self._launch(), None
        done = self._collect(launched)
        if self._worker is None:
            self._commit(self._score(done))
            return
        self._finish_scoring()
        self._scoring = self._worker.submit(self._score, done)

    def _launch_ahead(self) -> None:
        """Launch the next round, if there is one whose draft need not be waited for."""
        if self.before_plan is not None:
            self.before_plan()
        # The host takes part in the steps of rows with a grammar.
        waits = any(one.sampling.grammar is not None for one in self._responses.values())
        if waits or not self.has_unfinished:
            return
        try:
            self._launched = self._launch()
        except Exception:  # noqa: BLE001 - the round before is to come out all the same
            _log.exception("a round could not be launched ahead: the next step runs it again")
            self._undo()

    def _launch(self) -> _Launched:
        """Plan a round and run it up to its draft, which is launched where that can be."""
        begun = time.perf_counter()
        with self._clock.phase("plan"):
            plan = self._scheduler.plan()
        self._planned.append(plan)
        if self._ranks.size > 1:
            self._ranks.check_same(
                "the round",
                *(plan.request, plan.attempt, plan.seed, plan.position, plan.stream, plan.drawn),
                *(plan.held, plan.held_attempt),
                plan.first_token,
                *(plan.prefill_tokens, plan.unscored, plan.draft.new_lengths, plan.draft.slots),
            )
        with self._clock.phase("fork"):
            self.model.copy_pages(*plan.copies)
        beside = time.perf_counter() - begun
        with self._clock.phase("prefill"):
            if plan.prefill.num_rows:
                self._prefill(plan)
                self.lm_calls += 1
        responses = [self._responses[handle] for handle in rows_of(plan)]
        if not responses:
            return _Launched(plan, responses, Draft.of_no_rows, beside, 0.0)
        sampling = _sampling(plan, responses)
        read: Callable[[], Draft] = functools.partial(self.drafter.draft, plan, sampling)
        begun = time.perf_counter()
        if self._ahead:
            with self._clock.phase("draft"):
                read = self._draft_of(plan, sampling)
        return _Launched(plan, responses, read, beside, time.perf_counter() - begun)

    def _draft_of(self, plan: _core.Plan, sampling: Sequence[RowSampling]) -> Callable[[], Draft]:
        """Launch a draft, or run it where that is all the drafter can; what gives it."""
        if isinstance(self.drafter, LaunchingDrafter):
            return self.drafter.launch(plan, sampling)
        drafted = self.drafter.draft(plan, sampling)
        return lambda: drafted

    def _collect(self, launched: _Launched) -> Round:
        """Wait for a round's draft."""
        begun = time.perf_counter()
        with self._clock.phase("draft"):
            drafted = launched.read()
        seconds = launched.drafting + time.perf_counter() - begun
        calls = drafted.lm_calls
        self.lm_calls += drafted.steps if calls is None else calls
        self.row_steps += drafted.row_steps
        if drafted.discarded is not None:
            self.discarded += int(drafted.discarded.sum())
        done = cut_candidates(launched.plan, drafted, launched.responses, self._branches)
        done.seconds["draft"] = seconds if drafted.seconds is None else drafted.seconds
        done.beside = launched.beside
        if self.on_round is not None:
            self.on_round(done)
        return done

    def _prefill(self, plan: _core.Plan) -> None:
        ids, images = plan.prefill_tokens, None
        if self.images is not None:
            seen = [self._responses[handle].seen for handle in plan.prefill_request.tolist()]
            images = ImageRows.of(plan.prefill, ids, seen) if any(seen) else None
        self.model.prefill(plan.prefill, torch.from_numpy(ids).to(self.model.device), images)

    def _score(self, done: Round) -> Round:
        """Score a round, on the worker's thread where scoring overlaps."""
        if self.scorer is not None:
            # Ends with the rewards on the host, so the host's clock is right on any device.
            with torch.inference_mode(), self._clock.phase("score", on_host=True):
                score_round(done, self.scorer, self._branches)
        return done

    def _finish_scoring(self) -> None:
        """Commit the round that is being scored, if there is one."""
        if self._scoring is not None:
            scoring, self._scoring = self._scoring, None
            self._commit(scoring.result())

    def _finish_rounds(self) -> None:
        """Commit what is out; nothing is unfinished."""
        self._finish_scoring()
        if self._launched is not None:
            try:
                with torch.inference_mode(), self._together():
                    self._run()
            except BaseException:
                self._undo()
                raise
        self._record()

    def _undo(self) -> None:
        """Give back every round that is out; what was decided before them stays."""
        self._record()
        self.wait_for_scoring()
        self._scoring = None
        if self._planned:
            self._scheduler.cancel()
        for plan in self._planned:
            self._outcomes.prune(plan)
        self._planned.clear()

    def _charge_scoring(self) -> None:
        """Note what the reward model has run for each response."""
        if self.scorer is not None:
            for handle, tokens in self.scorer.take_tokens().items():
                response = self._responses.get(handle)
                if response is not None:
                    response.rm_tokens += tokens

    def _set_prompt_rewards(self, done: Round) -> list[Response]:
        """Set r(x) of the round's new requests; end and return those without r(x)."""
        failed = []
        for handle, reward in done.prompt_rewards.items():
            response = self._responses.get(handle)
            if response is None:
                continue  # aborted meanwhile
            if isinstance(reward, Exception):
                response.error = f"reward of the prompt: {reward}"
                self._scheduler.abort(handle)
                self._outcomes.end(response, "error")
                failed.append(response)
            else:
                self._scheduler.set_prompt_reward(handle, reward)
        return failed

    # What the scheduler decided

    def _commit(self, done: Round) -> None:
        """Commit the oldest round that is out; its rewards are known.

        With drafts launched ahead, what the next one does not need is left to `_record`.
        """
        begun = time.perf_counter()
        with self._clock.phase("commit"):
            if done.prompt_rewards:
                self._charge_scoring()  # before some of them end
                self._outcomes.changed += self._set_prompt_rewards(done)
            decision = self._decide(done)
        # Paths that take another's place need all of it.
        if not self._ahead or len(decision.copy_target):
            self._record()
        if self.pace is not None and done.draft.steps:
            beside = done.beside + time.perf_counter() - begun + done.seconds.get("score", 0.0)
            patience = self.pace.observe(done.draft.steps, done.seconds["draft"], done.read, beside)
            self.pace.patience = self._ranks.first(patience)

    def _decide(self, done: Round) -> _core.Decision:
        """Have the scheduler decide, and take the responses to where their next draft begins."""
        spent = done.seconds.values()
        seconds = max(spent) if self._worker is not None else sum(spent)
        seconds = self._ranks.first(seconds)
        decision = self._scheduler.commit(
            done.tokens,
            done.lengths,
            done.stopped,
            done.merits,
            seconds / done.steps,
            done.breaks,
            done.unfinished,
        )
        self._planned.popleft()
        self._outcomes.take(done, decision)
        return decision

    def _record(self) -> None:
        """Write down what was decided last, if that is still to be done."""
        if self._outcomes.pending:
            with self._clock.phase("commit"):
                self._charge_scoring()
                self._outcomes.write()

    def score_whole(
        self,
        texts: Sequence[tuple[Prompt, list[int], str]],
        responses: Sequence[Response] | None = None,
    ) -> list[float | Exception]:
        """Return the reward of each (prompt, response ids, response text), or its error.

        `responses`: whose texts they are, to be charged with what it costs.
        """
        self.wait_for_scoring()
        ids_of_all = [ids for prompt, response, _ in texts for ids in (prompt.token_ids, response)]
        self._ranks.check_same("what is to be scored", *map(np.asarray, ids_of_all))
        self._charge_scoring()
        jobs: list[ScoreJob] = []
        errors: dict[int, Exception] = {}
        owners: dict[int, Response] = {}
        for number, (prompt, ids, text) in enumerate(texts):
            handle = next(self._handles)
            try:
                self._needed_scorer.start(handle, prompt, len(ids))
            except ValueError as error:
                errors[number] = error
            else:
                jobs.append(ScoreJob(handle, next(self._branches), ids, text))
                if responses is not None:
                    owners[handle] = responses[number]
        try:
            with torch.inference_mode(), self._together():
                scored = iter(self._needed_scorer.score(jobs))
        finally:
            for job in jobs:
                self._needed_scorer.finish(job.request)
        for handle, tokens in self._needed_scorer.take_tokens().items():
            if handle in owners:
                owners[handle].rm_tokens += tokens
        return [errors[i] if i in errors else next(scored) for i in range(len(texts))]


def _sampling(plan: _core.Plan, responses: Sequence[Response]) -> list[RowSampling]:
    """Return how each row of the draft is sampled."""
    rows = zip(responses, plan.attempt.tolist(), plan.drawn.tolist(), strict=False)
    return [
        continued(response.sampling, response.under_way[attempt].token_ids)
        if drawn
        else response.sampling
        for response, attempt, drawn in rows
    ]
