"""Requests one at a time: in, round by round, and out again."""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from stars_fast.distributed import ALONE, Ranks
from stars_fast.engine.budget import within_budget
from stars_fast.engine.limits import Limits
from stars_fast.engine.loop import Loop
from stars_fast.engine.one_thread import OneThread, one_thread
from stars_fast.engine.requests import Request
from stars_fast.errors import NotCalibratedError
from stars_fast.methods.stopping import more_samples
from stars_fast.models.lockstep import Lockstep
from stars_fast.models.parameters import multiplied_parameters
from stars_fast.outputs import (
    Calibration,
    PrefixCalibration,
    RequestOutput,
    TokenScore,
)
from stars_fast.params import StarsParams
from stars_fast.prompts import Prompt, PromptLike, Reader
from stars_fast.rewards.combine import CombinedReward
from stars_fast.seeds import derive_seed


class BaseEngine(OneThread, ABC):
    """Requests and the rounds that run them; `BatchEngine` adds whole lists of prompts.

    Parameters
    ----------
    reader
        Reads prompts.
    loop
        Runs the rounds.
    limits
        What requests may ask for.
    tokenizer
        The language model's; None if there is none.
    eos_ids
        Tokens that end a response.
    seed
        A request without a seed gets one from this and from the number of requests before it.
    ranks
        The ranks that run this engine.

    Notes
    -----
    Not thread-safe: a call while another thread is inside one raises `ConcurrentCallError` and does
    nothing.
    """

    def __init__(
        self,
        reader: Reader,
        loop: Loop,
        limits: Limits,
        *,
        tokenizer: PreTrainedTokenizerBase | None,
        eos_ids: tuple[int, ...],
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self._reader = reader
        #: The rounds, and by them the models: to look at, as benchmarks do.
        self.loop = loop
        self._limits = limits
        self.tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._seed = seed
        self._ranks = ranks
        self._calibration: Calibration | None = None
        self._num_seeded = 0
        self._requests: dict[str, Request] = {}
        self._owners: dict[int, Request] = {}  # by response handle

    def read(self, prompt: PromptLike) -> Prompt:
        """Return a prompt as text and token ids.

        Raises
        ------
        ValueError, TypeError
            If it is malformed, or does not fit the model's context.
        """
        return self._reader.read(prompt, 0)

    @property
    def reader(self) -> Reader:
        """What reads prompts, beside the rounds as well."""
        return self._reader

    def prompt_scores(self, token_ids: Sequence[int], top: int = 0) -> list[TokenScore]:
        """Return the log-probabilities of a prompt's own tokens.

        Parameters
        ----------
        token_ids
            The prompt.
        top
            How many of the most likely tokens to name at each place.

        Raises
        ------
        ValueError
            If the language model is not here.
        """
        raise ValueError("logprobs of a prompt need the language model, which is at a server")

    # One request at a time, for serving stacks

    @one_thread
    def add_request(
        self, request_id: str, prompt: PromptLike | Prompt, params: StarsParams | None = None
    ) -> None:
        """Queue a request; `step` runs it.

        A prompt that `check_request` has read is not tokenised again.

        Raises
        ------
        ValueError, TypeError
            If the id is in use, the prompt is bad, or the parameters do not fit the models; the
            message names what is wrong. Nothing is queued then.
        """
        self._check_unused(request_id)
        given = StarsParams() if params is None else params
        params = self._resolve(given)
        read = self._reader.read(prompt, params.longest_response)
        calibrated = given.needs_calibration and given.budget is None
        request = Request(request_id, read, params, calibrated=calibrated)
        if calibrated:
            if self._waits_for_target(request):
                return
            request.params = params = replace(params, target_reward=self._target_of(read))
        prefixes = self._prefixes(params)
        with self._broadcast_call("add_request", request_id, read, params):
            self._queue(request, prefixes)

    def _check_unused(self, request_id: str) -> None:
        if request_id in self._requests:
            raise ValueError(f"request_id {request_id!r} is in use")

    def _queue(self, request: Request, prefixes: PrefixCalibration | None = None) -> None:
        """Start the responses of a request, all or none."""
        params = request.params
        request.seed, request.prefixes = self._seed_of(params), prefixes
        request.groups = [[] for _ in range(params.n)]
        try:
            for group in range(params.n):
                self._draw(request, group, _next_samples(request, group))
        except BaseException:
            self._drop(request)
            raise
        request.unchosen = params.kind.competes is not None
        self._requests[request.request_id] = request

    def _seed_of(self, params: StarsParams) -> int:
        if params.seed is not None:
            return params.seed
        self._num_seeded += 1
        return derive_seed(self._seed, self._num_seeded)

    def _draw(self, request: Request, group: int, count: int) -> None:
        """Start more of the responses that one is chosen from, or the one there is."""
        params = request.params
        ends = not params.ignore_eos and params.rules != "public"
        stop_ids = (self._eos_ids if ends else ()) + tuple(params.stop_token_ids or ())
        drawn = len(request.groups[group])
        for index in range(drawn, drawn + count):
            started = self.loop.start(
                request.prompt,
                params,
                seed=derive_seed(request.seed, group * _samples(params) + index),
                stop_token_ids=stop_ids,
                prefixes=request.prefixes,
            )
            request.groups[group] += started
            self._owners |= {response.handle: request for response in started}

    def check_request(
        self, prompt: PromptLike | Prompt, params: StarsParams | None = None
    ) -> Prompt:
        """Read and check a prompt as `add_request` does, without queueing it.

        Raises
        ------
        ValueError, TypeError
            As `add_request`, but for an id in use and a request that does not fit the page pool or
            the reward model.
        """
        params = self._resolve(StarsParams() if params is None else params)
        self._prefixes(params)
        return self._reader.read(prompt, params.longest_response)

    @one_thread
    def step(self) -> list[RequestOutput]:
        """Run one round.

        Returns
        -------
        list[RequestOutput]
            A copy of every request with a newly accepted segment, finished or not, and of every
            request that failed. Requests that choose among whole responses or paths appear once,
            when they are finished.
        """
        with self._broadcast_call("step"):
            return self._step()

    def _step(self) -> list[RequestOutput]:
        changed: dict[str, Request] = {}
        for response in self.loop.step():
            request = self._owners.get(response.handle)
            if request is None:
                continue  # a sibling failed in this round
            if response.error is not None:
                request.error = response.error
                self._drop(request)
            changed[request.request_id] = request
        self._choose(changed.values())
        shown = [
            request for request in changed.values() if not request.unchosen or request.finished
        ]
        for request in shown:
            if request.finished:
                self._drop(request)
        return [request.to_output() for request in shown if request.samples is None]

    @one_thread
    def abort(self, request_id: str) -> RequestOutput | None:
        """Stop a request and free its pages.

        Returns
        -------
        RequestOutput or None
            What it had committed, finish reason ``"abort"``; None if no such request is unfinished.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        with self._broadcast_call("abort", request_id):
            self._drop(request)
        request.unchosen = False
        return request.to_output()

    def interrupt(self, request_id: str) -> None:
        """Have what a round under way draws for a request fail, where it can be; from any thread.

        A request that this reaches has an `error` when the round ends; `abort` it all the same.
        Where a round cannot be reached into, this does nothing.
        """

    @one_thread
    def reset_prefix_cache(self) -> None:
        """Forget the cached pages of finished prompts; call it when weights have changed.

        Raises
        ------
        ValueError
            If requests are unfinished; their pages come from the old weights.
        """
        if self.has_unfinished():
            raise ValueError("reset_prefix_cache: requests are unfinished; step() or abort() first")
        with self._broadcast_call("reset_prefix_cache"):
            self.loop.clear_cache()

    # Several processes

    @property
    def rank(self) -> int:
        """The rank of this process in a tensor-parallel engine; 0 if it is the only one."""
        return self._ranks.rank

    def lead(self) -> contextlib.AbstractContextManager[None]:
        """Have the other ranks, which `follow`, do what this one does inside the ``with`` block.

        For rank 0, if only one process knows the work: a server, or a reader of files. At the end
        the others return from `follow`. With one process, this does nothing.

        Raises
        ------
        ValueError
            On another rank than 0, or inside of another `lead`.
        EngineStoppedError
            If this rank is out of step with the others.
        """
        return self._ranks.leading()

    def follow(self) -> None:
        """Do what rank 0 does until its `lead` ends; for every other rank.

        Raises
        ------
        ValueError
            On rank 0.
        Exception
            What put this rank out of step with the others: end its process.
        """
        self._ranks.follow(self._followed_calls())

    def _followed_calls(self) -> dict[str, Callable[..., Any]]:
        """Return what rank 0 may have the others do, by name."""
        return {
            "add_request": self.add_request,
            "abort": self.abort,
            "step": self.step,
            "prompt_scores": self.prompt_scores,
            "calibration": functools.partial(setattr, self, "calibration"),
            "reset_prefix_cache": self.reset_prefix_cache,
        }

    def _broadcast_call(
        self, name: str, *arguments: Any
    ) -> contextlib.AbstractContextManager[None]:
        """Have the ranks that follow make the call whose work is done inside."""
        return self._ranks.broadcast_call(name, *arguments)

    @property
    def calibration(self) -> Calibration | None:
        """The calibration used by ``target_reward="auto"`` and None; None before `calibrate`."""
        return self._calibration

    @calibration.setter
    @one_thread
    def calibration(self, value: Calibration | None) -> None:
        self._set_calibration(value)

    def _set_calibration(self, value: Calibration | None) -> None:
        with self._broadcast_call("calibration", value):
            self._calibration = value

    @property
    def max_rows(self) -> int:
        """Most candidates drafted in one round, and most requests that run at once."""
        return self._limits.max_rows

    @property
    def max_length(self) -> int | None:
        """The language model's context in tokens; None where it has no limit, or is not here."""
        return None

    @property
    def has_logprobs(self) -> bool:
        """Whether outputs have the log-probabilities of their tokens."""
        return True

    def has_unfinished(self) -> bool:
        """Whether any request is queued or running."""
        return bool(self._requests)

    def stats(self) -> dict[str, float]:
        """Return counters since the engine was made.

        ``rounds``, ``drafted_tokens``, ``accepted_tokens``, ``prefill_tokens``,
        ``cached_prompt_tokens``, ``attempts``, ``segments``, ``fallbacks``, ``preemptions`` and
        ``page_copies``, ``rows_carried`` (unfinished at the end of a round), ``paths_copied`` and
        ``paths_dropped`` of the scheduler; ``lm_calls``, forward passes of the language model;
        ``row_steps``, rows x steps that drafting ran, of which ``drafted_tokens`` became part of an
        attempt (0 where the model is not here); ``copied_bytes`` of page copies; ``pages_used`` and
        ``pages_free`` of the language model's pool; ``requests_running`` and ``requests_waiting``;
        what the scorer counts (``rm_tokens`` and others); ``seconds_plan``, ``_fork``,
        ``_prefill``, ``_draft``, ``_score``, ``_commit``.
        """
        return self.loop.stats()

    def num_parameters(self, *, beside: bool = False) -> dict[str, int]:
        """Return how many weights a token is multiplied with, for an estimate of operations.

        ``"lm"`` and ``"rm"``: all parameters but an input embedding that is not the output head as
        well. 0 where the model is not here, or is a function. Of several reward models the mean:
        each counts its own tokens.

        Parameters
        ----------
        beside
            The tokens run through guide or draft model and its reference as well, which count as
            ``"lm"``.
        """
        model, scorer = self.loop.model, self.loop.scorer
        lms = [] if model.model is None else [model.model]
        if beside and isinstance(model, Lockstep):
            lms += [one.model for one in model.beside]
        rms = [] if scorer is None else scorer.modules
        return {
            "lm": sum(map(multiplied_parameters, lms)),
            "rm": sum(map(multiplied_parameters, rms)) // max(1, len(rms)),
        }

    def _resolve(self, params: StarsParams) -> StarsParams:
        """Check the parameters against the models, and put a number for the target reward."""
        if not isinstance(params, StarsParams):
            raise TypeError(f"params must be StarsParams, got {params!r:.80}")
        self._limits.check(params)
        if not params.needs_target or isinstance(params.target_reward, int | float):
            return params
        if self.calibration is None:
            raise NotCalibratedError(
                f"target_reward={params.target_reward!r} needs Engine.calibrate first: "
                "call it, or give a number"
            )
        if params.budget is not None:
            return self.within_budget(params)
        return replace(params, target_reward=self.calibration.target_reward)

    def within_budget(self, params: StarsParams) -> StarsParams:
        """Return parameters with what their budget stands for in its place.

        Raises
        ------
        NotCalibratedError
            `calibrate` has not been called with params that have a budget.
        ValueError
            It was, with other segments; or nothing costs as much, or as little.
        """
        if params.budget is None:
            return params
        if self.calibration is None or self.calibration.walks is None:
            raise NotCalibratedError(
                f"budget={params.budget} needs Engine.calibrate first, with params that have one"
            )
        return within_budget(params, self.calibration.walks)

    def _target_of(self, prompt: Prompt) -> float:
        """Return the calibrated target of a prompt."""
        if self.calibration is None:
            raise NotCalibratedError("target_reward='auto' needs Engine.calibrate first: call it")
        targets = self.calibration.targets
        if targets is None:
            return self.calibration.target_reward
        reward = None
        if targets.kind_of(prompt.token_ids) == "relative":
            reward = self._prompt_rewards([prompt])[0]
        return targets.of(prompt.token_ids, reward)

    def _waits_for_target(self, request: Request) -> bool:
        """Whether a request with a calibrated target is kept back, to begin in a later `step`."""
        return False

    @abstractmethod
    def _prompt_rewards(self, prompts: Sequence[Prompt]) -> list[float]:
        """Return r(x) of each prompt, by a call of the reward model."""

    def _prefixes(self, params: StarsParams) -> PrefixCalibration | None:
        """Return what ``calibrate_prefixes`` stands for."""
        if not params.calibrate_prefixes:
            return None
        if self.calibration is None or self.calibration.prefixes is None:
            raise NotCalibratedError(
                "calibrate_prefixes=True needs Engine.calibrate first, on responses of more than "
                "one segment"
            )
        return self.calibration.prefixes

    def _choose(self, requests: Iterable[Request]) -> None:
        """Settle the requests that know all they choose from.

        The whole responses of ``best_of_n`` are scored here, once they are all drawn; of paths one
        has been chosen in the loop.
        """
        for request in requests:
            if request.params.kind.competes == "paths" and request.unchosen:
                chosen = sum(response.chosen for response in request.responses)
                request.unchosen = chosen < request.params.n
        ready = [
            request
            for request in requests
            if request.unchosen
            and request.params.kind.competes == "responses"
            and request.error is None
            and all(response.finished for response in request.responses)
        ]
        new = [
            (request, response)
            for request in ready
            for response in request.responses
            if response.output.reward is None
        ]
        texts = [(one.prompt, r.output.token_ids, r.output.text) for one, r in new]
        scores = self.loop.score_whole(texts, [response for _, response in new]) if new else []
        for (request, response), score in zip(new, scores, strict=True):
            if isinstance(score, Exception):
                request.error = f"reward: {score}"
            else:
                response.output.reward = float(score)
                if isinstance(score, CombinedReward):
                    response.output.rewards, response.keeps = score.rewards, score.keeps
        for request in ready:
            more = [0] * request.params.n
            if request.error is None:
                more = [_next_samples(request, group) for group in range(request.params.n)]
            for group, count in enumerate(more):
                self._draw(request, group, count)
            request.unchosen = any(more)

    def _drop(self, request: Request) -> None:
        """Forget a request; what still runs of it is aborted."""
        for response in request.responses:
            self.loop.abort(response)
            self._owners.pop(response.handle, None)
        if self._requests.pop(request.request_id, None) is not None:
            self._ended(request)

    def _ended(self, request: Request) -> None:
        """Be told of each request that leaves, finished or not."""


def _samples(params: StarsParams) -> int:
    """Return how many whole responses there are to choose from, at most."""
    return params.num_candidates if params.kind.competes == "responses" else 1


def _next_samples(request: Request, group: int) -> int:
    """Return how many responses to start; those there are have been scored."""
    drawn, most = request.groups[group], _samples(request.params)
    if len(drawn) >= most or request.params.kind.competes != "responses":
        return 0 if drawn else most
    rewards = [response.output.reward or 0.0 for response in drawn]
    return more_samples(rewards, most, request.params.sample_cost)
