"""The engine: requests in, aligned text out, a round at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stars_fast import _core
from stars_fast.distributed import Ranks
from stars_fast.drafting.base import Drafter
from stars_fast.drafting.eager import EagerDrafter
from stars_fast.drafting.segment_ends import segment_end_levels
from stars_fast.engine.calibration import calibration_of, prefix_calibration_of
from stars_fast.engine.clock import PhaseClock
from stars_fast.engine.loop import PHASES, Loop
from stars_fast.engine.requests import Request
from stars_fast.errors import RewardError
from stars_fast.models.load import load_causal_lm
from stars_fast.models.paged import PagedModel
from stars_fast.models.parameters import multiplied_parameters
from stars_fast.models.pool import KvDtype, default_num_pages
from stars_fast.models.selfcheck import check_numbers
from stars_fast.ops.backend import Backend
from stars_fast.outputs import (
    Calibration,
    CompletionOutput,
    PrefixCalibration,
    RequestOutput,
)
from stars_fast.params import StarsParams
from stars_fast.prompts import PromptLike, PromptReader, as_prompt_list
from stars_fast.rewards.base import Prompt, Scorer
from stars_fast.rewards.load import RewardModelLike, load_scorer
from stars_fast.rewards.on_ranks import load_on_ranks
from stars_fast.rewards.persona import Persona
from stars_fast.rewards.text import TemplateLike
from stars_fast.seeds import derive_seed

_log = logging.getLogger(__name__)

#: Rows that cost as much as a round's fixed part (reading the weights), until that is measured.
FIXED_COST_ROWS = {"cpu": 16.0, "cuda": 256.0}

#: Part of a GPU's free memory that the language model's pool takes by default.
LM_POOL_SHARE = 0.5


class Engine:
    """Aligns a language model to a reward model while it decodes (STARS, arXiv 2511.03827).

    Parameters
    ----------
    model
        A local directory, a hub id, or a loaded transformers causal LM. A loaded model is left as
        it is: its attention is switched only while the engine's own passes run.
    reward_model
        A directory, a hub id, a loaded sequence classifier, a callable
        ``f(prompts: list[str], responses: list[str]) -> list[float]``, an object with such a method
        `score`, or None: then only ``method="vanilla"`` can be run.
    tokenizer
        The language model's; None loads it from `model` where that is a directory or id.
    device, dtype
        Where and in what precision the models run; None is the GPU if there is one, else the CPU;
        ``"auto"`` is the precision the weights are stored in.
    page_size
        Tokens of a KV page, at least 1. Segments whose length it divides fork without a copy.
    num_pages
        Pages of the language model's pool; None: enough for `max_rows` rows, within half of a GPU's
        free memory or an eighth of the machine's. Allocated once.
    max_rows
        Candidates drafted in one round at most, and requests that run at once; twice as many run
        where scoring overlaps, in two halves.
    seed
        Seeds of requests that have none follow from it and from the number of requests before.
    reward_template
        The text that the reward model reads: None (its chat template, else prompt and response
        joined), ``"chat"``, ``"plain"``, text with ``{prompt}`` and ``{response}``, or a callable
        (prompt, response) -> text.
    reward_tokenizer
        The reward model's; None loads it from where the model came from.
    reward_num_pages
        Pages of the reward model's pool; None: as `num_pages`, from what is left.
    reward_device
        Device of the reward model; None: that of the language model.
    prefix_caching
        Share full prompt pages between requests with the same prefix.
    max_prefill_tokens
        Prompt tokens run in one round at most.
    backend
        Form of the operators: ``"auto"``, Triton on a CUDA device and PyTorch elsewhere;
        ``"pytorch"``; or ``"triton"``, which on a CPU is for tests of the kernels.
    kv_dtype
        What the pages of both models hold: ``"auto"``, the dtype of their keys and values, or
        ``"fp8"``, half the memory of bfloat16, on the Triton backend.
    compile_model
        Fuse the small operations of both models by `torch.compile`. Off by default: the first
        rounds of each size wait for the compiler.
    overlap_scoring
        Draft a round while the one before, of other requests, is being scored on a thread of its
        own; None: where the reward model is on another device. It pays where the two do not share
        a processor: another GPU, or a reward function that asks a server.
    device_timing
        Take the seconds of `stats` from CUDA events, phase by phase as the device sees them, at a
        few microseconds a phase. Off, the host's clock charges a phase with its waits.
    tensor_parallel
        Split the models over the processes that ``torchrun`` has started, each of which makes this
        engine and the same calls, or follows (`lead`, `follow`). With one process, nothing changes.
    trust_remote_code, allow_pickle
        Off unless asked for: run code that comes with a model; load weights that are not
        safetensors.

    Notes
    -----
    One thread at a time.
    """

    _ranks: Ranks | None = None  # where several run this engine
    _calibration: Calibration | None = None
    _judges = False  # whether the language model is its own reward model

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        reward_model: RewardModelLike | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        page_size: int = 16,
        num_pages: int | None = None,
        max_rows: int = 256,
        seed: int = 0,
        reward_template: TemplateLike = None,
        reward_tokenizer: PreTrainedTokenizerBase | None = None,
        reward_num_pages: int | None = None,
        reward_device: str | torch.device | None = None,
        prefix_caching: bool = True,
        max_prefill_tokens: int = 8192,
        backend: Backend = "auto",
        kv_dtype: KvDtype = "auto",
        compile_model: bool = False,
        overlap_scoring: bool | None = None,
        device_timing: bool = False,
        tensor_parallel: bool = False,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {max_rows}")
        if num_pages is not None and num_pages < 2:
            raise ValueError(f"num_pages must be at least 2 or None, got {num_pages}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {seed}")
        ranks = Ranks.connect(device) if tensor_parallel else None
        if ranks is not None:
            device = ranks.device
            for name, value in (
                ("overlap_scoring", overlap_scoring),
                ("compile_model", compile_model),
            ):
                if value:
                    raise ValueError(f"{name} must be off with tensor_parallel=True, got {value}")
            overlap_scoring = False
        self._ranks = ranks
        loaded, found_tokenizer = load_causal_lm(
            model,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            num_ranks=1 if ranks is None else ranks.size,
        )
        self.tokenizer = tokenizer if tokenizer is not None else found_tokenizer
        if num_pages is None:
            num_pages = default_num_pages(
                loaded,
                page_size=page_size,
                max_rows=max_rows,
                gpu_share=LM_POOL_SHARE,
                kv_dtype=kv_dtype,
            )
            num_pages = num_pages if ranks is None else ranks.smallest(num_pages)
        check_numbers(loaded, backend=backend)
        self._lm = PagedModel(
            loaded,
            num_pages=num_pages,
            page_size=page_size,
            backend=backend,
            kv_dtype=kv_dtype,
            compile_model=compile_model,
            ranks=ranks,
        )
        if device_timing and self._lm.device.type != "cuda":
            raise ValueError(
                f"device_timing must be False for a model on {self._lm.device}: CUDA has the events"
            )
        self._scorer: Scorer | None = None
        if reward_model is not None:
            load = functools.partial(
                load_scorer,
                reward_model,
                lm_tokenizer=self.tokenizer,
                language_model=loaded,
                reward_tokenizer=reward_tokenizer,
                device=reward_device if reward_device is not None else self._lm.device,
                dtype=dtype,
                template=reward_template,
                num_pages=reward_num_pages,
                page_size=page_size,
                trust_remote_code=trust_remote_code,
                allow_pickle=allow_pickle,
                max_rows=max_rows,
                backend=backend,
                kv_dtype=kv_dtype,
                compile_model=compile_model,
            )
            if ranks is None:
                self._scorer = load()
            else:
                self._scorer = load_on_ranks(
                    lambda on: load(ranks=on), reward_model, ranks, device=reward_device
                )
        self._judges = isinstance(reward_model, Persona)
        if overlap_scoring is None:
            elsewhere = None if self._scorer is None else self._scorer.device
            overlap_scoring = elsewhere is not None and elsewhere != self._lm.device
        if overlap_scoring and self._judges:
            raise ValueError(
                "overlap_scoring must be False with a Persona: it judges by the model that drafts"
            )
        self._scheduler = _core.Scheduler(
            num_pages=num_pages,
            page_size=page_size,
            max_rows=max_rows,
            max_prefill_tokens=max_prefill_tokens,
            prefix_caching=prefix_caching,
            fixed_cost_rows=FIXED_COST_ROWS.get(self._lm.device.type, 16.0),
            lanes=2 if overlap_scoring else 1,
        )
        self._clock = PhaseClock(PHASES, self._lm.device if device_timing else None)
        self._loop = Loop(
            self._lm,
            make_drafter(self._lm, _segment_ends_of(self.tokenizer, self._lm), ranks),
            self._scheduler,
            self._scorer,
            self.tokenizer,
            self._clock,
            overlap=overlap_scoring,
            ranks=ranks,
        )
        self._reader = PromptReader(self.tokenizer, self._lm.vocab_size, self._lm.max_length)
        self._eos_ids = _eos_token_ids(loaded, self.tokenizer)
        self._max_rows = max_rows
        self._seed = seed
        self._num_seeded = 0
        self._requests: dict[str, Request] = {}
        self._owners: dict[int, Request] = {}  # by response handle

    @classmethod
    def demo(cls, **options: Any) -> Engine:
        """Return an engine on the small review models that ship with the package.

        `options` are those of the constructor, `model` and `reward_model` left out.
        """
        from stars_fast import demo

        return cls(str(demo.model_dir()), str(demo.reward_model_dir()), **options)

    # Whole batches

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        params: StarsParams | Sequence[StarsParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Run prompts to their end.

        Parameters
        ----------
        prompts
            One prompt or a list: text, token ids or chat messages.
        params
            For all prompts, or one for each. ``target_reward="auto"`` calibrates on these prompts
            first, unless the engine is calibrated already.
        use_tqdm
            Show a progress bar.

        Returns
        -------
        list[RequestOutput]
            In the order of the prompts. A request that cannot be run has its `error` set and
            harms no other.

        Raises
        ------
        ValueError
            If `params` is a list of another length than `prompts`, or requests added by
            `add_request` are under way.
        """
        if self.has_unfinished():
            raise ValueError("generate: requests added by add_request are unfinished; step() first")
        texts = as_prompt_list(prompts)
        each = _params_of_each(params, len(texts))
        if self.calibration is None:
            uncalibrated = [i for i, p in enumerate(each) if p.target_reward == "auto"]
            if uncalibrated:
                self.calibrate(
                    [texts[i] for i in uncalibrated],
                    params=each[uncalibrated[0]],
                    use_tqdm=use_tqdm,
                )
        done: dict[str, RequestOutput] = {}
        names = [f"generate-{i}" for i in range(len(texts))]
        hidden = not use_tqdm or self.rank != 0
        with tqdm(total=len(texts), disable=hidden, unit="request", desc="generate") as bar:
            for name, text, one in zip(names, texts, each, strict=True):
                try:
                    self.add_request(name, text, one)
                except (ValueError, TypeError) as error:
                    done[name] = _refused(name, text, error)
                    bar.update()
            try:
                while self.has_unfinished():
                    for output in self.step():
                        if output.finished:
                            done[output.request_id] = output
                            bar.update()
            except BaseException:
                for name in names:
                    self.abort(name)
                raise
        return [done[name] for name in names]

    def score(
        self, prompts: PromptLike | Sequence[PromptLike], responses: Sequence[str]
    ) -> list[float]:
        """Return the reward of each response to its prompt.

        Raises
        ------
        ValueError
            Without a reward model, if the counts differ, or if a prompt is bad.
        RewardError
            If the reward model fails on one of them.
        """
        texts = as_prompt_list(prompts)
        if len(texts) != len(responses):
            raise ValueError(f"score: {len(texts)} prompts but {len(responses)} responses")
        pairs = []
        for text, response in zip(texts, responses, strict=True):
            ids: list[int] = []
            if self.tokenizer is not None and response:
                ids = list(self.tokenizer(response, add_special_tokens=False)["input_ids"])
            pairs.append((self._reader.read(text, 0), ids, response))
        with self._told("score", texts, list(responses)):
            scores = self._loop.score_whole(pairs)
        for number, score in enumerate(scores):
            if isinstance(score, Exception):
                raise RewardError(f"score: response {number}: {score}") from score
        return [float(score) for score in scores if not isinstance(score, Exception)]

    def calibrate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        quantile: float = 0.9,
        samples_per_prompt: int = 4,
        params: StarsParams | None = None,
        *,
        use_tqdm: bool = True,
    ) -> Calibration:
        """Find a target reward: a quantile of the rewards of unaligned samples.

        Parameters
        ----------
        prompts
            Prompts like those that will be aligned.
        quantile
            In (0, 1).
        samples_per_prompt
            At least 1.
        params
            Whose sampling parameters to use; None: the defaults.
        use_tqdm
            Show a progress bar.

        Returns
        -------
        Calibration
            Also kept as `calibration`: what ``target_reward="auto"`` and None stand for.
        """
        if not 0.0 < quantile < 1.0:
            raise ValueError(f"quantile must be in (0, 1), got {quantile}")
        if samples_per_prompt < 1:
            raise ValueError(f"samples_per_prompt must be at least 1, got {samples_per_prompt}")
        if self._scorer is None:
            raise ValueError("calibrate needs a reward model: pass Engine(..., reward_model=...)")
        # One attempt of each segment, whatever its reward, and so plain samples: scored as they
        # grow, which costs the reward model no token more and tells what prefixes predict.
        plain = (params or StarsParams()).with_method(
            "stars",
            acceptance="hard",
            target_reward=0.0,
            alpha=1.0,
            max_attempts=1,
            candidates=1,
            calibrate_prefixes=False,
            n=samples_per_prompt,
            trace=False,
        )
        # Its own seeds, so that calibrating does not shift those of the requests that follow.
        texts = as_prompt_list(prompts)
        each = [
            dataclasses.replace(plain, seed=derive_seed(self._seed ^ _CALIBRATION_SALT, i + 1))
            for i in range(len(texts))
        ]
        outputs = self.generate(texts, each, use_tqdm=use_tqdm)
        for output in outputs:
            if output.error is not None and output.error.startswith("reward"):
                raise RewardError(f"calibrate: {output.error}")
        usable = [output for output in outputs if output.error is None]
        if not usable:
            errors = "; ".join(sorted({output.error or "" for output in outputs}))
            raise ValueError(f"calibrate: no prompt could be sampled: {errors or 'none given'}")
        samples = [sample for output in usable for sample in output.outputs]
        rewards = [sample.reward for sample in samples if sample.reward is not None]
        self.calibration = calibration_of(rewards, quantile, prefix_calibration_of(samples))
        return self.calibration

    # One request at a time, for serving stacks

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
        if request_id in self._requests:
            raise ValueError(f"request_id {request_id!r} is in use")
        params = self._resolve(params or StarsParams())
        read = self._reader.read(prompt, params.longest_response)
        request = Request(request_id, read, params)
        prefixes = self._prefixes(params)
        with self._told("add_request", request_id, read, params):
            self._queue(request, prefixes)

    def _queue(self, request: Request, prefixes: PrefixCalibration | None) -> None:
        """Start the responses of a request, all or none."""
        params = request.params
        seed = params.seed
        if seed is None:
            self._num_seeded += 1
            seed = derive_seed(self._seed, self._num_seeded)
        ends = not params.ignore_eos and params.rules != "public"
        stop_ids = (self._eos_ids if ends else ()) + tuple(params.stop_token_ids or ())
        try:
            samples = params.num_candidates if params.method == "best_of_n" else 1
            for index in range(params.n * samples):
                started = self._loop.start(
                    request.prompt,
                    params,
                    seed=derive_seed(seed, index),
                    stop_token_ids=stop_ids,
                    prefixes=prefixes,
                )
                request.responses += started
                self._owners |= {response.handle: request for response in started}
        except BaseException:
            self._drop(request)
            raise
        request.unchosen = params.method == "best_of_n" or params.kind.decides == "paths"
        self._requests[request.request_id] = request

    def check_request(self, prompt: PromptLike, params: StarsParams | None = None) -> Prompt:
        """Return a prompt that can be run with `params` as `add_request` reads it; queue nothing.

        Raises
        ------
        ValueError, TypeError
            As `add_request`, but for an id in use and a request that does not fit the page pool or
            the reward model.
        """
        params = self._resolve(params or StarsParams())
        self._prefixes(params)
        return self._reader.read(prompt, params.longest_response)

    def step(self) -> list[RequestOutput]:
        """Run one round.

        Returns
        -------
        list[RequestOutput]
            A copy of every request with a newly accepted segment, finished or not, and of every
            request that failed. Requests that choose among whole responses or paths appear once,
            when they are finished.
        """
        with self._told("step"):
            return self._step()

    def _step(self) -> list[RequestOutput]:
        changed: dict[str, Request] = {}
        for response in self._loop.step():
            request = self._owners.get(response.handle)
            if request is None:
                continue  # a sibling failed in this round
            if response.error is not None:
                request.error = response.error
                self._drop(request)
            changed[request.request_id] = request
        self._choose(changed.values())
        shown = [
            request for request in changed.values() if request.finished or not request.unchosen
        ]
        for request in shown:
            if request.finished:
                self._drop(request)
        return [request.to_output() for request in shown]

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
        with self._told("abort", request_id):
            self._drop(request)
        request.unchosen = False
        return request.to_output()

    def reset_prefix_cache(self) -> None:
        """Forget the pages of prompts that are over: call it when weights have changed.

        Raises
        ------
        ValueError
            If requests are unfinished; their pages hold what the weights were.
        """
        if self.has_unfinished():
            raise ValueError("reset_prefix_cache: requests are unfinished; step() or abort() first")
        with self._told("reset_prefix_cache"):
            self._loop.wait_for_scoring()
            self._scheduler.clear_cache()

    # Several processes

    @property
    def rank(self) -> int:
        """Which of the processes of a tensor-parallel engine this is; 0 for an engine of one."""
        return 0 if self._ranks is None else self._ranks.rank

    def lead(self) -> contextlib.AbstractContextManager[None]:
        """Have the other ranks, which `follow`, do what this one does inside of ``with``.

        For rank 0, where only one process knows what is to be done: a server, or a reader of files.
        At the end the others return from `follow`. In one process it changes nothing.

        Raises
        ------
        ValueError
            On another rank than 0, or inside of another `lead`.
        EngineStoppedError
            If this rank is out of step with the others.
        """
        return contextlib.nullcontext() if self._ranks is None else self._ranks.leading()

    def follow(self) -> None:
        """Do what rank 0 does, until its `lead` ends; for every other rank.

        Raises
        ------
        ValueError
            On rank 0.
        Exception
            What put this rank out of step with the others: end its process.
        """
        if self._ranks is None:
            raise ValueError("follow: there is one process, which has nobody to follow")
        self._ranks.follow(
            {
                "add_request": self.add_request,
                "abort": self.abort,
                "step": self.step,
                "score": self.score,
                "calibration": functools.partial(setattr, self, "calibration"),
                "reset_prefix_cache": self.reset_prefix_cache,
            }
        )

    def _told(self, name: str, *arguments: Any) -> contextlib.AbstractContextManager[None]:
        """Have the ranks that follow make the call whose work is done inside."""
        if self._ranks is None:
            return contextlib.nullcontext()
        return self._ranks.told(name, *arguments)

    @property
    def calibration(self) -> Calibration | None:
        """What ``target_reward="auto"`` and None stand for; None before `calibrate`."""
        return self._calibration

    @calibration.setter
    def calibration(self, value: Calibration | None) -> None:
        with self._told("calibration", value):
            self._calibration = value

    @property
    def max_rows(self) -> int:
        """Candidates drafted in one round at most, and requests that run at once."""
        return self._max_rows

    def has_unfinished(self) -> bool:
        """Whether any request is queued or running."""
        return bool(self._requests)

    def stats(self) -> dict[str, float]:
        """Return counters since the engine was made.

        ``rounds``, ``drafted_tokens``, ``accepted_tokens``, ``prefill_tokens``,
        ``cached_prompt_tokens``, ``attempts``, ``segments``, ``fallbacks``, ``preemptions`` and
        ``page_copies``, ``paths_copied`` and ``paths_dropped`` of the scheduler; ``lm_calls``,
        forward passes of the language model; ``copied_bytes`` of page copies; ``pages_used`` and
        ``pages_free`` of the language model's pool; ``requests_running`` and ``requests_waiting``;
        what the scorer counts (``rm_tokens`` and others); ``seconds_plan``, ``_fork``,
        ``_prefill``, ``_draft``, ``_score``, ``_commit``.
        """
        scheduler = self._scheduler
        scorer = {} if self._scorer is None else self._scorer.stats()
        return {
            **scheduler.stats,
            "lm_calls": self._loop.lm_calls,
            "copied_bytes": self._lm.copied_bytes,
            "pages_used": scheduler.pages_used,
            "pages_free": scheduler.pages_free,
            "requests_running": scheduler.num_running,
            "requests_waiting": scheduler.num_waiting,
            **scorer,
            **{f"seconds_{phase}": value for phase, value in self._clock.seconds().items()},
        }

    def num_parameters(self) -> dict[str, int]:
        """Return how many weights a token is multiplied with, for an estimate of operations.

        ``"lm"`` and ``"rm"``: all parameters but an input embedding that is not the output head as
        well. ``"rm"`` is 0 without a reward model, and where it is a function.
        """
        reward = None if self._scorer is None else self._scorer.module
        return {
            "lm": multiplied_parameters(self._lm.model),
            "rm": 0 if reward is None else multiplied_parameters(reward),
        }

    def _resolve(self, params: StarsParams) -> StarsParams:
        """Check the parameters against the models, and put a number for the target reward."""
        vocab_size = self._lm.vocab_size
        if params.top_k > vocab_size:
            raise ValueError(f"top_k must be at most the vocabulary, {vocab_size}: {params.top_k}")
        for token in params.stop_token_ids or ():
            if token >= vocab_size:
                raise ValueError(f"stop_token_ids must be in [0, {vocab_size}), got {token}")
        if params.stop_texts and self.tokenizer is None:
            raise ValueError("stop needs a tokenizer: pass Engine(..., tokenizer=...)")
        if params.segment_end != "length" and self.tokenizer is None:
            raise ValueError(
                f"segment_end={params.segment_end!r} needs a tokenizer: pass Engine(..., "
                "tokenizer=...)"
            )
        if params.kind.ranked and params.attempts_per_segment > vocab_size:
            name = "max_attempts" if params.method == "mara" else "candidates"
            raise ValueError(
                f"{name} must be at most the vocabulary, {vocab_size}, with method="
                f"{params.method!r}, got {params.attempts_per_segment}"
            )
        if params.method == "vanilla":
            return params
        if self._scorer is None:
            raise ValueError(
                f"method={params.method!r} needs a reward model: pass Engine(..., reward_model=...)"
            )
        if (params.method == "persona_judge") != self._judges:
            raise ValueError(
                "method='persona_judge' and Engine(..., reward_model=Persona(...)) go together, "
                f"got method={params.method!r} with {type(self._scorer).__name__}"
            )
        paths = params.num_candidates if params.kind.decides == "paths" else 1
        if paths > self._max_rows:
            raise ValueError(
                f"candidates must be at most max_rows, {self._max_rows}, with method="
                f"{params.method!r}, got {paths}"
            )
        if params.needs_target and not isinstance(params.target_reward, int | float):
            if self.calibration is None:
                raise ValueError(
                    f"target_reward={params.target_reward!r} needs Engine.calibrate first: "
                    "call it, or give a number"
                )
            return dataclasses.replace(params, target_reward=self.calibration.target_reward)
        return params

    def _prefixes(self, params: StarsParams) -> PrefixCalibration | None:
        """Return what ``calibrate_prefixes`` stands for."""
        if not params.calibrate_prefixes:
            return None
        if self.calibration is None or self.calibration.prefixes is None:
            raise ValueError(
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
            if request.params.kind.decides == "paths" and request.unchosen:
                chosen = sum(response.chosen for response in request.responses)
                request.unchosen = chosen < request.params.n
        ready = [
            request
            for request in requests
            if request.unchosen
            and request.params.method == "best_of_n"
            and request.error is None
            and all(response.finished for response in request.responses)
        ]
        texts = [
            (request.prompt, response.output.token_ids, response.output.text)
            for request in ready
            for response in request.responses
        ]
        owners = [response for request in ready for response in request.responses]
        scores = iter(self._loop.score_whole(texts, owners) if texts else [])
        for request in ready:
            request.unchosen = False
            for response, score in zip(request.responses, scores, strict=False):
                if isinstance(score, Exception):
                    request.error = f"reward: {score}"
                else:
                    response.output.reward = score

    def _drop(self, request: Request) -> None:
        """Forget a request; what still runs of it is aborted."""
        for response in request.responses:
            self._loop.abort(response)
            self._owners.pop(response.handle, None)
        self._requests.pop(request.request_id, None)


#: Sets the draws of calibration apart from those of requests.
_CALIBRATION_SALT = 0xCA11B8A7E


def _segment_ends_of(
    tokenizer: PreTrainedTokenizerBase | None, model: PagedModel
) -> Callable[[], Tensor]:
    """Return what gives, once it is asked for, what ends with each token."""

    # Not a method: an engine that its own parts hold would keep its pages until it is collected.
    @functools.cache
    def segment_ends() -> Tensor:
        assert tokenizer is not None  # checked when the request came
        return segment_end_levels(tokenizer, model.vocab_size).to(model.device)

    return segment_ends


def make_drafter(
    model: PagedModel, segment_ends: Callable[[], Tensor], ranks: Ranks | None = None
) -> Drafter:
    """Return the drafter that suits a model's backend; for `segment_ends` see `EagerDrafter`."""
    if ranks is not None:
        if model.on_kernels:
            _log.info("decode steps run without a CUDA graph: the model is tensor-parallel")
        return EagerDrafter(model, segment_ends, ranks.share)
    if not model.on_kernels:
        return EagerDrafter(model, segment_ends)
    from stars_fast.drafting.captured import CapturedDrafter  # Triton is for Linux only

    return CapturedDrafter(model, segment_ends)


def _params_of_each(
    params: StarsParams | Sequence[StarsParams] | None, count: int
) -> list[StarsParams]:
    if params is None or isinstance(params, StarsParams):
        return [params or StarsParams()] * count
    if len(params) != count:
        raise ValueError(
            f"params must be one for all or one per prompt ({count}), got {len(params)}"
        )
    return list(params)


def _refused(request_id: str, prompt: PromptLike, error: Exception) -> RequestOutput:
    text = prompt if isinstance(prompt, str) else None
    outputs = [CompletionOutput(0, finish_reason="error")]
    return RequestOutput(request_id, text, [], outputs, finished=True, error=str(error))


def _eos_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int, ...]:
    """Return the end-of-sequence ids that `model.generate` would stop at."""
    for owner in (getattr(model, "generation_config", None), model.config, tokenizer):
        found = getattr(owner, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, list | tuple) else (int(found),)
    return ()
