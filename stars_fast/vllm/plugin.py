"""Our routes in ``vllm serve``, by vLLM's entry point group ``vllm.endpoint_plugins``."""

from __future__ import annotations

import asyncio
import os
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from stars_fast.engine.async_engine import AsyncEngine
from stars_fast.server.app import create_app
from stars_fast.server.errors import ApiError
from stars_fast.server.logs import configure_logs, log
from stars_fast.vllm.engine import StarsLLM
from stars_fast.vllm.options import PluginOptions, options_from

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

PATH = "/plugins/stars"
_KEY_VARIABLE = "VLLM_API_KEY"


class StarsPlugin:
    """An endpoint plugin of vLLM, which serves `create_app` under ``/plugins/stars``.

    vLLM makes one where ``VLLM_PLUGINS`` names it, calls `attach_router` when it builds its
    application, and `init_state` when its engine is there. `options_from` says what it reads.

    Attributes
    ----------
    name, required_tasks
        As vLLM's `EndpointPlugin` has them.
    """

    name = "stars"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._options: PluginOptions | None = None
        self._engine: AsyncEngine | None = None
        self._app: ASGIApp | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, which answer 503 before `init_state`, and drain when vLLM shuts down.

        Raises
        ------
        ValueError
            If the options are wrong; vLLM then does not start.
        """
        self._options = options_from(os.environ)
        app.mount(PATH, self._serve)
        inner = app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
            async with inner(app) as state:
                try:
                    yield state
                finally:
                    await self._drain()

        app.router.lifespan_context = lifespan

    async def init_state(
        self, engine_client: EngineClient | None, state: object, args: Namespace
    ) -> None:
        """Load the reward model and start the rounds on vLLM's engine.

        Raises
        ------
        ValueError, ModelLoadError
            If an option or the reward model does not fit; vLLM then does not start.
        """
        if engine_client is None:  # vLLM's render server, which generates nothing
            return
        options = self._options
        assert options is not None
        loop = asyncio.get_running_loop()
        made = partial(_engine, engine_client, loop, options, getattr(args, "chat_template", None))
        self._engine = AsyncEngine(await asyncio.to_thread(made), **options.queue_options())
        names = args.served_model_name or [args.model]
        configure_logs(("stars_fast",))
        settings = options.server_settings(str(names[0]), _api_keys(args))
        self._app = create_app(self._engine, settings)
        log("started", model=settings.model_name, path=PATH)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._app is not None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            error = ApiError(503, "there is no engine to generate with", "server_error")
            await error.response()(scope, receive, send)

    async def _drain(self) -> None:
        if self._engine is not None:
            assert self._options is not None
            await self._engine.drain(self._options.drain_timeout)
            log("stopped")


def _engine(
    client: EngineClient,
    loop: asyncio.AbstractEventLoop,
    options: PluginOptions,
    chat_template: str | None,
) -> StarsLLM:
    reward = options.make_reward_model()
    engine = StarsLLM(client, reward, loop=loop, **options.engine_options())
    if chat_template is not None:
        assert engine.tokenizer is not None
        engine.tokenizer.chat_template = _template(chat_template)
    return engine


def _template(given: str) -> str:
    """Return the text of vLLM's ``--chat-template``, which is a file or the template itself."""
    if any(mark in given for mark in "{}\n"):
        return given
    return Path(given).read_text(encoding="utf-8")


def _api_keys(args: Namespace) -> tuple[str, ...]:
    """Return the keys that vLLM asks for, which does so only under its own paths."""
    given = getattr(args, "api_key", None) or [os.environ.get(_KEY_VARIABLE)]
    return tuple(key for key in given if key)
