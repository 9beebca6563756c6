"""``/tokenize`` and ``/detokenize``, in vLLM's shapes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from stars_fast.prompts import PromptLike, Reader
from stars_fast.server.chat import ChatMessage
from stars_fast.server.engines import ServedEngine
from stars_fast.server.protocol import Lenient
from stars_fast.text.chats import CHAT_OPTIONS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenizeRequest(Lenient):
    """Body of ``/tokenize``: a text, or a chat."""

    model: str | None = None
    prompt: str | None = Field(default=None, min_length=1)
    messages: list[ChatMessage] | None = Field(default=None, json_schema_extra={"minItems": 1})
    add_special_tokens: bool | None = Field(
        default=None,
        description="With what the tokenizer puts around a text; by default for texts alone.",
    )
    return_token_strs: bool | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class TokenizeAnswer(BaseModel):
    """A text as tokens."""

    count: int = Field(ge=0)
    max_model_len: int | None = Field(description="The model's context in tokens.")
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Lenient):
    """Body of ``/detokenize``."""

    model: str | None = None
    tokens: list[int]


class DetokenizeAnswer(BaseModel):
    """Tokens as text, special ones included."""

    prompt: str


async def tokenize(
    engine: ServedEngine, body: TokenizeRequest, timeout: float | None
) -> TokenizeAnswer:
    """Return a text or a chat as the model reads it.

    Raises
    ------
    ValueError
        There is no tokenizer, or not one of both, or it does not fit the context.
    """
    if (body.prompt is None) == (body.messages is None):
        raise ValueError("prompt or messages must be given, and not both")
    prompt: PromptLike | None = body.prompt
    if body.messages is not None:
        prompt = body.model_dump(include={"messages", *CHAT_OPTIONS}, exclude_unset=True)
    assert prompt is not None
    ids = await engine.read(
        functools.partial(_ids, body, prompt, engine.tokenizer), prompt, timeout
    )
    strings = None
    if body.return_token_strs:
        strings = [str(one) for one in _needed(engine.tokenizer).convert_ids_to_tokens(ids)]
    return TokenizeAnswer(
        count=len(ids), max_model_len=engine.max_length, tokens=ids, token_strs=strings
    )


async def detokenize(
    engine: ServedEngine, body: DetokenizeRequest, timeout: float | None
) -> DetokenizeAnswer:
    """Return tokens as text.

    Raises
    ------
    ValueError
        There is no tokenizer, or it has no such token.
    """
    tokenizer = _needed(engine.tokenizer)
    size = len(tokenizer)
    for number, token in enumerate(body.tokens):
        if not 0 <= token < size:
            raise ValueError(f"tokens[{number}] must be in [0, {size}), got {token}")
    text = await engine.read(lambda _: tokenizer.decode(body.tokens), body.tokens, timeout)
    return DetokenizeAnswer(prompt=str(text))


def _ids(
    body: TokenizeRequest,
    prompt: PromptLike,
    tokenizer: PreTrainedTokenizerBase | None,
    reader: Reader,
) -> list[int]:
    if body.messages is not None:
        if body.add_special_tokens:
            raise ValueError("add_special_tokens must be false with messages: templates write them")
        return reader.read(prompt, 0).token_ids
    needed = _needed(tokenizer)
    if body.add_special_tokens is False:
        ids: list[int] = needed(prompt, add_special_tokens=False)["input_ids"]
        return list(ids)
    return reader.read(prompt, 0).token_ids


def _needed(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise ValueError("prompt and tokens need a tokenizer, which the model here does not have")
    return tokenizer
