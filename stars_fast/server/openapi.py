"""The description of the API (OpenAPI): which answers there are, and the key."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from http import HTTPStatus
from typing import Any, get_type_hints

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from stars_fast import params
from stars_fast.params import Range, StarsParams, plain_text
from stars_fast.server.answers import ErrorAnswer
from stars_fast.server.guard import asks_for_key


def _keywords(allowed: Range) -> dict[str, Any]:
    """Return a range as JSON Schema has it."""
    bounds = {
        "minimum": allowed.low,
        "maximum": allowed.high,
        "exclusiveMinimum": allowed.above,
        "exclusiveMaximum": allowed.below,
    }
    return {
        keyword: bound
        for keyword, bound in bounds.items()
        if bound is not None and not math.isinf(bound)
    }


#: What `StarsParams` checks, as JSON Schema has it; `beta` with soft acceptance.
RANGES: dict[str, dict[str, Any]] = {
    "beta": {"exclusiveMinimum": 0},
    "stop": {"minLength": 1},
    "step_text": {"minLength": 1},
    **{name: bounds for name, allowed in params.RANGES.items() if (bounds := _keywords(allowed))},
}

#: Texts and lists that must hold something; each keyword is for values of its own kind.
NOT_EMPTY: dict[str, Any] = {
    "minLength": 1,
    "minItems": 1,
    "items": {"minLength": 1, "minItems": 1},
}

_ERRORS = {
    400: "The request cannot be honoured; `param` says why.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    413: "The body is too long.",
    429: "The queue is full; `Retry-After` says when to come again.",
    500: "The request failed, for instance in its reward function.",
    503: "The server stops.",
    504: "Not finished in time.",
}

#: What asking the engine for something can end with.
ENGINE_ERRORS = (400, 401, 404, 413, 429, 500, 503, 504)

_KEY = "api_key"
_REF = "#/components/schemas/{model}"


def stars_schema() -> dict[str, Any]:
    """Return the JSON Schema of the ``stars`` object: each field of `StarsParams`."""
    hints = get_type_hints(StarsParams)
    properties = {
        field.name: {
            **TypeAdapter(hints[field.name]).json_schema(),
            **RANGES.get(field.name, {}),
            "description": plain_text(field.name),
        }
        for field in fields(StarsParams)
    }
    return {"properties": properties, "additionalProperties": False}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the ``responses`` of a route for some of the errors that the server has."""
    return {status: {"model": ErrorAnswer, "description": _ERRORS[status]} for status in statuses}


def generated(
    whole: type[BaseModel], chunk: type[BaseModel], *, ends_with_done: bool = True
) -> dict[int | str, dict[str, Any]]:
    """Return the ``responses`` of a route that generates: `whole`, or a stream of `chunk`.

    `ends_with_done`: errors are events of their own, and the last event is ``[DONE]``.
    """
    models = (chunk, ErrorAnswer) if ends_with_done else (chunk,)
    bodies = [{"$ref": _REF.format(model=model.__name__)} for model in models]
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": bodies},
    }
    done = [{"const": "[DONE]"}] if ends_with_done else []
    event = {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"anyOf": [data, *done]}},
    }
    last = ", and `[DONE]` as the last" if ends_with_done else ""
    stream = {"text/event-stream": {"itemSchema": event}}
    good = {
        "model": whole,
        "content": stream,
        "description": "The whole response; with `stream`, an event for each accepted segment, "
        f"an error among them where one occurs{last}.",
    }
    return {200: good, **errors(*ENGINE_ERRORS)}


def describe(app: FastAPI, chunks: Sequence[type[BaseModel]], *, needs_key: bool) -> None:
    """Have the app describe itself as it is.

    FastAPI's own description lacks the key, which is asked for before FastAPI sees the request, and
    `chunks`, the events of its streams; and it has a 422 that is a 400 here.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop(str(HTTPStatus.UNPROCESSABLE_ENTITY.value), None)
                    if asks_for_key(path):
                        operation["security"] = [{_KEY: []}] if needs_key else [{}, {_KEY: []}]
            components = schema["components"]
            for unused in ("HTTPValidationError", "ValidationError"):
                components["schemas"].pop(unused, None)
            mode: JsonSchemaMode = "serialization"
            events = [(chunk, mode) for chunk in chunks]
            _, events_schema = models_json_schema(events, ref_template=_REF)
            components["schemas"] |= events_schema["$defs"]
            components["securitySchemes"] = {
                _KEY: {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "The key that the server was started with, if it was with one.",
                }
            }
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
