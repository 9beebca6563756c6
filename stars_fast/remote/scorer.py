"""Rewards that servers give, many calls at once."""

from __future__ import annotations

import asyncio
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Sequence
from concurrent import futures
from typing import Any, TypeVar

from stars_fast.remote.http import AsyncEndpoint, RemoteError, checked_url

T = TypeVar("T")


class RemoteScorer(ABC):
    """A reward model behind one address, for ``reward_model=``.

    Its calls run on an event loop of its own, on one thread, whoever waits for them. A call that
    is no longer waited for is cancelled.

    Parameters
    ----------
    url, api_key, timeout, retries
        See `stars_fast.remote.http.Endpoint`.
    max_concurrency
        Calls under way at once, at least 1.

    Raises
    ------
    ValueError
        A parameter is out of range.
    """

    #: Models that are here score beside it.
    remote = True
    #: Whether the reward depends on the committed text as well, see `score_each`.
    reads_committed = False

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        timeout: float,
        retries: int,
        max_concurrency: int,
    ) -> None:
        self._endpoint = AsyncEndpoint(
            checked_url("url", url),
            api_key=api_key,
            timeout=timeout,
            retries=retries,
            max_connections=max_concurrency,
        )
        self._loop = asyncio.new_event_loop()
        # A daemon: a server that hangs must not keep the process from ending.
        self._thread = threading.Thread(
            target=_run, args=(self._loop,), name="stars-fast-remote", daemon=True
        )
        self._thread.start()
        # Called by whoever is first: `close`, or the end of this object.
        self._end = weakref.finalize(self, _end, self._loop, self._endpoint)

    def score(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        committed: Sequence[str] | None = None,
    ) -> list[float]:
        """Return the reward of each response; an empty response asks for r(x).

        Parameters
        ----------
        prompts, responses
            As many of the one as of the other.
        committed
            Where the reward reads it: what each response continues, empty by default.

        Raises
        ------
        RemoteError
            One of them has no reward; the message says why.
        """
        found = self._begin(self._score_all(prompts, responses, committed))
        try:
            rewards = found.result()
        except BaseException:  # such as Ctrl-C
            found.cancel()
            raise
        for reward in rewards:
            if isinstance(reward, Exception):
                raise reward
        return [reward for reward in rewards if not isinstance(reward, Exception)]

    async def score_each(
        self, prompts: Sequence[str], responses: Sequence[str], committed: Sequence[str]
    ) -> list[float | Exception]:
        """Return what `score` does, with its error in the place of a reward that there is not.

        It may be awaited on any event loop.
        """
        calls = self._begin(self._score_all(prompts, responses, committed))
        found: list[float | Exception] = await asyncio.wrap_future(calls)
        return found

    def stats(self) -> dict[str, int]:
        """Return ``http_calls``, retries included, and ``http_retries``."""
        return self._endpoint.stats()

    def close(self) -> None:
        """End calls under way and close the connections; nothing more can be scored."""
        self._end()
        self._thread.join()

    @abstractmethod
    async def _rewards(
        self, prompts: Sequence[str], responses: Sequence[str], committed: Sequence[str]
    ) -> list[float | Exception]:
        """Return a reward or an error for each; on the loop."""

    async def _score_all(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        committed: Sequence[str] | None,
    ) -> list[float | Exception]:
        if committed is None:
            committed = [""] * len(responses)
        if not len(prompts) == len(responses) == len(committed):
            raise ValueError(
                f"prompts, responses and committed must be equally many, got {len(prompts)}, "
                f"{len(responses)} and {len(committed)}"
            )
        return await self._rewards(prompts, responses, committed)

    def _begin(self, calls: Coroutine[Any, Any, T]) -> futures.Future[T]:
        if not self._end.alive:
            calls.close()
            raise RemoteError(f"{self._endpoint.url}: the {type(self).__name__} was closed")
        return asyncio.run_coroutine_threadsafe(calls, self._loop)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _end(loop: asyncio.AbstractEventLoop, endpoint: AsyncEndpoint) -> None:
    asyncio.run_coroutine_threadsafe(_leave(endpoint), loop)


async def _leave(endpoint: AsyncEndpoint) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await endpoint.close()
    asyncio.get_running_loop().stop()
