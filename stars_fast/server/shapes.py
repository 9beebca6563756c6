"""The two shapes of OpenAI's responses: completions and chat completions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

#: Stands for minus infinity, which JSON does not have.
_LEAST_LOGPROB = -9999.0

#: A token's text and its log-probability.
TokenLogprob = tuple[str, float]


class Shape(ABC):
    """How choices are written.

    Attributes
    ----------
    prefix
        Of ids.
    whole, chunk
        Names of the response object, and of one that is a part of a stream.
    """

    prefix: str
    whole: str
    chunk: str

    @abstractmethod
    def choice(self, text: str) -> dict[str, Any]:
        """Return what is particular about a choice."""

    @abstractmethod
    def delta(self, text: str, *, first: bool) -> dict[str, Any]:
        """Return what is particular about a choice of a chunk; `first` of its choice."""

    @abstractmethod
    def logprobs(self, tokens: Sequence[TokenLogprob], offsets: Sequence[int]) -> dict[str, Any]:
        """Return log-probabilities; `offsets`: where in the response each token's text begins."""


class CompletionShape(Shape):
    """``/v1/completions``."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def choice(self, text: str) -> dict[str, Any]:
        """Return the text."""
        return {"text": text}

    def delta(self, text: str, *, first: bool) -> dict[str, Any]:
        """Return the text."""
        return {"text": text}

    def logprobs(self, tokens: Sequence[TokenLogprob], offsets: Sequence[int]) -> dict[str, Any]:
        """Return one list for each property of the tokens."""
        return {
            "tokens": [text for text, _ in tokens],
            "token_logprobs": [max(value, _LEAST_LOGPROB) for _, value in tokens],
            "top_logprobs": None,
            "text_offset": list(offsets),
        }


class ChatShape(Shape):
    """``/v1/chat/completions``."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, text: str) -> dict[str, Any]:
        """Return the message."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str, *, first: bool) -> dict[str, Any]:
        """Return what the message gets; the role comes first."""
        role = {"role": "assistant"} if first else {}
        return {"delta": {**role, "content": text}}

    def logprobs(self, tokens: Sequence[TokenLogprob], offsets: Sequence[int]) -> dict[str, Any]:
        """Return one object for each token."""
        content = [
            {
                "token": text,
                "logprob": max(value, _LEAST_LOGPROB),
                # Of half a character the bytes are not known here.
                "bytes": None if "\ufffd" in text else list(text.encode()),
                "top_logprobs": [],
            }
            for text, value in tokens
        ]
        return {"content": content, "refusal": None}
