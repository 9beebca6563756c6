"""Bodies of requests, in OpenAI's shapes.

A parameter that this server cannot honour is an error unless it has the value that asks for
nothing; one that nobody knows is an error, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel, model_validator

from stars_fast.params import StarsParams, with_fields
from stars_fast.prompts import PromptLike
from stars_fast.server.openapi import RANGES, stars_schema

#: Parameters of OpenAI's that cannot be honoured, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}

#: Accepted and without effect, for they change no response.
_WITHOUT_EFFECT = ("metadata", "prompt_cache_key", "safety_identifier", "service_tier")

_INSTEAD = {
    "best_of": '"stars": {"method": "best_of_n", "candidates": N} has its function',
}


class Strict(BaseModel):
    """Base of the bodies: no unknown names, no conversions."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    """Options of a streamed response."""

    include_usage: bool | None = Field(None, description="Send a last chunk with `usage`.")
    include_obfuscation: Literal[False] | None = None


class StarsFields(RootModel[dict[str, Any]]):
    """Fields of `StarsParams`; each method has its own, and those of another are an error."""

    model_config = ConfigDict(
        strict=True, json_schema_extra=lambda schema: schema.update(stars_schema())
    )


class GenerationRequest(Strict):
    """What completions and chat completions have in common."""

    model: str | None = Field(None, description="The model's name; may be left out.")
    max_tokens: int | None = Field(
        None, description="Tokens of a response at most.", json_schema_extra=RANGES["max_tokens"]
    )
    temperature: float | None = Field(None, json_schema_extra=RANGES["temperature"])
    top_p: float | None = Field(None, json_schema_extra=RANGES["top_p"])
    n: int | None = Field(
        None, description="Responses to each prompt.", json_schema_extra=RANGES["n"]
    )
    seed: int | None = Field(
        None, description="Fixes every draw; a negative number is taken modulo 2**64."
    )
    stop: str | list[str] | None = Field(
        None, description="Texts that end the response.", json_schema_extra=RANGES["stop"]
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Logged.")
    stars: StarsFields | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_honoured(cls, body: object) -> object:
        if not isinstance(body, dict):
            return body
        known = cls.model_fields
        kept = {}
        for name, value in body.items():
            if name in known:
                kept[name] = value
            elif name in _WITHOUT_EFFECT:
                continue
            elif name not in _UNSUPPORTED:
                raise ValueError(f"unknown parameter {name!r}; those known are {', '.join(known)}")
            elif value is not None and value not in _UNSUPPORTED[name]:
                instead = f"; {_INSTEAD[name]}" if name in _INSTEAD else ""
                raise ValueError(f"{name} is not supported by this server{instead}")
        return kept

    @model_validator(mode="after")
    def _stream_options_with_a_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options must be left out unless stream is true")
        return self

    @property
    def wants_logprobs(self) -> bool:
        """Whether each token's log-probability is asked for."""
        return False

    def prompts(self) -> Sequence[PromptLike]:
        """Return the prompts, each to be answered `n` times."""
        raise NotImplementedError

    def openai_values(self) -> dict[str, Any]:
        """Return the fields of `StarsParams` that OpenAI's parameters stand for."""
        values: dict[str, Any] = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "n": self.n,
            "seed": None if self.seed is None else self.seed % 2**64,
            "stop": self.stop,
        }
        return {name: value for name, value in values.items() if value is not None}


def params_of(body: GenerationRequest, base: StarsParams) -> StarsParams:
    """Return a request's parameters: `base`, then OpenAI's names, then the ``stars`` object.

    Raises
    ------
    ValueError, TypeError
        A name that is no parameter, one that is given twice, or what `StarsParams` refuses.
    """
    values = body.openai_values()
    stars = body.stars.root if body.stars is not None else {}
    for name in values.keys() & stars.keys():
        raise ValueError(f"{name} is given twice, in the body and in its stars object")
    return with_fields(base, {**values, **stars})
