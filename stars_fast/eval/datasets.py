r"""Prompts and preferences from files in common layouts.

``jsonl``
    Lines as ``stars-fast generate`` reads them: ``prompt``, ``messages`` or ``prompt_token_ids``,
    and ``id``. Besides ``answer``, a text or a number, that the gold score ``math`` asks for.
``hh``
    HH-RLHF: ``chosen`` and ``rejected`` hold whole dialogues, such as
    "\n\nHuman: ...\n\nAssistant: ...". The prompt is everything up to and including the last
    "\n\nAssistant:". Where a record has its ``prompt`` apart, as others store preferences, the two
    hold the responses alone.
``alpaca_eval``
    ``instruction`` is the prompt; what else there is (``output``, ``generator``) is not read.

All as JSON lines or as one JSON list, also gzipped (``.gz``).
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from stars_fast.prompts import PROMPT_KEYS, PromptValue, json_of, prompt_of, short, text_of

Layout = Literal["jsonl", "hh", "alpaca_eval"]

#: Ends the prompt of an HH-RLHF dialogue.
ASSISTANT = "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Item:
    """A prompt to be answered.

    Attributes
    ----------
    number
        Number of its record in the file, from 1: its line, or its place in the list.
    prompt
        Text, chat messages or token ids.
    chosen, rejected
        The preferred response and the other one; None where the layout has none.
    opening
        Opening of the response, with the white space before it; the model continues it.
        Only where the prompt is text.
    answer
        The right answer, where there is one.
    """

    number: int
    prompt: PromptValue
    chosen: str | None = None
    rejected: str | None = None
    opening: str = ""
    answer: str | None = None

    @property
    def continued(self) -> PromptValue:
        """The text that the language model continues: the prompt with the opening."""
        if not self.opening:
            return self.prompt
        assert isinstance(self.prompt, str)
        return self.prompt + self.opening

    def whole(self, text: str) -> str:
        """Return the response as a reader sees it: the opening and what the model wrote."""
        return self.opening + text


class RecordError(ValueError):
    """A record that is not a prompt; the message names the file and its number."""


def read_items(
    path: Path,
    *,
    layout: Layout | None = None,
    offset: int = 0,
    limit: int | None = None,
    chat: bool = False,
) -> list[Item]:
    """Read the prompts of a file.

    Parameters
    ----------
    path
        The file.
    layout
        Layout of the file; None: that of the first record.
    offset
        Records to leave out before the first; what they hold is not looked at.
    limit
        Records to read; None: all.
    chat
        Turn texts into chat messages: one for each turn of an HH-RLHF dialogue, one of the user for
        any other text.

    Raises
    ------
    RecordError
        A record cannot be read, or the file has none, or none behind `offset`.
    OSError
        The file cannot be read.
    """
    try:
        return _items(path, layout, offset, limit, chat=chat)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RecordError(f"{path} is not a whole gzip file: {error}") from None


def _items(
    path: Path, layout: Layout | None, offset: int, limit: int | None, *, chat: bool
) -> list[Item]:
    items: list[Item] = []
    for number, record in itertools.islice(_records(path), offset, None):
        if len(items) == limit:
            break
        try:
            fields = _object(record)
            layout = layout or layout_of(fields)
            item = _READERS[layout](number, fields)
        except ValueError as error:
            raise RecordError(f"{path}, record {number}: {error}") from None
        items.append(_as_chat(item, layout) if chat else item)
    if not items:
        behind = f" behind the first {offset}" if offset else ""
        raise RecordError(f"{path} has no record{behind}")
    return items


def layout_of(record: Mapping[str, Any]) -> Layout:
    """Tell a record's layout by its keys.

    Raises
    ------
    ValueError
        If it is none of them.
    """
    if "chosen" in record:
        return "hh"
    if "instruction" in record:
        return "alpaca_eval"
    if any(key in record for key in PROMPT_KEYS):
        return "jsonl"
    raise ValueError(
        f"its keys, {', '.join(record) or 'none'}, are those of no layout; the layouts are "
        f"{', '.join(get_args(Layout))}"
    )


def _records(path: Path) -> Iterator[tuple[int, object]]:
    """Give the records of a file with their numbers."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        raw = b""
        for number, raw in enumerate(file, 1):  # noqa: B007 - the first line that is not blank
            if raw.strip(b"\xef\xbb\xbf \t\r\n"):
                break
        if raw.strip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            try:
                values = json_of(text_of(raw + file.read(), first=True))
            except ValueError as error:
                raise RecordError(f"{path}: {error}") from None
            assert isinstance(values, list)  # it begins with a bracket
            yield from enumerate(values, 1)
            return
    with opened(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                text = text_of(raw, first=number == 1)
                if text:
                    yield number, json_of(text)
            except ValueError as error:
                raise RecordError(f"{path}, record {number}: {error}") from None


def _object(value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {short(value)}")
    return value


def _of_jsonl(number: int, record: Mapping[str, Any]) -> Item:
    for key in record:
        if key not in (*PROMPT_KEYS, "id", "answer"):
            raise ValueError(
                f"unknown key {key!r}; the keys are {', '.join((*PROMPT_KEYS, 'id', 'answer'))}"
                + ("; parameters belong to the methods here" if key == "params" else "")
            )
    answer = record.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if answer is not None and (not isinstance(answer, str) or not answer.strip()):
        raise ValueError(f"answer must be text or a number, got {short(answer)}")
    return Item(number, prompt_of(record), answer=answer)


def _of_hh(number: int, record: Mapping[str, Any]) -> Item:
    chosen, rejected = (_text(record, key) for key in ("chosen", "rejected"))
    if any(key in record for key in PROMPT_KEYS):
        return Item(number, prompt_of(record), chosen, rejected)
    prompt, response = _split(chosen, "chosen")
    other_prompt, other = _split(rejected, "rejected")
    # Where the dialogues part earlier, the last turns do not answer the same prompt.
    pair = (response, other) if other_prompt == prompt else (None, None)
    return Item(number, prompt, *pair)


def _split(dialogue: str, key: str) -> tuple[str, str]:
    before, found, response = dialogue.rpartition(ASSISTANT)
    if not found:
        raise ValueError(f"{key} has no turn {json.dumps(ASSISTANT)}, got {short(dialogue)}")
    return before + found, response


def _of_alpaca_eval(number: int, record: Mapping[str, Any]) -> Item:
    text = _text(record, "instruction")
    if not text:
        raise ValueError("instruction is empty")
    return Item(number, text)


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} must be text, got {short(value)}")
    return value


_READERS: Mapping[Layout, Callable[[int, Mapping[str, Any]], Item]] = {
    "jsonl": _of_jsonl,
    "hh": _of_hh,
    "alpaca_eval": _of_alpaca_eval,
}


def _as_chat(item: Item, layout: Layout) -> Item:
    if not isinstance(item.prompt, str):
        return item
    messages = [{"role": "user", "content": item.prompt}]
    if layout == "hh" and item.prompt.endswith(ASSISTANT):
        _, *parts = _TURN.split(item.prompt.removesuffix(ASSISTANT))
        turns = zip(parts[::2], parts[1::2], strict=True)
        messages = [{"role": _ROLES[who], "content": said.strip()} for who, said in turns]
    return replace(item, prompt=messages)
