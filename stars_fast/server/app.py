"""The HTTP application."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from stars_fast.engine.async_engine import AsyncEngine
from stars_fast.server.answers import ModelList, ModelObject, State
from stars_fast.server.chat import ChatAnswer, ChatChunk, ChatRequest, ChatWriter
from stars_fast.server.completions import (
    CompletionAnswer,
    CompletionChunk,
    CompletionRequest,
    CompletionWriter,
)
from stars_fast.server.errors import ApiError, add_handlers
from stars_fast.server.guard import Guard
from stars_fast.server.logs import log
from stars_fast.server.method_name import values_in_name
from stars_fast.server.metrics import Metrics
from stars_fast.server.openapi import describe, errors, generated
from stars_fast.server.serving import Serving
from stars_fast.server.settings import ServerSettings

_DESCRIPTION = """\
Responses of a language model, aligned to a reward model while they are decoded (STARS). In the
shape of OpenAI's API; a `stars` object in the body sets parameters of its own. Tokens are sent when
the segment that they are part of has been accepted, and never taken back.
"""

#: The pages need nothing from elsewhere, and may not have it.
_POLICY = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
}


def create_app(engine: AsyncEngine, settings: ServerSettings) -> FastAPI:
    """Return the application, for uvicorn or another ASGI server.

    Parameters
    ----------
    engine
        Whose server this is; it is drained when the application shuts down.
    settings
        Names, limits and defaults.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        log("started", model=settings.model_name)
        yield
        await engine.drain(settings.drain_timeout)
        log("stopped")

    app = FastAPI(
        title="stars_fast",
        version=version("stars-fast"),
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere
        redoc_url=None,
    )
    describe(app, (CompletionChunk, ChatChunk), needs_key=settings.api_key is not None)
    app.add_middleware(Guard, api_key=settings.api_key, max_body_bytes=settings.max_body_bytes)
    add_handlers(app)
    metrics = Metrics(engine)
    serving = Serving(engine, settings, metrics)
    created = int(time.time())
    page = files("stars_fast.server").joinpath("page.html").read_text(encoding="utf-8")

    states: dict[int | str, dict[str, Any]] = {
        status: {"model": State, "description": text}
        for status, text in ((200, "The server takes requests."), (503, "It does not."))
    }

    def model_object(name: str) -> ModelObject:
        return ModelObject(
            id=name,
            object="model",
            created=created,
            owned_by="stars_fast",
            root=settings.model_path or settings.model_name,
            parent=None,
            max_model_len=engine.max_length,
        )

    @app.post(
        "/v1/completions",
        response_model=None,
        responses=generated(CompletionAnswer, CompletionChunk),
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one prompt or several."""
        return await serving.answer(request, body, CompletionWriter)

    @app.post(
        "/v1/chat/completions", response_model=None, responses=generated(ChatAnswer, ChatChunk)
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a chat; the model's tokenizer needs a chat template."""
        return await serving.answer(request, body, ChatWriter)

    @app.get("/v1/models", response_model=ModelList, responses=errors(401))
    async def models() -> ModelList:
        """Return the one model."""
        return ModelList(object="list", data=[model_object(settings.model_name)])

    @app.get("/v1/models/{name:path}", response_model=ModelObject, responses=errors(401, 404))
    async def model(name: str) -> ModelObject:
        """Return a model by its name."""
        if values_in_name(name, settings.model_name) is None:
            raise ApiError(404, f"the model {name!r} does not exist", code="model_not_found")
        return model_object(name)

    @app.get("/health", response_model=None, responses=states)
    async def health() -> JSONResponse:
        """Return 200 while the engine works, 503 when it has stopped or rounds keep failing."""
        return _state(engine.healthy)

    @app.get("/ready", response_model=None, responses=states)
    async def ready() -> JSONResponse:
        """Return 200 while requests are taken, 503 when the server drains."""
        return _state(engine.healthy and engine.accepting)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Return the metrics as Prometheus reads them."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def root() -> HTMLResponse:
        return HTMLResponse(page, headers=_POLICY)

    return app


def _state(good: bool) -> JSONResponse:
    return JSONResponse({"status": "ok" if good else "unavailable"}, 200 if good else 503)
