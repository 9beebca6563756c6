"""What bodies of requests have in common, in OpenAI's and vLLM's shapes.

A parameter that this server cannot honour is an error unless it has the value that asks for
nothing; one that nobody knows is an error, too. Null asks for nothing, whatever the name.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel, model_validator

from stars_fast.params import StarsParams, with_fields
from stars_fast.prompts import PromptLike
from stars_fast.server.grammar import (
    ResponseFormat,
    StructuredOutputs,
    of_response_format,
    of_structured_outputs,
)
from stars_fast.server.openapi import RANGES, stars_schema
from stars_fast.server.transcript import TextOptions
from stars_fast.text.surrogates import check_unicode

#: Parameters that cannot be honoured, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "allowed_token_ids": ([],),
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "detokenize": (True,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "priority": (0,),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}

#: Accepted and without effect: they change no response, or are hints to other models.
_WITHOUT_EFFECT = frozenset(
    {
        "cache_salt",
        "include_reasoning",
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        # Only slow tokenizers would put any between special tokens.
        "spaces_between_special_tokens",
        "verbosity",
    }
)

_INSTEAD = {
    "best_of": '"stars": {"method": "best_of_n", "candidates": N} has its function',
}


def refuse_what_is_not_honoured(
    body: Mapping[str, Any], known: Sequence[str], nothing: Mapping[str, tuple[object, ...]]
) -> dict[str, Any]:
    """Return the fields of a body that are honoured, those that ask for nothing left out.

    Parameters
    ----------
    body
        As it was sent.
    known
        Names that are honoured.
    nothing
        Other names, with the values that ask for nothing.

    Raises
    ------
    ValueError
        A field asks for what cannot be done.
    """
    check_unicode(body)
    kept = {}
    # Tools that the model must not call ask for nothing of it.
    silent = {"tools"} if body.get("tool_choice") == "none" else set()
    for name, value in body.items():
        if name in known:
            kept[name] = value
        elif value is None or name in _WITHOUT_EFFECT or name in silent:
            continue
        elif name not in nothing:
            raise ValueError(f"unknown parameter {name!r}; those known are {', '.join(known)}")
        elif not any(
            (value == one and type(value) is not bool) or value is one for one in nothing[name]
        ):
            instead = f"; {_INSTEAD[name]}" if name in _INSTEAD else ""
            raise ValueError(f"{name} is not supported by this server{instead}")
    return kept


class Strict(BaseModel):
    """Base of the bodies: no unknown names, no conversions, no halves of surrogate pairs."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, body: object) -> object:
        check_unicode(body)
        return body


class Lenient(Strict):
    """Base of the bodies that generate nothing: what asks for nothing is accepted."""

    _ASKS_FOR_NOTHING: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "encoding_format": ("float",),
        "priority": (0,),
        "truncate_prompt_tokens": (-1,),
    }

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_honoured(cls, body: object) -> object:
        if not isinstance(body, dict):
            return body
        return refuse_what_is_not_honoured(body, list(cls.model_fields), cls._ASKS_FOR_NOTHING)


class StarsFields(RootModel[dict[str, Any]]):
    """Fields of `StarsParams`; each method has its own, and those of another are an error."""

    model_config = ConfigDict(
        strict=True, json_schema_extra=lambda schema: schema.update(stars_schema())
    )


