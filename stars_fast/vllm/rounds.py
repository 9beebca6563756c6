"""The rounds of stars_fast beside vLLM's scheduler, in its process, on a thread of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeVar

from stars_fast.engine.async_engine import AsyncEngine
from stars_fast.outputs import RequestOutput
from stars_fast.params import StarsParams
from stars_fast.remote.calls import Call, Drawn
from stars_fast.vllm.callers import CallStats
from stars_fast.vllm.engine import LoopThread, StarsLLM
from stars_fast.vllm.options import PluginOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: The calls of one round, each with what will be its answer.
Round = list[tuple[Call, "Future[list[Drawn]]"]]

T = TypeVar("T")


class SchedulerCaller:
    """Hands the calls of a round to vLLM's scheduler, on another thread; a `Caller`.

    Attributes
    ----------
    model_config, vllm_config
        As an `EngineClient` has them.
    stats
        Counters, which the scheduler keeps.
    wake
        Set when there are calls.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.stats = CallStats()
        self.wake = threading.Event()
        self._rounds: SimpleQueue[Round] = SimpleQueue()
        self._closed = False

    def run(self, calls: Sequence[Call]) -> Sequence[list[Drawn] | Exception]:
        """Make calls, see `Caller`."""
        asked: Round = [(call, Future()) for call in calls]
        self._rounds.put(asked)
        if self._closed:
            self._fail_all()
        self.wake.set()
        return [_answer(future) for _, future in asked]

    def take(self) -> list[Round]:
        """Return the rounds whose calls are to be made; for the scheduler."""
        return _taken(self._rounds)

    def interrupt(self, request_id: str) -> None:
        """Do nothing: the scheduler has ended the calls of a request that it aborts."""

    def close(self) -> None:
        """Make no more calls; those that the scheduler has not taken fail."""
        self._closed = True
        self._fail_all()

    def _fail_all(self) -> None:
        for asked in self.take():
            for _, future in asked:
                future.set_exception(RuntimeError("vLLM's scheduler has shut down"))


class Rounds:
    """Runs requests of a scheduler.

    Parameters
    ----------
    caller
        Draws their segments.
    options
        Of the reward model and the rounds.

    Raises
    ------
    ValueError, ModelLoadError
        As `StarsLLM`.
    """

    def __init__(self, caller: SchedulerCaller, options: PluginOptions) -> None:
        self._caller = caller
        self._news: SimpleQueue[RequestOutput] = SimpleQueue()
        reward = options.make_reward_model()
        engine = StarsLLM(caller, reward, **{**options.engine_options(), "logprobs": False})
        queue = options.queue_options() | {"max_waiting": 2**31}  # vLLM's own has no limit
        self._engine = AsyncEngine(engine, **queue)
        self._loop = LoopThread()

    def start(self, request_id: str, prompt: list[int], params: StarsParams) -> None:
        """Begin a request; what is wrong with it will be its output's `error`."""
        coroutine = self._follow(request_id, prompt, params)
        asyncio.run_coroutine_threadsafe(coroutine, self._loop.loop)

    def abort(self, request_id: str) -> None:
        """Stop a request whose calls have ended; further outputs may still come."""
        self._engine.abort(request_id)

    def news(self) -> list[RequestOutput]:
        """Return the outputs since the last call: newly accepted segments, failures."""
        return _taken(self._news)

    def close(self) -> None:
        """End the rounds; requests that are unfinished are."""
        self._caller.close()
        self._engine.close(10.0)
        self._loop.close()

    async def _follow(self, request_id: str, prompt: list[int], params: StarsParams) -> None:
        try:
            async for output in self._engine.submit(prompt, params, request_id=request_id):
                self._tell(output)
        except Exception as error:  # noqa: BLE001 - it is the request's
            self._tell(RequestOutput(request_id, None, prompt, [], finished=True, error=str(error)))

    def _tell(self, output: RequestOutput) -> None:
        self._news.put(output)
        self._caller.wake.set()


def _taken(queue: SimpleQueue[T]) -> list[T]:
    found = []
    while True:
        try:
            found.append(queue.get_nowait())
        except Empty:
            return found


def _answer(future: Future[list[Drawn]]) -> list[Drawn] | Exception:
    try:
        return future.result()
    except Exception as error:  # noqa: BLE001 - of this call alone
        return error
