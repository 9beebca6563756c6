"""Sessions of SGLang: a request's tokens stay at the server, and calls branch from one another.

A session is a tree of calls, whose names the server gives. A call continues another, ``rid``: its
prompt with what it drew, or its prompt alone (``drop_previous_output``), up to ``offset``, with the
call's ``input_ids`` behind. The next segment continues the call that drew the accepted one; another
attempt drops what the one before has drawn. Source: ``session_controller.py`` of SGLang.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from array import array
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

from stars_fast.remote.http import Endpoint, RemoteError

#: Seconds without a call after which the server closes a session that nobody closes.
_TIMEOUT = 3600
#: A field that the server asks for and does not use.
_CAPACITY = 2**20


@dataclass
class _Session:
    """A session; its calls by the tokens they have behind them, and by those they began with."""

    id: str | None = None
    after: dict[bytes, str] = field(default_factory=dict)
    at: dict[bytes, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Sessions:
    """The sessions of an engine's requests, one each. Calls may come from many threads.

    Parameters
    ----------
    endpoint
        The server.
    bos
        The token that begins a text, which the server takes away from the beginning of a
        continuation; None: there is none.
    """

    def __init__(self, endpoint: Endpoint, bos: int | None) -> None:
        self._endpoint = endpoint
        self._bos = bos
        self._sessions: dict[str, _Session] = {}
        self._lock = threading.Lock()
        self._closer = futures.ThreadPoolExecutor(1, "stars-fast-session")

    def continued(self, request_id: str, ids: list[int]) -> dict[str, Any]:
        """Return the ``input_ids`` and ``session_params`` of a call that continues `ids`.

        Raises
        ------
        RemoteError
            The server opens no session.
        """
        with self._lock:
            session = self._sessions.setdefault(request_id, _Session())
        with session.lock:
            if session.id is None:
                session.id = self._open()
            key = _digest(ids)
            after, at = session.after.get(key), session.at.get(key)
        params: dict[str, Any] = {"id": session.id}
        # The last token is sent again: there must be one, and offset 0 would be none.
        if len(ids) == 1 or ids[-1] == self._bos or (after is None and at is None):
            return {"input_ids": ids, "session_params": params}
        params |= {"rid": after or at, "offset": len(ids) - 1}
        if after is None:
            params["drop_previous_output"] = True
        return {"input_ids": ids[-1:], "session_params": params}

    def add(self, request_id: str, ids: list[int], drawn: list[int], rid: str) -> None:
        """Remember a call that continued `ids`."""
        with self._lock:
            session = self._sessions.get(request_id)
        if session is not None:
            with session.lock:
                session.at[_digest(ids)] = rid
                session.after[_digest(ids + drawn)] = rid

    def forget(self, request_id: str) -> None:
        """Close the session of a request, without waiting."""
        with self._lock:
            session = self._sessions.pop(request_id, None)
        if session is not None and session.id is not None:
            with contextlib.suppress(RuntimeError):  # of an engine that was closed
                self._closer.submit(self._close, session.id)

    def close(self) -> None:
        """Close all sessions."""
        for request_id in list(self._sessions):
            self.forget(request_id)
        self._closer.shutdown()

    def _open(self) -> str:
        body = {"capacity_of_str_len": _CAPACITY, "timeout": _TIMEOUT}
        name = self._endpoint.post("/open_session", body, at_root=True)
        if not isinstance(name, str):
            raise RemoteError(f"the server returned {name!r:.80} where a session's id was due")
        return name

    def _close(self, name: str) -> None:
        # It answers without a body; a session that stays has its time limit.
        with contextlib.suppress(RemoteError):
            self._endpoint.post("/close_session", {"session_id": name}, at_root=True)


def _digest(ids: list[int]) -> bytes:
    """Return what stands for ids: contexts are long and many."""
    return hashlib.blake2b(array("q", ids).tobytes(), digest_size=16).digest()