class Body(Strict):
    """What all bodies that generate have in common.

    Attributes
    ----------
    asks_for_nothing
        Names that are not honoured, with the values that are accepted.
    """

    asks_for_nothing: ClassVar[Mapping[str, tuple[object, ...]]] = _UNSUPPORTED

    model: str | None = Field(
        default=None,
        description="The model's name; may be left out. `NAME:METHOD` and `NAME:METHOD:BUDGET` "
        "choose a method, too, for clients that cannot send `stars`.",
    )
    temperature: float | None = Field(default=None, json_schema_extra=RANGES["temperature"])
    top_p: float | None = Field(default=None, json_schema_extra=RANGES["top_p"])
    top_k: int | None = Field(
        default=None,
        description="0 and -1 are off.",
        json_schema_extra={**RANGES["top_k"], "minimum": -1},
    )
    min_p: float | None = Field(default=None, json_schema_extra=RANGES["min_p"])
    repetition_penalty: float | None = Field(
        default=None, json_schema_extra=RANGES["repetition_penalty"]
    )
    presence_penalty: float | None = Field(
        default=None, json_schema_extra=RANGES["presence_penalty"]
    )
    frequency_penalty: float | None = Field(
        default=None, json_schema_extra=RANGES["frequency_penalty"]
    )
    logit_bias: dict[str, float] | None = Field(
        default=None, description="Added to logits, by token id, in [-100, 100]."
    )
    bad_words: list[str] | None = Field(
        default=None, description="Texts whose tokens a response does not have in a row."
    )
    min_tokens: int | None = Field(
        default=None,
        description="Tokens of a response that cannot end it.",
        json_schema_extra=RANGES["min_tokens"],
    )
    guide_weight: float | None = Field(
        default=None, description="Weight of the server's guide; 0 is off."
    )
    seed: int | None = Field(
        default=None, description="Fixes every draw; a negative number is taken modulo 2**64."
    )
    stop: str | list[str] | None = Field(
        default=None,
        description="Texts that end the response.",
        json_schema_extra=RANGES["stop"],
    )
    stop_token_ids: list[int] | None = Field(
        default=None, description="Tokens that end the response."
    )
    ignore_eos: bool | None = Field(
        default=None, description="Do not end at end-of-sequence tokens."
    )
    skip_special_tokens: bool | None = Field(
        default=None, description="False: special tokens are part of the text."
    )
    include_stop_str_in_output: bool | None = Field(
        default=None, description="What ended the response is part of the text."
    )
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="As vLLM has it: `json` (a schema) or `regex`."
    )
    stream: bool | None = None
    user: str | None = Field(default=None, description="Logged.")
    stars: StarsFields | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_honoured(cls, body: object) -> object:
        if not isinstance(body, dict):
            return body
        return refuse_what_is_not_honoured(body, list(cls.model_fields), cls.asks_for_nothing)

    @property
    def text_options(self) -> TextOptions:
        """What belongs to the text of a response."""
        return TextOptions(
            special=self.skip_special_tokens is False,
            with_stop=bool(self.include_stop_str_in_output),
        )

    @property
    def wants_logprobs(self) -> bool:
        """Whether each token's log-probability is asked for."""
        return False

    @property
    def only_prompts(self) -> bool:
        """Whether nothing is to be generated."""
        return False

    @property
    def prompt_logprobs(self) -> int | None:
        """How many of the likeliest tokens of the prompt are asked for; None: no scores of it."""
        return None

    @abstractmethod
    def prompts(self) -> Sequence[PromptLike]:
        """Return the prompts, each to be answered `n` times."""

    def stars_values(self) -> dict[str, Any]:
        """Return the fields of `StarsParams` that the body's own stand for."""
        names = (
            "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
            "frequency_penalty", "logit_bias", "bad_words", "min_tokens", "guide_weight", "seed",
            "stop", "stop_token_ids", "ignore_eos",
        )  # fmt: skip
        values = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.seed is not None:
            values["seed"] = self.seed % 2**64
        if self.top_k == -1:
            values["top_k"] = 0
        grammars = [grammar for grammar in self.grammars() if grammar is not None]
        if len(grammars) > 1:
            raise ValueError("structured_outputs and another format must not both be given")
        return values | ({"guided": grammars[0]} if grammars else {})

    def grammars(self) -> list[Mapping[str, Any] | None]:
        """Return what a response has to keep to, as `StarsParams.guided`."""
        asked = self.structured_outputs
        return [None if asked is None else of_structured_outputs(asked)]


class StreamOptions(Strict):
    """Options of a streamed response."""

    include_usage: bool | None = Field(default=None, description="Send a last chunk with `usage`.")
    continuous_usage_stats: bool | None = Field(
        default=None, description="Every chunk has the `usage` so far, and there is a last one."
    )
    include_obfuscation: Literal[False] | None = None


class GenerationRequest(Body):
    """What completions and chat completions have in common."""

    max_tokens: int | None = Field(
        default=None,
        description="Tokens of a response at most.",
        json_schema_extra=RANGES["max_tokens"],
    )
    n: int | None = Field(
        default=None, description="Responses to each prompt.", json_schema_extra=RANGES["n"]
    )
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = Field(
        default=None, description="`json_schema`: the response keeps to it."
    )

    @model_validator(mode="after")
    def _stream_options_with_a_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options must be left out unless stream is true")
        return self

    def grammars(self) -> list[Mapping[str, Any] | None]:
        """Return what a response has to keep to, as `StarsParams.guided`."""
        asked = self.response_format
        return [*super().grammars(), None if asked is None else of_response_format(asked)]

    def stars_values(self) -> dict[str, Any]:
        """Return the fields of `StarsParams` that the body's own stand for."""
        values = super().stars_values()
        values |= {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        return values | ({} if self.n is None else {"n": self.n})


def params_of(body: Body, base: StarsParams, *beside: Mapping[str, Any]) -> StarsParams:
    """Return a request's parameters: `base`, then what the body says, in whatever place.

    Parameters
    ----------
    body
        Its own fields, and its ``stars`` object.
    base
        Where the request does not say otherwise.
    beside
        What the request says elsewhere.

    Raises
    ------
    ValueError, TypeError
        A name that is no parameter, one that is given twice, or what `StarsParams` refuses.
    """
    values: dict[str, Any] = {}
    stars = body.stars.root if body.stars is not None else {}
    for place in (body.stars_values(), stars, *beside):
        for name in values.keys() & place.keys():
            raise ValueError(f"{name} is given twice, such as in the body and in its stars object")
        values |= place
    return with_fields(base, values)
