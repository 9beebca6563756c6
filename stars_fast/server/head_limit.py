"""HTTP whose request heads end: uvicorn's httptools protocol reads a header of any length."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from stars_fast.server.answers import to_json
from stars_fast.server.errors import ApiError

#: Bytes of a request's first line and headers at most.
MAX_HEAD_BYTES = 1 << 16

_END = b"\r\n\r\n"


class LimitedHead(HttpToolsProtocol):
    """Answers a head of more than `MAX_HEAD_BYTES` with status 431 and closes the connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._length = 0
        self._tail = b""  # of what came before: the end of a head may come in two parts

    def data_received(self, data: bytes) -> None:
        """Take what the client has sent."""
        if self.transport.is_closing():
            return
        if self._in_head:
            joined = self._tail + data
            end = joined.find(_END)
            self._length += len(data) if end < 0 else end - len(self._tail)
            self._tail = joined[-len(_END) + 1 :]
            if self._length > MAX_HEAD_BYTES:
                self._refuse()
                return
        super().data_received(data)

    def on_headers_complete(self) -> None:
        """Note that the head has ended."""
        self._in_head, self._length, self._tail = False, 0, b""
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Note that a head comes next."""
        self._in_head = True
        super().on_message_complete()

    def _refuse(self) -> None:
        message = f"the request's headers are longer than the {MAX_HEAD_BYTES} bytes allowed"
        body = to_json(ApiError(431, message, code="headers_too_long").answer())
        head = (
            "HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
