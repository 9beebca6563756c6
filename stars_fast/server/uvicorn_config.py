"""How uvicorn serves the application."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI


def uvicorn_config(app: FastAPI, **options: Any) -> uvicorn.Config:
    """Return how uvicorn serves the application: no web sockets, and requests that end.

    Without httptools its protocol is h11's, whose heads are limited too.
    """
    http: type[asyncio.Protocol] | Literal["auto"] = "auto"
    if importlib.util.find_spec("httptools") is not None:
        from stars_fast.server.connection import Connection

        http = Connection
    return uvicorn.Config(app, http=http, ws="none", log_config=None, access_log=False, **options)
