"""Calls of tools in the text of a response, in the form that Hermes and Qwen models write.

That is ``<tool_call>{"name": "weather", "arguments": {"at": "Ulm"}}</tool_call>``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from stars_fast.text.decoders import overlap

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolCallText:
    """A call of a tool; `arguments` is the JSON of an object."""

    name: str
    arguments: str


class HermesToolCalls:
    """Parts the text of one response, as it grows, in calls and what stands around them.

    What looks like a call and is none is text. Space behind a call is left out.

    Parameters
    ----------
    single
        Only the first call is one.

    Attributes
    ----------
    count
        Calls so far.
    """

    def __init__(self, *, single: bool = False) -> None:
        self._single = single
        self._rest = ""  # what is not decided
        self._inside = False
        self._behind_a_call = False
        self.count = 0

    def push(self, text: str, *, finished: bool) -> tuple[str, list[ToolCallText]]:
        """Return the text and the calls that are decided.

        Parameters
        ----------
        text
            What the response has got, behind what was pushed before.
        finished
            Nothing follows; a call whose end is missing is one.
        """
        self._rest += text
        content, calls = "", list[ToolCallText]()
        while True:
            before, found, behind = self._rest.partition(_CLOSE if self._inside else _OPEN)
            whole = bool(found) or finished
            if self._inside:
                if not whole:
                    return content, calls
                call = _call_of(before)
                if call is None:
                    content += _OPEN + before + found
                elif not (self._single and self.count):
                    calls.append(call)
                    self.count += 1
                self._behind_a_call = call is not None
                before = ""
            else:
                if self._behind_a_call:
                    before = before.lstrip()
                end = len(before) - (0 if whole else overlap(before, _OPEN))
                content += before[:end]
                self._behind_a_call &= not before[:end]
                before = before[end:]
            if not found:
                self._rest = before
                return content, calls
            self._rest, self._inside = behind, not self._inside


def _call_of(text: str) -> ToolCallText | None:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, Mapping):
        return None
    name, arguments = call.get("name"), call.get("arguments", {})
    if not isinstance(name, str) or not name or not isinstance(arguments, Mapping):
        return None
    return ToolCallText(name, json.dumps(arguments, ensure_ascii=False))


#: By the names that ``stars-fast serve --tool-call-parser`` takes.
TOOL_CALL_PARSERS: dict[str, Callable[..., HermesToolCalls]] = {"hermes": HermesToolCalls}
