"""JSON over HTTP, with retries where they can help."""

from __future__ import annotations

import threading
import time
from typing import Any

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


class RemoteError(StarsFastError, RuntimeError):
    """A server that cannot be reached, refuses a call, or answers what cannot be used."""


class Endpoint:
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

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        retries: int = 4,
        max_connections: int = 64,
    ) -> None:
        if not isinstance(base_url, str) or not base_url.startswith(("http://", "https://")):
            raise ValueError(
                f"base_url must be an address such as http://127.0.0.1:8000/v1, got {base_url!r}"
            )
        if not timeout > 0:
            raise ValueError(f"timeout must be above 0, got {timeout!r}")
        if retries < 0:
            raise ValueError(f"retries must be at least 0, got {retries!r}")
        if max_connections < 1:
            raise ValueError(f"max_concurrency must be at least 1, got {max_connections!r}")
        self.url = base_url.rstrip("/")
        self._retries = retries
        self._client = httpx.Client(
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=timeout,
            limits=httpx.Limits(
                max_connections=max_connections, max_keepalive_connections=max_connections
            ),
        )
        self._lock = threading.Lock()
        self._sent, self._resent = 0, 0

    def get(self, path: str) -> object:
        """Return what is at a path below `base_url`, for errors see `post`."""
        return self._call("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> object:
        """Post a body as JSON and return the answer.

        Raises
        ------
        RemoteError
            The server says that the request is wrong; it, or the way to it, failed until the last
            retry; or its answer is not JSON.
        """
        return self._call("POST", path, body)

    def stats(self) -> dict[str, int]:
        """Return ``http_calls``, retries included, and ``http_retries``."""
        with self._lock:
            return {"http_calls": self._sent, "http_retries": self._resent}

    def close(self) -> None:
        """Close the connections; no further call can be made."""
        self._client.close()

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> object:
        url, failure = self.url + path, ""
        for number in range(self._retries + 1):
            with self._lock:
                self._sent += 1
                self._resent += number > 0
            asked: str | None = None
            try:
                response = self._client.request(method, url, json=body)
            except httpx.TransportError as error:
                failure = f"{type(error).__name__}: {error}"
            except httpx.HTTPError as error:
                raise RemoteError(f"{url}: {error}") from error
            else:
                if response.is_success:
                    return _json(url, response)
                failure = f"status {response.status_code}: {_reason(response)}"
                if response.status_code not in _PASSING:
                    raise RemoteError(f"{url}: {failure}")
                asked = response.headers.get("Retry-After")
            if number < self._retries:
                time.sleep(_wait(number, asked))
        times = f" ({self._retries + 1} times)" if self._retries else ""
        raise RemoteError(f"{url}: {failure}{times}")


def _wait(number: int, asked: str | None) -> float:
    """Return the seconds before retry `number`; a date in ``Retry-After`` is not read."""
    try:
        seconds = float(asked) if asked is not None else _FIRST_WAIT * 2.0**number
    except ValueError:
        seconds = _FIRST_WAIT * 2.0**number
    return min(max(seconds, 0.0), _LONGEST_WAIT)


def _json(url: str, response: httpx.Response) -> object:
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
