"""JSON over HTTP, with retries where they can help."""

from __future__ import annotations

import asyncio
import threading
import time
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeAlias, TypeVar

from stars_fast.errors import StarsFastError

try:
    import httpx
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "calls over HTTP need httpx: pip install 'stars_fast[remote]'"
    ) from error

#: Too many requests, and what a server or a proxy says that may be back in a moment. Any other
#: status of 4xx is about the request, and trying again would not change it.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_FIRST_WAIT = 0.5
_LONGEST_WAIT = 30.0
#: Characters of an error's body that a message shows.
_SHOWN = 300


#: A response of the server, or how the way to it failed.
_Outcome: TypeAlias = "httpx.Response | httpx.HTTPError"
_Client = TypeVar("_Client", httpx.Client, httpx.AsyncClient)


class RemoteError(StarsFastError, RuntimeError):
    """A server that cannot be reached, refuses a call, or answers what cannot be used.

    Attributes
    ----------
    status
        Of the answer; None: there was none, or it was no failure by itself.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class UnavailableError(RemoteError):
    """A server that was still failing, or could not be reached, at the last retry."""


def checked_url(name: str, value: object) -> str:
    """Return an address without a slash at its end.

    Raises
    ------
    ValueError
        It is no HTTP address; the message names the parameter.
    """
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        try:
            httpx.URL(value)
        except httpx.InvalidURL as error:
            raise ValueError(f"{name} must be an address, got {value!r}: {error}") from None
        return value.rstrip("/")
    raise ValueError(f"{name} must be an address such as http://127.0.0.1:8000/v1, got {value!r}")


class _Calls(ABC, Generic[_Client]):
    """What calls of a server have in common, whether a thread waits for them or a coroutine.

    Parameters
    ----------
    base_url, api_key, timeout, retries, max_connections
        See `Endpoint`.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        retries: int = 4,
        max_connections: int = 64,
    ) -> None:
        self.url = checked_url("base_url", base_url)
        if not timeout > 0:
            raise ValueError(f"timeout must be above 0, got {timeout!r}")
        if retries < 0:
            raise ValueError(f"retries must be at least 0, got {retries!r}")
        if max_connections < 1:
            raise ValueError(f"max_concurrency must be at least 1, got {max_connections!r}")
        self._retries = retries
        self._client: _Client = self._open(
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=timeout,
            limits=httpx.Limits(
                max_connections=max_connections, max_keepalive_connections=max_connections
            ),
        )
        self._lock = threading.Lock()
        self._sent, self._resent = 0, 0

    @abstractmethod
    def _open(self, **options: Any) -> _Client:
        """Return the client."""

    def stats(self) -> dict[str, int]:
        """Return ``http_calls``, retries included, and ``http_retries``."""
        with self._lock:
            return {"http_calls": self._sent, "http_retries": self._resent}

    def _count(self, number: int) -> None:
        with self._lock:
            self._sent += 1
            self._resent += number > 0

    def _wait_after(self, url: str, number: int, outcome: _Outcome) -> float | None:
        """Return the seconds to wait before the next try; None: the server has answered.

        Raises
        ------
        UnavailableError
            Try `number`, which failed, was the last.
        RemoteError
            Another try would not help.
        """
        asked: str | None = None
        status: int | None = None
        if isinstance(outcome, httpx.TransportError):
            failure = f"{type(outcome).__name__}: {outcome}"
        elif isinstance(outcome, httpx.HTTPError):
            raise RemoteError(f"{url}: {outcome}") from outcome
        elif outcome.is_success:
            return None
        else:
            status = outcome.status_code
            failure = f"status {status}: {_reason(outcome)}"
            if status not in _PASSING:
                raise RemoteError(f"{url}: {failure}", status)
            asked = outcome.headers.get("Retry-After")
        if number < self._retries:
            return _wait(number, asked)
        times = f" ({self._retries + 1} times)" if self._retries else ""
        raise UnavailableError(f"{url}: {failure}{times}", status)


