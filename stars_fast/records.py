"""Lines of the input file, lines of the output file, and the results already in the latter.

An input line is a JSON object with one of ``prompt`` (text), ``messages`` (chat) and
``prompt_token_ids``; ``id`` (text or integer), ``params`` (fields of `StarsParams`) and, beside
``messages``, those of `CHAT_OPTIONS` are optional. Empty lines are skipped. An output line is the
object that `result_record` or `error_record` makes; output lines come in the order in which
requests finish.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from stars_fast.outputs import CompletionOutput, RequestOutput, Segment
from stars_fast.params import StarsParams, with_fields
from stars_fast.prompts import PROMPT_KEYS, PromptValue, json_of, prompt_of, short, text_of
from stars_fast.text.chats import CHAT_OPTIONS

_KEYS = (*PROMPT_KEYS, *CHAT_OPTIONS, "id", "params")
_OUTPUT_KEYS = {"id", "line", "prompt", "outputs", "error"}


@dataclass(frozen=True)
class InputRecord:
    """One request of the input: its line number from 1, and what the line says."""

    line: int
    id: str | int | None
    prompt: PromptValue
    params: StarsParams


class LineError(ValueError):
    """An input line that is not a request.

    Attributes
    ----------
    line
        Its number, from 1.
    reason
        What is wrong with it.
    """

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"input line {line}: {reason}")
        self.line = line
        self.reason = reason


def parse_line(raw: bytes, line: int, base: StarsParams) -> InputRecord | None:
    """Read one input line; None if it is blank.

    Parameters
    ----------
    raw
        The line, UTF-8.
    line
        Its number, from 1.
    base
        Default parameters of the request.

    Raises
    ------
    LineError
        Not a JSON object, an unknown key, a value of the wrong kind, or parameters that
        `StarsParams` refuses.
    """
    try:
        text = text_of(raw, first=line == 1)
        return input_record(json_of(text), line, base) if text else None
    except (ValueError, TypeError) as error:
        raise LineError(line, str(error)) from None


def input_record(value: object, line: int, base: StarsParams) -> InputRecord:
    """Read the object of an input line.

    Raises
    ------
    ValueError, TypeError
        See `parse_line`.
    """
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {short(value)}")
    for key in value:
        if key not in _KEYS:
            raise ValueError(f"unknown key {key!r}; the keys are {', '.join(_KEYS)}")
    name = value.get("id")
    if isinstance(name, bool) or not isinstance(name, (str, int, type(None))):
        raise ValueError(f"id must be text or an integer, got {short(name)}")
    changes = value.get("params", {})
    if not isinstance(changes, dict):
        raise ValueError(f"params must be an object, got {short(changes)}")
    prompt = prompt_of(value)
    return InputRecord(line, name, prompt, with_fields(base, changes))


def result_record(request: InputRecord, output: RequestOutput) -> dict[str, Any]:
    """The output line of a request that has finished."""
    return {
        "id": request.id,
        "line": request.line,
        "prompt": request.prompt,
        "outputs": [_completion(completion) for completion in output.outputs],
        "error": output.error,
    }


def error_record(line: int, request: InputRecord | None, reason: str) -> dict[str, Any]:
    """The output line of an input line that is not a request (`request` None) or was refused."""
    return {
        "id": request.id if request else None,
        "line": line,
        "prompt": request.prompt if request else None,
        "outputs": [],
        "error": reason,
    }


def _completion(completion: CompletionOutput) -> dict[str, Any]:
    return {
        "index": completion.index,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "reward": finite(completion.reward),
        **rewards_record(completion.rewards),
        "finish_reason": completion.finish_reason,
        "segments": [segment_record(segment) for segment in completion.segments],
    }


def segment_record(
    segment: Segment, text_of: Callable[[Sequence[int]], str] | None = None
) -> dict[str, Any]:
    """Return a segment as JSON; rejected attempts are there if the request asked for a trace.

    With `text_of`, attempts also have their texts.
    """
    record: dict[str, Any] = {
        "start": segment.start,
        "end": segment.end,
        "reward": finite(segment.reward),
        **rewards_record(segment.rewards),
        "threshold": finite(segment.threshold),
        "attempts": segment.attempts,
        "accepted": segment.accepted,
    }
    if segment.rejected:
        record["rejected"] = [
            {
                "number": attempt.number,
                **({} if text_of is None else {"text": text_of(attempt.token_ids)}),
                "token_ids": list(attempt.token_ids),
                "reward": finite(attempt.reward),
                **rewards_record(attempt.rewards),
            }
            for attempt in segment.rejected
        ]
    return record


def rewards_record(rewards: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return the field ``rewards``; nothing where there are none."""
    return {"rewards": dict(rewards)} if rewards else {}


def finite(value: float | None) -> float | None:
    """Return the value; None for NaN and infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None


def write_record(stream: BinaryIO, record: dict[str, Any]) -> None:
    """Append one line and flush it, so that it outlives this process."""
    stream.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    stream.flush()


class Done:
    """Input lines whose results are already in an output file."""

    def __init__(self) -> None:
        self._fingerprints: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._fingerprints)

    def add(self, line: int, id: str | int | None, prompt: PromptValue) -> None:
        """Remember input line `line` with its id and prompt."""
        self._fingerprints[line] = _fingerprint(id, prompt)

    def has(self, request: InputRecord) -> bool:
        """Whether `request` is done.

        Raises
        ------
        ValueError
            Its line is done, but with another id or prompt: the output is of another input.
        """
        fingerprint = self._fingerprints.get(request.line)
        if fingerprint is None:
            return False
        if fingerprint != _fingerprint(request.id, request.prompt):
            raise ValueError(
                f"the output file holds a result for input line {request.line} with another id or "
                "prompt: it was made from another input"
            )
        return True


def _fingerprint(id: str | int | None, prompt: PromptValue) -> bytes:
    return hashlib.blake2b(json.dumps([id, prompt]).encode(), digest_size=8).digest()


def read_done(path: Path) -> Done:
    """Read the results of an interrupted run, and prepare the file for appending.

    The file is changed: a torn last line is cut off, and error records are dropped, as these
    requests will run again. A file that does not exist is an empty one.

    Raises
    ------
    ValueError
        A line before the last one is no output record; the file is then left as it was.
    """
    done = Done()
    if not path.exists():
        return done
    changed = False
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            whole = raw.endswith(b"\n")  # only a last line can lack its newline
            record = output_record(raw)
            if record is None and whole:
                raise ValueError(f"{path}, line {number}, is not a result of this command")
            if record is None or record["error"] is not None:
                changed = True
                continue
            changed = changed or not whole
            done.add(record["line"], record["id"], record["prompt"])
    if changed:
        _keep_results(path)
    return done


def _keep_results(path: Path) -> None:
    """Drop every line but whole results, by way of a second file: an interruption loses nothing."""
    target = path.resolve()
    partial = target.with_name(target.name + ".partial")
    with target.open("rb") as old, partial.open("wb") as new:
        for raw in old:
            record = output_record(raw)
            if record is not None and record["error"] is None:
                new.write(raw.rstrip(b"\n") + b"\n")
        new.flush()
        os.fsync(new.fileno())
    shutil.copymode(target, partial)
    partial.replace(target)


def output_record(raw: bytes) -> dict[str, Any] | None:
    """Read an output line; None if it is none, or a torn one."""
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not record.keys() >= _OUTPUT_KEYS:
        return None
    return record if isinstance(record["line"], int) else None
