"""STARS in vLLM's own scheduler: ``--scheduler-cls stars_fast.vllm.StarsScheduler``.

Experimental: it stands on parts of vLLM that are not public, and so on the versions in `VERSIONS`.

A request with ``extra_args={"stars": {...}}`` is never run itself. The rounds of stars_fast
(`Rounds`, on a thread of their own) ask for its segments, and each attempt at one is a child: a
request of vLLM whose prompt is the text so far, whose blocks are those of a branch before it, and
which ends after K tokens. Its blocks are then kept while it is judged. Where it is accepted, the
next children begin on them; where not, nothing has to be taken back. A part-filled last block is
copied by vLLM itself, as for a hit that ends inside a block.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import vllm
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SlidingWindowManager
from vllm.v1.engine import EngineCoreEvent, EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from stars_fast.outputs import RequestOutput
from stars_fast.remote.calls import Call, Drawn
from stars_fast.vllm.branches import best_base, outdated
from stars_fast.vllm.callers import sampling_params
from stars_fast.vllm.extra_args import KEY, params_of
from stars_fast.vllm.options import options_from
from stars_fast.vllm.rounds import Round, Rounds, SchedulerCaller

#: Versions of vLLM that this was tested with.
VERSIONS = ("0.32.0",)

if vllm.__version__.partition("+")[0] not in VERSIONS:
    raise ImportError(
        f"StarsScheduler was tested with vLLM {', '.join(VERSIONS)} and this is "
        f"{vllm.__version__}: use StarsLLM or the routes of VLLM_PLUGINS=stars, which stand on "
        "vLLM's public parts"
    )

logger = init_logger(f"vllm.{__name__}")  # below vLLM's own, whose handler it has

#: How long a step waits for the rounds where there is nothing else to do, in seconds; what comes
#: from elsewhere waits as long.
_IDLE_SECONDS = 0.005

_ENDED_WELL = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


@dataclass(eq=False)
class _Child:
    """One attempt at a segment; a `Branch`.

    Attributes
    ----------
    request
        Of vLLM, with the text so far as its prompt.
    answer
        Of the call that it is a row of.
    """

    request: Request
    answer: _Answer

    @property
    def prefix(self) -> int:
        return int(self.request.num_prompt_tokens)

    @property
    def prompt(self) -> list[int]:
        prompt: list[int] = self.request.prompt_token_ids
        return prompt

    @property
    def tokens(self) -> list[int]:
        tokens: list[int] = self.request._all_token_ids
        return tokens

    @property
    def computed(self) -> int:
        return int(self.request.num_computed_tokens)


@dataclass(eq=False)
class _Answer:
    """The segments of a call, as its children end."""

    future: Future[list[Drawn]]
    children: list[_Child] = field(default_factory=list)

    def give(self) -> None:
        """Answer the call if every child has ended."""
        requests = [child.request for child in self.children]
        if self.future.done() or not all(one.is_finished() for one in requests):
            return
        for one in requests:
            if one.status not in _ENDED_WELL or not one.num_output_tokens:
                self.future.set_exception(RuntimeError(f"vLLM ended a segment as {one.status}"))
                return
        self.future.set_result(
            [
                Drawn(list(one.output_token_ids), one.status == RequestStatus.FINISHED_STOPPED)
                for one in requests
            ]
        )


@dataclass(eq=False)
class _Parent:
    """A request that has children.

    Attributes
    ----------
    request
        As it came.
    queued
        Children that vLLM has not got yet.
    active
        Those that it has.
    parked
        Those that have ended, whose blocks are kept.
    sent
        Tokens that have gone out.
    prefill, events
        Of the first child, for vLLM's metrics.
    """

    request: Request
    queued: list[_Child] = field(default_factory=list)
    active: list[_Child] = field(default_factory=list)
    parked: list[_Child] = field(default_factory=list)
    sent: int = 0
    prefill: PrefillStats | None = None
    events: list[EngineCoreEvent] | None = None


class StarsScheduler(Scheduler):
    """vLLM's scheduler, which runs requests with ``extra_args={"stars": {...}}`` by segments.

    The reward model and the defaults are those of `options_from`. Requests without the key are
    scheduled as ever. With asynchronous scheduling it makes an `AsyncStarsScheduler`; a subclass of
    one of vLLM's two schedulers would have the other's steps wait for each other.

    Parameters
    ----------
    vllm_config, kv_cache_config, structured_output_manager, block_size, options
        See vLLM's `Scheduler`.

    Raises
    ------
    ValueError, ModelLoadError
        An option or the reward model does not fit, or vLLM has something on that was not tested
        with this.
    """

    def __new__(cls, vllm_config: VllmConfig, *_: Any, **__: Any) -> StarsScheduler:
        """Choose the class by what the configuration says of asynchronous scheduling."""
        ahead = vllm_config.scheduler_config.async_scheduling
        made: StarsScheduler = super().__new__(
            AsyncStarsScheduler if cls is StarsScheduler and ahead else cls
        )
        return made

    def __init__(self, vllm_config: VllmConfig, *args: Any, **options: Any) -> None:
        super().__init__(vllm_config, *args, **options)
        self._check_parts()
        own = options_from(os.environ)
        self._base = own.stars_params()
        self._caller = SchedulerCaller(vllm_config)
        self._rounds = Rounds(self._caller, own)
        self._numbers = count()
        self._parents: dict[str, _Parent] = {}
        self._children: dict[str, tuple[_Parent, _Child]] = {}
        self._refused: list[tuple[Request, str]] = []

    def _check_parts(self) -> None:
        """Refuse what was not tested with this."""
        config = self.vllm_config
        managers = self.kv_cache_manager.coordinator.single_type_managers
        others = {type(one).__name__ for one in managers} - {
            FullAttentionManager.__name__,
            SlidingWindowManager.__name__,
        }
        for found, what in (
            (not self.cache_config.enable_prefix_caching, "without prefix caching"),
            (config.speculative_config is not None, "with speculative decoding"),
            (config.kv_transfer_config is not None, "with a KV connector"),
            (config.ec_transfer_config is not None, "with an encoder connector"),
            (self.use_pp, "with pipeline parallelism"),
            (self.dcp_world_size > 1, "with decode context parallelism"),
            (self.is_encoder_decoder, "with an encoder-decoder model"),
            (bool(others), f"with a cache of {', '.join(sorted(others))}"),
        ):
            if found:
                raise ValueError(f"StarsScheduler was not tested {what}")

    # Requests come and go

    def add_request(self, request: Request) -> None:
        """Queue a request; one with our key begins in the rounds."""
        sampling = request.sampling_params
        if sampling is None or KEY not in (sampling.extra_args or {}):
            super().add_request(request)
            return
        try:
            for what in ("prompt_embeds", "mm_features", "resumable"):
                if getattr(request, what):
                    raise ValueError(f"a request with {KEY} must be of text alone, not {what}")  # noqa: TRY301
            params = params_of(self._base, sampling)
        except (TypeError, ValueError) as error:
            self._refused.append((request, str(error)))
            return
        self.requests[request.request_id] = request
        self._parents[request.request_id] = _Parent(request)
        self._rounds.start(request.request_id, request.prompt_token_ids, params)

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        """End requests from outside, with their children."""
        if isinstance(request_ids, str):
            request_ids = (request_ids,)
        asked = [*self.requests] if request_ids is None else [*request_ids]
        parents = {name: self._parents[name] for name in asked if name in self._parents}
        active = [child.request.request_id for one in parents.values() for child in one.active]
        finished = super().finish_requests([*asked, *active], finished_status)
        for name, parent in parents.items():
            self._forget(parent)
            self._rounds.abort(name)
        inner = {*active}
        return [request for request in finished if request.request_id not in inner]

    def _forget(self, parent: _Parent) -> None:
        """Drop a request that is over."""
        for child in parent.queued:
            del self._children[child.request.request_id]
            child.request.status = RequestStatus.FINISHED_ABORTED
            child.answer.give()
        parent.queued.clear()
        self._release(parent, list(parent.parked))
        self._parents.pop(parent.request.request_id, None)

    # Segments

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedule a step, with the children that can begin."""
        self._admit()
        if self._waits_for_rounds() and self._caller.wake.wait(_IDLE_SECONDS):
            self._admit()
        self._keep_blocks_free()
        output = super().schedule(throttle_prefills)
        if not output.total_num_scheduled_tokens and self.waiting and not self.running:
            self._release_all()  # or what waits would wait for ever
        return output

    def _waits_for_rounds(self) -> bool:
        busy = self.running or self.waiting or self.kv_holding_waiting or self._refused
        return bool(self._parents) and not busy

    def _admit(self) -> None:
        self._caller.wake.clear()
        for asked in self._caller.take():
            self._ask(asked)
        for parent in self._parents.values():
            for child in list(parent.queued):
                if self._may_begin(parent, child):
                    parent.queued.remove(child)
                    parent.active.append(child)
                    super().add_request(child.request)

    def _ask(self, asked: Round) -> None:
        """Make the children of a round's calls, and let go of the branches that it has left."""
        prompts: dict[str, list[list[int]]] = {}
        for call, future in asked:
            parent = self._parents.get(call.request.request_id)
            if parent is None:
                future.set_exception(RuntimeError("the request is over"))
                continue
            assert isinstance(call.prompt, list)
            prompts.setdefault(call.request.request_id, []).append(call.prompt)
            answer = _Answer(future)
            try:
                requests = [self._child_request(parent.request, call) for _ in call.rows]
            except Exception as error:  # noqa: BLE001 - of a call that vLLM refuses
                future.set_exception(error)
                continue
            for request in requests:
                child = _Child(request, answer)
                answer.children.append(child)
                parent.queued.append(child)
                self._children[request.request_id] = parent, child
        for name, given in prompts.items():
            parent = self._parents[name]
            self._release(parent, outdated(parent.parked, given))

    def _child_request(self, parent: Request, call: Call) -> Request:
        sampling = sampling_params(call, logprobs=False)
        sampling.n = 1
        sampling.update_from_generation_config({}, parent.sampling_params.eos_token_id)
        return Request(
            request_id=f"{parent.request_id}-{KEY}-{next(self._numbers)}",
            prompt_token_ids=call.prompt,
            sampling_params=sampling,
            pooling_params=None,
            client_index=parent.client_index,
            arrival_time=parent.arrival_time,
            lora_request=parent.lora_request,
            cache_salt=parent.cache_salt,
            priority=parent.priority,
            trace_headers=parent.trace_headers,
            block_hasher=parent._block_hasher,
        )

    def _may_begin(self, parent: _Parent, child: _Child) -> bool:
        """Whether all but a child's last token is computed, or no other child is to compute it."""
        _, held = best_base(self._branches(parent), child.prompt)
        return held == child.prefix - 1 or all(
            other.prompt != child.prompt for other in parent.active
        )

    def _branches(self, parent: _Parent) -> list[_Child]:
        return [*parent.parked, *parent.active]

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        """Give a child the blocks of the branch that it continues, if that has more than vLLM."""
        hit: tuple[KVCacheBlocks, int, int, bool] = super()._get_local_prefix_cache_hit(request)
        parent, child = self._children.get(request.request_id, (None, None))
        if parent is None or child is None:
            return hit
        branches = self._branches(parent)
        while True:
            base, held = best_base(branches, child.prompt)
            if base is None or held <= hit[1]:
                break
            blocks = self._first_blocks(base, held)
            if blocks is not None:
                hit = blocks, held, 0, False
                break
            branches.remove(base)
        self._caller.stats.prompt_tokens += child.prefix
        self._caller.stats.cached_tokens += hit[1]
        return hit

    def _first_blocks(self, base: _Child, tokens: int) -> KVCacheBlocks | None:
        """Return the blocks of a branch's first tokens.

        None where one is gone that tokens behind them look at: the branch has gone on, and with it
        its sliding window.
        """
        coordinator = self.kv_cache_manager.coordinator
        found = []
        for blocks, manager in zip(
            coordinator.get_blocks(base.request.request_id),
            coordinator.single_type_managers,
            strict=True,
        ):
            first = manager.get_num_skipped_tokens(tokens) // manager.block_size
            covering = blocks[: cdiv(tokens, manager.block_size)]
            if any(block.is_null for block in covering[first:]):
                return None
            found.append(covering)
        return self.kv_cache_manager.create_kv_cache_blocks(tuple(found))

    def _free_blocks(self, request: Request) -> None:
        """Keep the blocks of a child that has drawn its segment."""
        parent, child = self._children.get(request.request_id, (None, None))
        if parent is None or child is None:
            super()._free_blocks(request)
            return
        parent.active.remove(child)
        if request.status in _ENDED_WELL:
            parent.parked.append(child)
            del self.requests[request.request_id]
        else:
            super()._free_blocks(request)
            del self._children[request.request_id]
        if self.finished_req_ids_dict is not None:
            self.finished_req_ids_dict[request.client_index].discard(request.request_id)
        child.answer.give()

    def _release(self, parent: _Parent, children: Iterable[_Child]) -> None:
        for child in children:
            parent.parked.remove(child)
            self._children.pop(child.request.request_id)
            self.kv_cache_manager.free(child.request)

    def _release_all(self) -> None:
        for parent in self._parents.values():
            self._release(parent, list(parent.parked))

    def _keep_blocks_free(self) -> None:
        """Let go of branches, the oldest request's first, where a step may lack blocks.

        What begins on them then looks in vLLM's prefix cache, and computes the rest again.
        """
        wanted = len(self.running) + len(self.waiting)
        for parent in self._parents.values():
            if self.kv_cache_manager.block_pool.get_num_free_blocks() >= wanted:
                return
            self._release(parent, list(parent.parked))

    # What comes out

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Take in a step; only accepted segments go out."""
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(
            scheduler_output, model_runner_output
        )
        for one in outputs.values():
            one.outputs = [output for output in one.outputs if not self._keep_inside(output)]
        for request, output in [*self._refusals(), *self._accepted()]:
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(output)
        return outputs

    def _keep_inside(self, output: EngineCoreOutput) -> bool:
        parent, child = self._children.get(output.request_id, (None, None))
        if parent is None or child is None:
            return False
        if not parent.sent:
            parent.prefill = parent.prefill or output.prefill_stats
            parent.events = parent.events or output.events
        return True

    def _refusals(self) -> Iterable[tuple[Request, EngineCoreOutput]]:
        for request, why in self._refused:
            logger.warning("refused request %s: %s", request.request_id, why)
            yield (
                request,
                EngineCoreOutput(
                    request.request_id, [], finish_reason=FinishReason.ERROR, stop_reason=why
                ),
            )
        self._refused = []

    def _accepted(self) -> Iterable[tuple[Request, EngineCoreOutput]]:
        for news in self._rounds.news():
            parent = self._parents.get(news.request_id)
            if parent is not None:
                for output in self._outputs(parent, news):
                    yield parent.request, output

    def _outputs(self, parent: _Parent, news: RequestOutput) -> Iterable[EngineCoreOutput]:
        """Return what goes out of a request that has a newly accepted segment or is over."""
        request = parent.request
        response = news.outputs[0] if news.outputs else None
        new = response.token_ids[parent.sent :] if response is not None else []
        parent.sent += len(new)
        reason, by_token = None, False
        stop_reason: int | str | None = None
        if news.finished:
            ended = response.finish_reason if response is not None else "error"
            reason = _REASONS.get(ended or "error", FinishReason.ERROR)
            request.status = _STATUSES[reason]
            if reason == FinishReason.STOP and new:
                stops = request.sampling_params.stop_token_ids or ()
                stop_reason = new[-1] if new[-1] in stops else None
                by_token = stop_reason is not None or (
                    new[-1] == request.sampling_params.eos_token_id
                )
            if reason == FinishReason.ERROR:
                stop_reason = news.error
                logger.warning("request %s failed: %s", request.request_id, news.error)
            self._forget(parent)
            self._free_request(request)
        # vLLM takes the last token of a stop for one without text, and finds stop texts itself.
        by_text = reason == FinishReason.STOP and not by_token
        if new or not by_text:
            yield EngineCoreOutput(
                request.request_id,
                new,
                finish_reason=None if by_text else reason,
                stop_reason=None if by_text else stop_reason,
                events=parent.events,
                prefill_stats=parent.prefill,
                trace_headers=request.trace_headers,
            )
            parent.events = parent.prefill = None
        if by_text:
            yield EngineCoreOutput(request.request_id, [], finish_reason=reason)

    # What vLLM asks of a scheduler

    def get_num_unfinished_requests(self) -> int:
        """Count the requests that are in the rounds, too, so that steps go on."""
        inside = len(self._parents) + len(self._refused)
        unpaused = self._pause_state == PauseState.UNPAUSED
        return int(super().get_num_unfinished_requests()) + (inside if unpaused else 0)

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Empty the cache, with the branches that are kept."""
        self._release_all()
        return bool(super().reset_prefix_cache(reset_running_requests, reset_connector))

    def shutdown(self) -> None:
        """End the rounds, too."""
        self.finish_requests(list(self._parents), RequestStatus.FINISHED_ABORTED)
        self._rounds.close()
        super().shutdown()


class AsyncStarsScheduler(StarsScheduler, AsyncScheduler):
    """`StarsScheduler` with vLLM's asynchronous scheduling."""


_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.ABORT,
}
_STATUSES = {
    FinishReason.STOP: RequestStatus.FINISHED_STOPPED,
    FinishReason.LENGTH: RequestStatus.FINISHED_LENGTH_CAPPED,
    FinishReason.ABORT: RequestStatus.FINISHED_ABORTED,
    FinishReason.ERROR: RequestStatus.FINISHED_ERROR,
}
