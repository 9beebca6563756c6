"""Prompts as JSON records have them: text, chat messages or token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TypeAlias

PromptValue: TypeAlias = "str | list[int] | list[dict[str, str]]"

#: A record has one of these.
PROMPT_KEYS = ("prompt", "messages", "prompt_token_ids")


def text_of(raw: bytes, *, first: bool) -> str:
    """Decode a line of a file, or all of it; white space around it is left out.

    Parameters
    ----------
    raw
        UTF-8.
    first
        It begins its file: a byte-order mark is no part of it.

    Raises
    ------
    ValueError
        It is not UTF-8.
    """
    try:
        return raw.decode("utf-8-sig" if first else "utf-8").strip()
    except UnicodeError as error:
        raise ValueError(f"not UTF-8 text: {error}") from None


def json_of(text: str) -> object:
    """Read JSON.

    Raises
    ------
    ValueError
        It is not JSON, or holds what is not text.
    """
    try:
        value: object = json.loads(text)
        # Half a surrogate pair can be written in JSON but is not text: no tokenizer takes it.
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except UnicodeError as error:
        raise ValueError(f"not UTF-8 text: {error}") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    return value


def prompt_of(record: Mapping[str, object]) -> PromptValue:
    """Read the prompt of a record, which has one of `PROMPT_KEYS`.

    Raises
    ------
    ValueError
        It has none or several of them, or the value is of the wrong kind.
    """
    given = [key for key in PROMPT_KEYS if key in record]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise ValueError(f"expected one of {', '.join(PROMPT_KEYS)}, got {found}")
    return _READERS[given[0]](record[given[0]])


def short(value: object) -> str:
    """Show a JSON value in at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(value: object) -> PromptValue:
    if not isinstance(value, str) or not value:
        raise ValueError(f"prompt must be text that is not empty, got {short(value)}")
    return value


def _messages(value: object) -> PromptValue:
    if not isinstance(value, list) or not value:
        raise ValueError(f"messages must be a list that is not empty, got {short(value)}")
    for message in value:
        if (
            not isinstance(message, dict)
            or not {"role", "content"} <= message.keys()
            or not all(isinstance(part, str) for part in message.values())
        ):
            raise ValueError(
                f"each message must be an object with role and content, all text, "
                f"got {short(message)}"
            )
    return value


def _token_ids(value: object) -> PromptValue:
    if not isinstance(value, list) or not value:
        raise ValueError(f"prompt_token_ids must be a list that is not empty, got {short(value)}")
    for token in value:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise ValueError(f"prompt_token_ids must be integers of at least 0, got {short(token)}")
    return value


_READERS = {"prompt": _text, "messages": _messages, "prompt_token_ids": _token_ids}
