"""Errors in the shape that OpenAI's clients read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from stars_fast.errors import (
    DeadlineError,
    EngineStoppedError,
    NotCalibratedError,
    QueueFullError,
)
from stars_fast.params import StarsParams
from stars_fast.server.answers import ErrorAnswer, ErrorObject, to_json
from stars_fast.text.chats import CHAT_OPTIONS

#: What a message of the engine may begin with.
_PARAMS = frozenset({"prompt", "messages", *CHAT_OPTIONS, *(x.name for x in fields(StarsParams))})
_NAME = re.compile(r"\w+")


@dataclass
class ApiError(Exception):
    """An error that is the answer to a request.

    Attributes
    ----------
    status
        Of HTTP.
    message, type, param, code
        Of OpenAI's ``error`` object.
    headers
        To be sent with it.
    """

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def answer(self) -> ErrorAnswer:
        """Return the body."""
        error = ErrorObject(message=self.message, type=self.type, param=self.param, code=self.code)
        return ErrorAnswer(error=error)

    def response(self) -> Response:
        """Return the HTTP response."""
        return Response(to_json(self.answer()), self.status, dict(self.headers), "application/json")


_NOT_CALIBRATED = (
    'this server has not been calibrated: give "stars": {"target_reward": NUMBER} without '
    'calibrate_prefixes, or a method that needs no target such as {"method": "best_of_n"}; or '
    "start the server with --target-reward NUMBER, or auto with --calibration-prompts FILE or "
    "--calibration-share FLOAT"
)


def api_error(error: Exception, retry_after: int = 1) -> ApiError:
    """Return what an exception of the engine is to the client.

    `retry_after`: seconds after which a full queue may have room.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        headers = {"Retry-After": str(retry_after)}
        return ApiError(429, str(error), "rate_limit_error", code="queue_full", headers=headers)
    if isinstance(error, DeadlineError):
        return ApiError(504, str(error), "timeout_error", code="deadline")
    if isinstance(error, EngineStoppedError):
        return ApiError(503, str(error), "server_error", code="stopping")
    if isinstance(error, NotCalibratedError):
        return ApiError(400, _NOT_CALIBRATED, param="stars", code="not_calibrated")
    if isinstance(error, ValueError | TypeError):
        message = str(error)
        name = _NAME.match(message)
        return ApiError(400, message, param=name[0] if name and name[0] in _PARAMS else None)
    if isinstance(error, RecursionError):
        return ApiError(400, "the body is nested too deeply")
    return ApiError(500, f"{type(error).__name__}: {error}", "server_error")


def request_failed(reason: str) -> ApiError:
    """Return the error of a request that was taken and could not be finished."""
    return ApiError(500, reason, "server_error", code="request_failed")


def add_handlers(app: FastAPI) -> None:
    """Have the app answer every error in this shape."""

    @app.exception_handler(ApiError)
    async def _known(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        return _validation_error(error).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        answer = ApiError(error.status_code, str(error.detail), headers=error.headers or {})
        return answer.response()

    @app.exception_handler(Exception)
    async def _unforeseen(request: Request, error: Exception) -> Response:
        return ApiError(500, "internal error; the log says more", "server_error").response()


def _where(loc: Sequence[int | str]) -> str:
    """Return the place of a value in a body, such as ``messages[0].role``."""
    place = ""
    for part in loc[1:]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part.isidentifier():  # a union's members have names such as list[int]
            place += f".{part}" if place else part
    return place or "the body"


def _validation_error(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, under the name of its parameter."""
    found = error.errors()
    if not found:
        return ApiError(400, "the body is no valid request")
    # Of a union, the complaint about the member that came furthest.
    first = found[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', '')}")
    if isinstance(first.get("input"), bytes):
        return ApiError(
            400, "the body is not read as JSON: send the header 'Content-Type: application/json'"
        )
    place = [str(part) for part in first["loc"] if part != "body"]
    name = place[0] if place else None
    where = _where(first["loc"])
    text = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "value_error":
        return ApiError(400, text, param=name)
    if first["type"] == "missing":
        return ApiError(400, f"{where} is missing", param=name)
    return ApiError(400, f"{where}: {text}", param=name)
