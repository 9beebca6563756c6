"""The HTTP application."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from importlib.metadata import version
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from stars_fast.server.answers import ModelList, ModelObject, State, Version
from stars_fast.server.chat import ChatAnswer, ChatChunk, ChatRequest, ChatWriter
from stars_fast.server.completions import (
    CompletionAnswer,
    CompletionChunk,
    CompletionRequest,
    CompletionWriter,
)
from stars_fast.server.engines import ServedEngine
from stars_fast.server.errors import ApiError, add_handlers, api_error
from stars_fast.server.guard import Guard
from stars_fast.server.logs import log
from stars_fast.server.method_name import values_in_name
from stars_fast.server.metrics import Metrics
from stars_fast.server.openapi import ENGINE_ERRORS, describe, errors, generated
from stars_fast.server.responses import (
    ResponsesAnswer,
    ResponsesEvent,
    ResponsesRequest,
    ResponsesWriter,
)
from stars_fast.server.scoring import (
    ClassifyAnswer,
    PoolingAnswer,
    PoolingRequest,
    ScoreAnswer,
    ScoreRequest,
    Scoring,
)
from stars_fast.server.serving import Serving
from stars_fast.server.settings import ServerSettings
from stars_fast.server.tokens import (
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
    detokenize,
    tokenize,
)

T = TypeVar("T")

_DESCRIPTION = """\
Responses of a language model, aligned to a reward model while they are decoded (STARS). In the
shape of OpenAI's API; a `stars` object in the body sets parameters of its own. Tokens are sent when
the segment that they are part of has been accepted, and never taken back.
"""

#: The page needs nothing from elsewhere, and may not have it; it runs no script but its own.
_POLICY = (
    "default-src 'none'; style-src {style}; script-src {script}; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(engine: ServedEngine, settings: ServerSettings) -> FastAPI:
    """Return the application, for uvicorn or another ASGI server.

    Parameters
    ----------
    engine
        An `AsyncEngine`, or the client of an engine in another process; it is drained when the
        application shuts down.
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
    describe(
        app, (CompletionChunk, ChatChunk, ResponsesEvent), needs_key=settings.api_key is not None
    )
    app.add_middleware(Guard, api_key=settings.api_key, max_body_bytes=settings.max_body_bytes)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    add_handlers(app)
    metrics = app.state.metrics = Metrics(engine)
    serving = Serving(engine, settings, metrics)
    created = int(time.time())
    page = files("stars_fast.server").joinpath("page.html").read_text(encoding="utf-8")
    policy = _POLICY.format(style=_hash_of("style", page), script=_hash_of("script", page))
    page_headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}

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

    @app.post(
        "/v1/responses",
        response_model=None,
        responses=generated(ResponsesAnswer, ResponsesEvent, ends_with_done=False),
    )
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Answer text or messages; nothing is stored."""
        return await serving.answer(request, body, ResponsesWriter)

    def named(model: str | None) -> None:
        if values_in_name(model, settings.model_name) is None:
            raise ApiError(404, f"the model {model!r:.200} does not exist", code="model_not_found")

    timeout = settings.request_timeout

    @app.post("/tokenize", response_model=TokenizeAnswer, responses=errors(*ENGINE_ERRORS))
    async def tokenize_(body: TokenizeRequest) -> TokenizeAnswer:
        """Return a text or a chat as token ids."""
        named(body.model)
        return await answered(tokenize(engine, body, timeout))

    @app.post("/detokenize", response_model=DetokenizeAnswer, responses=errors(*ENGINE_ERRORS))
    async def detokenize_(body: DetokenizeRequest) -> DetokenizeAnswer:
        """Return token ids as text."""
        named(body.model)
        return await answered(detokenize(engine, body, timeout))

    scoring = Scoring(engine, settings)

    @app.post("/classify", response_model=ClassifyAnswer, responses=errors(*ENGINE_ERRORS))
    async def classify(body: PoolingRequest) -> ClassifyAnswer:
        """Score texts by the reward model, as probabilities."""
        named(body.model)
        return await answered(scoring.classify(body, int(time.time())))

    @app.post("/pooling", response_model=PoolingAnswer, responses=errors(*ENGINE_ERRORS))
    async def pooling(body: PoolingRequest) -> PoolingAnswer:
        """Score texts by the reward model."""
        named(body.model)
        return await answered(scoring.pooling(body, int(time.time())))

    @app.post("/v1/score", response_model=ScoreAnswer, responses=errors(*ENGINE_ERRORS))
    @app.post("/score", response_model=ScoreAnswer, responses=errors(*ENGINE_ERRORS))
    async def score(body: ScoreRequest) -> ScoreAnswer:
        """Score pairs of a prompt and a response by the reward model."""
        named(body.model)
        return await answered(scoring.score(body, int(time.time())))

    @app.get("/v1/models", response_model=ModelList, responses=errors(401))
    async def models() -> ModelList:
        """Return the one model."""
        return ModelList(object="list", data=[model_object(settings.model_name)])

    @app.get("/v1/models/{name:path}", response_model=ModelObject, responses=errors(401, 404))
    async def model(name: str) -> ModelObject:
        """Return a model by its name."""
        named(name)
        return model_object(name)

    @app.get("/health", response_model=None, responses=states)
    async def health() -> JSONResponse:
        """Return 200 while the engine works, 503 when it has stopped or rounds keep failing."""
        return _state(engine.healthy)

    @app.get("/ready", response_model=None, responses=states)
    async def ready() -> JSONResponse:
        """Return 200 while requests are taken, 503 when the server drains."""
        return _state(engine.healthy and engine.accepting)

    @app.get("/ping", response_model=None, responses=states)
    async def ping() -> JSONResponse:
        """Answer as `/health`."""
        return _state(engine.healthy)

    @app.get("/version", response_model=Version)
    async def version_() -> Version:
        """Return the version of stars_fast."""
        return Version(version=app.version)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Return the metrics as Prometheus reads them."""
        await engine.refresh()
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def root() -> HTMLResponse:
        return HTMLResponse(page, headers=page_headers)

    return app


async def answered(work: Awaitable[T]) -> T:
    """Await an answer; what the engine raises becomes an error of the API."""
    try:
        return await work
    except Exception as error:
        raise api_error(error) from error


def _hash_of(tag: str, page: str) -> str:
    """Return the one element of this name in a page, as a policy names it (CSP 3, 6.7.3.3)."""
    found = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    assert len(found) == 1
    digest = hashlib.sha256(found[0].encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _state(good: bool) -> JSONResponse:
    return JSONResponse({"status": "ok" if good else "unavailable"}, 200 if good else 503)
