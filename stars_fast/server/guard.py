"""What every request passes first: its id, the API key, the size of its body."""

from __future__ import annotations

import hashlib
import hmac
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stars_fast.server.errors import ApiError

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


#: Beside ``/v1``, what only those with the key may ask for: it makes the engine work.
_WORK = frozenset({"/classify", "/detokenize", "/pooling", "/score", "/tokenize"})


def asks_for_key(path: str) -> bool:
    """Whether a path is for those with the API key, where there is one."""
    return path.startswith("/v1") or path in _WORK


class Guard:
    """ASGI middleware.

    Gives each request an id (``X-Request-Id`` of the client, if it is a sane one) and its response
    the same; refuses what needs the API key without it, and bodies that are too long before they
    are read.

    Parameters
    ----------
    app
        What comes behind.
    api_key
        One, or several of which each will do; None: no key is asked for.
    max_body_bytes
        Longer bodies are refused.
    """

    def __init__(
        self, app: ASGIApp, api_key: str | tuple[str, ...] | None, max_body_bytes: int
    ) -> None:
        self._app = app
        keys = (api_key,) if isinstance(api_key, str) else api_key or ()
        self._keys = [_digest(key) for key in keys]
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        refused = self._refusal(scope, headers)
        if refused is not None:
            await refused.response()(scope, receive, send_with_id)
            return
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # uvicorn, which has its own, sends no body
        await self._app(scope, self._limited(receive), send_with_id)

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        if self._keys and asks_for_key(_path(scope)):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            # Digests have one length, so the time tells nothing of the key.
            digest = _digest(key.strip())
            known = [hmac.compare_digest(digest, own) for own in self._keys]
            if not any(known) or scheme.lower() != "bearer":
                return ApiError(
                    401,
                    "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            return ApiError(400, f"Content-Length must be a number, got {length!r}")
        if int(length) > self._max_body_bytes:
            return ApiError(413, self._too_long, code="body_too_long")
        return None

    @property
    def _too_long(self) -> str:
        return f"the body is longer than the {self._max_body_bytes} bytes allowed"

    def _limited(self, receive: Receive) -> Receive:
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise HTTPException(413, self._too_long)
            return message

        return limited


def _path(scope: Scope) -> str:
    """Return the path within the application, which may be mounted in another one."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) if root and path.startswith(f"{root}/") else path


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
