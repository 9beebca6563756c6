"""Calls of vLLM's engine in this process: token ids in, token ids out."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from stars_fast.remote.calls import Call, Drawn
from stars_fast.remote.servers import SERVERS

if TYPE_CHECKING:
    from vllm import LLM, CompletionOutput, RequestOutput, SamplingParams
    from vllm.engine.protocol import EngineClient
    from vllm.logprobs import Logprob

_VLLM = SERVERS["vllm"]


class CallStats:
    """Counters of calls.

    Attributes
    ----------
    prompt_tokens
        Of all calls.
    cached_tokens
        Of those, the tokens that vLLM's prefix cache had.
    """

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0

    def segments(self, output: RequestOutput, call: Call) -> list[Drawn]:
        """Return the segments of vLLM's answer to a call, which are counted.

        Raises
        ------
        RuntimeError
            If vLLM ended one of them otherwise than by its length or a stop token.
        """
        self.prompt_tokens += len(call.prompt)
        self.cached_tokens += output.num_cached_tokens or 0
        in_order = sorted(output.outputs, key=lambda one: one.index)
        return [_segment(one, call.request.params.top_logprobs) for one in in_order]


class AsyncCaller:
    """Calls an `EngineClient`; a `Caller`.

    Parameters
    ----------
    client
        The engine.
    loop
        The event loop that it runs on, in another thread than the rounds.
    logprobs
        Ask for the log-probabilities of the tokens.
    """

    def __init__(
        self, client: EngineClient, loop: asyncio.AbstractEventLoop, *, logprobs: bool
    ) -> None:
        self._client = client
        self._loop = loop
        self._logprobs = logprobs
        self._numbers = itertools.count()
        self._tasks: defaultdict[str, set[asyncio.Task[list[Drawn]]]] = defaultdict(set)
        self.stats = CallStats()

    def run(self, calls: Sequence[Call]) -> Sequence[list[Drawn] | Exception]:
        """Make calls, see `Caller`; the event loop is entered once for all of them.

        Raises
        ------
        RuntimeError
            On the event loop itself, which would wait for what it has to do.
        """
        if _running_loop() is self._loop:
            raise RuntimeError(
                "rounds must not run on vLLM's event loop: call StarsLLM on another thread, or "
                "use AsyncEngine(StarsLLM(...))"
            )
        answers = asyncio.run_coroutine_threadsafe(self._run(calls), self._loop)
        try:
            return answers.result()
        except BaseException:
            answers.cancel()
            raise

    def interrupt(self, request_id: str) -> None:
        """Abort the calls of a request in vLLM, too; from any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel, request_id)

    def close(self) -> None:
        """Do nothing: the engine is another's."""

    # On the event loop

    async def _run(self, calls: Sequence[Call]) -> list[list[Drawn] | Exception]:
        tasks = [asyncio.ensure_future(self._draw(call)) for call in calls]
        for call, task in zip(calls, tasks, strict=True):
            self._tasks[call.request.request_id].add(task)
        try:
            answers = await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            for call in calls:
                self._tasks.pop(call.request.request_id, None)
        return [_answer(answer) for answer in answers]

    async def _draw(self, call: Call) -> list[Drawn]:
        prompt = {"type": "token", "prompt_token_ids": call.prompt}
        name = f"stars-{call.request.request_id}-{next(self._numbers)}"
        last = None
        async for output in self._client.generate(
            prompt, sampling_params(call, logprobs=self._logprobs), name
        ):
            last = output
        if last is None:
            raise RuntimeError("vLLM returned no output")
        return self.stats.segments(last, call)

    def _cancel(self, request_id: str) -> None:
        for task in self._tasks.get(request_id, ()):
            task.cancel()


class BatchCaller:
    """Calls a `vllm.LLM`, with all calls of a round in one batch; a `Caller`."""

    def __init__(self, llm: LLM, *, logprobs: bool) -> None:
        self._llm = llm
        self._logprobs = logprobs
        self.stats = CallStats()

    def run(self, calls: Sequence[Call]) -> Iterable[list[Drawn] | Exception]:
        """Make calls, see `Caller`."""
        prompts = [{"prompt_token_ids": call.prompt} for call in calls]
        try:
            params = [sampling_params(call, logprobs=self._logprobs) for call in calls]
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
        except Exception as error:  # noqa: BLE001 - of a call that vLLM refuses
            if len(calls) == 1:
                return [_told(error)]
            return [answer for call in calls for answer in self.run([call])]
        return [
            self.stats.segments(output, call) for output, call in zip(outputs, calls, strict=True)
        ]

    def interrupt(self, request_id: str) -> None:
        """Do nothing: the batch under way is waited for."""

    def close(self) -> None:
        """Do nothing: the engine is another's."""


def sampling_params(call: Call, *, logprobs: bool) -> SamplingParams:
    """Return vLLM's `SamplingParams` of a call."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = call.request.params
    return SamplingParams.from_optional(
        n=len(call.rows),
        seed=call.seed,
        max_tokens=call.wanted,
        logprobs=params.top_logprobs if logprobs else None,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,  # no other call has them
        **_VLLM.sampling(params, call.position, call.wanted),
    )


def _segment(output: CompletionOutput, top: int) -> Drawn:
    ids = list(output.token_ids)
    if output.finish_reason not in ("stop", "length") or not ids:
        raise RuntimeError(f"vLLM ended a segment with {output.finish_reason!r}, {len(ids)} tokens")
    places = output.logprobs or ()
    return Drawn(
        ids,
        output.finish_reason == "stop",
        [place[token].logprob for place, token in zip(places, ids, strict=bool(places))],
        [_likeliest(place, top) for place in places] if top else (),
    )


def _likeliest(place: Mapping[int, Logprob], top: int) -> dict[int, float]:
    """Return the first tokens by rank; vLLM adds the one that was drawn, whatever its rank."""
    ranked = sorted((one.rank, token, one.logprob) for token, one in place.items())
    return {token: logprob for rank, token, logprob in ranked if rank <= top}


def _answer(answer: list[Drawn] | BaseException) -> list[Drawn] | Exception:
    if isinstance(answer, list):
        return answer
    if isinstance(answer, asyncio.CancelledError):
        return RuntimeError("interrupted")
    return _told(answer)


def _told(error: BaseException) -> Exception:
    """Return an error of vLLM with its name, for some have no text."""
    return RuntimeError(f"vllm: {type(error).__name__}: {error}")


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
