"""Connections whose requests end: uvicorn's httptools protocol waits and reads for ever."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from stars_fast.server.answers import to_json
from stars_fast.server.errors import ApiError
from stars_fast.server.logs import log

#: Bytes of a request's first line and headers at most, and of what stands around its chunks.
MAX_HEAD_BYTES = 1 << 16
#: Bytes that one chunk of one byte has around it.
_PER_CHUNK = 8
#: Bytes of a body that have to come in each period of `Connection.patience`.
_LEAST_BYTES = 1 << 14

_END = b"\r\n\r\n"


class Connection(HttpToolsProtocol):
    """Answers what is too long with status 431 and what does not come with 408, and closes.

    Attributes
    ----------
    patience
        Seconds that a request's head has to come, and `_LEAST_BYTES` of its body.
    """

    patience: ClassVar[float] = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._length = 0
        self._tail = b""  # of what came before: the end of a head may come in two parts
        self._around = 0  # bytes behind the head that are not in the body
        self._body = 0
        self._body_seen = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what the client has sent."""
        if self.transport.is_closing():
            return
        if self._timer is None and self._in_head:
            self._wait()
        if self._in_head:
            joined = self._tail + data
            end = joined.find(_END)
            self._length += len(data) if end < 0 else end - len(self._tail)
            self._tail = joined[-len(_END) + 1 :]
            if self._length > MAX_HEAD_BYTES:
                self._refuse_long()
                return
        else:
            self._around += len(data)
        super().data_received(data)
        if self._around > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse_long()

    def on_headers_complete(self) -> None:
        """Note that the head has ended."""
        self._in_head, self._length, self._tail = False, 0, b""
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Count the body."""
        self._body += len(body)
        self._around -= (1 + _PER_CHUNK) * len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note that a head comes next."""
        self._in_head, self._around, self._body, self._body_seen = True, 0, 0, 0
        self._stop_waiting()
        super().on_message_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: who asks for another protocol is answered in this one."""

    def _wait(self) -> None:
        self._timer = self.loop.call_later(self.patience, self._waited)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _waited(self) -> None:
        cycle = self.cycle
        answers = cycle is not None and not cycle.response_complete
        if self.pipeline or (answers and not cycle.more_body):
            self._wait()  # it is the client who waits, for an answer
            return
        if not self._in_head and self._body - self._body_seen >= _LEAST_BYTES:
            self._body_seen = self._body
            self._wait()
            return
        self._timer = None
        log("client too slow", waited_for="head" if self._in_head else "body")
        if (self._length == 0 and self._in_head) or (answers and cycle.response_started):
            self.transport.close()
            return
        message = f"the request did not come within {self.patience:g} s"
        self._refuse(ApiError(408, message, code="request_timeout"), "Request Timeout")

    def _refuse_long(self) -> None:
        message = f"the request's headers are longer than the {MAX_HEAD_BYTES} bytes allowed"
        error = ApiError(431, message, code="headers_too_long")
        self._refuse(error, "Request Header Fields Too Large")

    def _refuse(self, error: ApiError, reason: str) -> None:
        body = to_json(error.answer())
        head = (
            f"HTTP/1.1 {error.status} {reason}\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
