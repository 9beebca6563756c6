"""Bodies of requests, in OpenAI's shapes.

A parameter that this server cannot honour is an error unless it has the value that asks for
nothing; one that nobody knows is an error, too.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel, model_validator

from stars_fast.params import StarsParams, with_fields
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
    def wants_token_ids(self) -> bool:
        """Whether each choice has its token ids."""
        return False

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


class CompletionRequest(GenerationRequest):
    """Body of ``/v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="Text, token ids, or a list of either."
    )
    logprobs: Annotated[int, Field(ge=0, le=0)] | None = Field(
        None, description="0: with the log-probability of each token. More are not kept."
    )
    return_token_ids: bool | None = Field(
        None, description="With `token_ids` in each choice, as vLLM has them."
    )

    @property
    def wants_logprobs(self) -> bool:
        """Whether each token's log-probability is asked for."""
        return self.logprobs is not None

    @property
    def wants_token_ids(self) -> bool:
        """Whether each choice has its token ids."""
        return bool(self.return_token_ids)

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, each to be answered `n` times.

        Raises
        ------
        ValueError
            If there is none.
        """
        if not self.prompt:
            raise ValueError("prompt is empty")
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [list(self.prompt)]
        return list(self.prompt)


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """Return it as chat templates read it."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(GenerationRequest):
    """Body of ``/v1/chat/completions``."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = Field(
        None, description="As `max_tokens`.", json_schema_extra=RANGES["max_tokens"]
    )
    logprobs: bool | None = Field(None, description="With the log-probability of each token.")

    @property
    def wants_logprobs(self) -> bool:
        """Whether each token's log-probability is asked for."""
        return bool(self.logprobs)

    def openai_values(self) -> dict[str, Any]:
        """Return the fields of `StarsParams` that OpenAI's parameters stand for."""
        values = super().openai_values()
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ValueError("max_tokens and max_completion_tokens must not differ")
            values["max_tokens"] = self.max_completion_tokens
        return values

    def prompts(self) -> list[list[dict[str, str]]]:
        """Return the one prompt.

        Raises
        ------
        ValueError
            If there are no messages.
        """
        if not self.messages:
            raise ValueError("messages must be a list that is not empty")
        return [[message.plain() for message in self.messages]]


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