class Endpoint(_Calls[httpx.Client]):
    """A server's address, and what is needed to call it. Calls may come from many threads.

    Parameters
    ----------
    base_url
        Such as ``http://127.0.0.1:8000/v1``.
    api_key
        Sent as a bearer token; None: none is sent.
    timeout
        Seconds that a call may wait for the server, above 0.
    retries
        Times that a call is repeated after a status that may pass (408, 425, 429, 500, 502 to
        504) or a failed connection, at least 0. The waits are what ``Retry-After`` says, else 0.5
        s, doubled each time; 30 s at most.
    max_connections
        Open at once, at least 1.

    Raises
    ------
    ValueError
        A parameter that is out of range, or `base_url` is no HTTP address.
    """

    def _open(self, **options: Any) -> httpx.Client:
        return httpx.Client(**options)

    @property
    def root(self) -> str:
        """The address without its ``/v1``."""
        return self.url.removesuffix("/v1")

    def get(self, path: str) -> object:
        """Return what is at a path below `base_url`, for errors see `post`."""
        return self._call("GET", self.url + path, None)

    def post(self, path: str, body: dict[str, Any], *, at_root: bool = False) -> object:
        """Post a body as JSON and return the answer.

        Parameters
        ----------
        path, body
            Below `base_url`; with `at_root`, below what of it comes before ``/v1``, where servers
            have the routes of their own.

        Raises
        ------
        RemoteError
            The server says that the request is wrong; it, or the way to it, failed until the last
            retry; or its answer is not JSON.
        """
        return self._call("POST", (self.root if at_root else self.url) + path, body)

    def close(self) -> None:
        """Close the connections; no further call can be made."""
        self._client.close()

    def _call(self, method: str, url: str, body: dict[str, Any] | None) -> object:
        number = 0
        while True:
            self._count(number)
            outcome: _Outcome
            try:
                outcome = self._client.request(method, url, json=body)
            except httpx.HTTPError as error:
                outcome = error
            wait = self._wait_after(url, number, outcome)
            if wait is None:
                return _json(url, outcome)
            time.sleep(wait)
            number += 1


class AsyncEndpoint(_Calls[httpx.AsyncClient]):
    """`Endpoint` for coroutines, all of one event loop.

    Parameters
    ----------
    base_url, api_key, timeout, retries, max_connections
        See `Endpoint`. The wait for a free connection is not limited.
    """

    def _open(self, **options: Any) -> httpx.AsyncClient:
        self._free = asyncio.Semaphore(options["limits"].max_connections)
        return httpx.AsyncClient(**options)

    async def post(self, path: str, body: dict[str, Any]) -> object:
        """Post a body as JSON and return the answer, as `Endpoint.post` does."""
        url, number = self.url + path, 0
        async with self._free:
            while True:
                self._count(number)
                outcome: _Outcome
                try:
                    outcome = await self._client.post(url, json=body)
                except httpx.HTTPError as error:
                    outcome = error
                wait = self._wait_after(url, number, outcome)
                if wait is None:
                    return _json(url, outcome)
                await asyncio.sleep(wait)
                number += 1

    async def close(self) -> None:
        """Close the connections; no further call can be made."""
        await self._client.aclose()


def _wait(number: int, asked: str | None) -> float:
    """Return the seconds before retry `number`; a date in ``Retry-After`` is not read."""
    try:
        seconds = float(asked) if asked is not None else _FIRST_WAIT * 2.0**number
    except ValueError:
        seconds = _FIRST_WAIT * 2.0**number
    return min(max(seconds, 0.0), _LONGEST_WAIT)


def _json(url: str, response: _Outcome) -> object:
    assert isinstance(response, httpx.Response)
    try:
        body: object = response.json()
    except ValueError as error:
        raise RemoteError(f"{url}: the answer is not JSON: {response.text[:_SHOWN]!r}") from error
    return body


def _reason(response: httpx.Response) -> str:
    """Return the message of an error, in OpenAI's shape, FastAPI's, or the whole body."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:_SHOWN]
    if isinstance(body, dict):
        error = body.get("error", body.get("detail", body.get("message", body)))
        if isinstance(error, dict):
            error = error.get("message", error)
        return str(error)[:_SHOWN]
    return str(body)[:_SHOWN]
