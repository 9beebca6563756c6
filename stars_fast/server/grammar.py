"""What a response has to keep to, as OpenAI and vLLM ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class JsonSchema(BaseModel):
    """A schema of OpenAI's ``response_format``."""

    model_config = ConfigDict(extra="ignore", strict=True)

    name: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(default=None, description="The response keeps to it in any case.")


class ResponseFormat(BaseModel):
    """OpenAI's ``response_format``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: str = Field(json_schema_extra={"enum": ["text", "json_object", "json_schema"]})
    json_schema: JsonSchema | None = None


class StructuredOutputs(BaseModel):
    """VLLM's ``structured_outputs``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    json_: dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None


def of_response_format(value: ResponseFormat) -> Mapping[str, Any] | None:
    """Return `StarsParams.guided` for OpenAI's field; None: any text.

    Raises
    ------
    ValueError
        The type is unknown, or the schema is missing.
    """
    if value.type == "text":
        return None
    if value.type == "json_object":
        return {"json_schema": {"type": "object"}}
    if value.type != "json_schema":
        raise ValueError(
            f"response_format.type must be text, json_object or json_schema, got {value.type!r}"
        )
    if value.json_schema is None:
        raise ValueError("response_format.json_schema is missing")
    return {"json_schema": value.json_schema.json_schema}


def of_structured_outputs(value: StructuredOutputs) -> Mapping[str, Any]:
    """Return `StarsParams.guided` for vLLM's field.

    Raises
    ------
    ValueError
        Not one of both is given.
    """
    if (value.json_ is None) == (value.regex is None):
        raise ValueError("structured_outputs must have json or regex, and not both")
    return {"regex": value.regex} if value.json_ is None else {"json_schema": value.json_}
