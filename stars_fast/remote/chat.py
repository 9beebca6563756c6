"""Questions to a language model at an OpenAI-compatible endpoint, in one message each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from stars_fast.remote.http import RemoteError

#: Added to the address of the API.
PATH = "/chat/completions"


def filled(template: str, parts: Mapping[str, str]) -> str:
    """Return a template with its ``{name}`` replaced; what is put in may have braces of its own."""
    names = "|".join(map(re.escape, parts))
    return re.sub(rf"\{{({names})\}}", lambda match: parts[match[1]], template)


def question(model: str, text: str) -> dict[str, Any]:
    """Return the body of a call that asks for the likeliest answer."""
    return {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0}


def choice_of(answer: object) -> tuple[str, dict[str, Any]]:
    """Return the text of an answer, and all of its choice.

    Raises
    ------
    RemoteError
        It is no chat completion.
    """
    try:
        choice = answer["choices"][0]  # type: ignore[index]
        return str(choice["message"]["content"] or ""), choice
    except (KeyError, IndexError, TypeError):
        raise RemoteError(f"the answer is no chat completion: {answer!r:.200}") from None
