"""Where requests come from: a file, a pipe or a terminal, or the command line itself."""

from __future__ import annotations

import io
import json
import os
import select
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from stars_fast.cli.errors import UsageError, file_errors
from stars_fast.cli.terminal import say
from stars_fast.params import StarsParams
from stars_fast.records import InputRecord, LineError, parse_line
from stars_fast.seeds import derive_seed

#: Called with ``wait``; returns the next line, ``b""`` at the end, or, only if ``wait`` is False,
#: None where there is no line yet.
ReadLine: TypeAlias = Callable[[bool], "bytes | None"]


def is_regular_file(path: Path) -> bool:
    """Whether `path` can be read twice."""
    return stat.S_ISREG(path.stat().st_mode)


@contextmanager
def opened_input(
    path: Path | None, prompts: Sequence[str], images: Sequence[str] = ()
) -> Iterator[ReadLine]:
    """The lines of a file, of a pipe, of standard input (`path` None), or of `prompts` if any.

    Each of these has the `images`, files, before its text.
    """
    if prompts:
        text = "".join(json.dumps(_record(prompt, images)) + "\n" for prompt in prompts)
        lines = io.BytesIO(text.encode())
        yield lambda wait: lines.readline()
    elif path is None:
        if sys.stdin is None:
            raise UsageError("standard input is closed: give --input FILE or --prompt TEXT")
        if sys.stdin.isatty():
            say("reading JSON lines from the terminal; Ctrl-D ends them")
        yield PipeLines(sys.stdin.fileno())
    else:
        with file_errors():
            file = path.open("rb")
        with file:
            regular = is_regular_file(path)
            yield (lambda wait: file.readline()) if regular else PipeLines(file.fileno())


def _record(prompt: str, images: Sequence[str]) -> dict[str, object]:
    if not images:
        return {"prompt": prompt}
    parts: list[dict[str, str]] = [{"type": "image", "image": image} for image in images]
    parts.append({"type": "text", "text": prompt})
    return {"messages": [{"role": "user", "content": parts}]}


class PipeLines:
    """Lines of a pipe or a terminal; a slow writer does not hold up the requests in progress."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lines: deque[bytes] = deque()
        self._rest = b""
        self._ended = False

    def __call__(self, wait: bool) -> bytes | None:
        """The next line, as `ReadLine` says."""
        while not self._lines:
            if self._ended:
                return b""
            if not wait and not select.select([self._descriptor], [], [], 0)[0]:
                return None
            chunk = os.read(self._descriptor, 1 << 16)
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            self._lines.extend(line + b"\n" for line in lines)
            if not chunk:
                self._ended = True
                if self._rest:
                    self._lines.append(self._rest)
        return self._lines.popleft()


class Requests:
    """The requests of an input, one at a time.

    Parameters
    ----------
    read_line
        The input.
    base
        Parameters of a request where its line does not say otherwise. With ``"auto"`` or None for
        `target_reward` the run calibrates, and any line may ask for the calibrated target.
    seed
        Seed of the run: a request without its own gets one made from this and its line number, so
        its tokens depend neither on the other lines nor on where a run was interrupted. They are
        those of ``Engine(..., seed=seed).generate`` with a prompt from each line.
    chat
        Whether a prompt that is text becomes a chat with one message, the user's.

    Attributes
    ----------
    ended
        Nothing is left.
    """

    def __init__(
        self, read_line: ReadLine, base: StarsParams, seed: int, *, chat: bool = False
    ) -> None:
        self._chat = chat
        self._read_line = read_line
        self._base = base
        self._seed = seed
        self._line = 0
        self._ahead: deque[InputRecord | LineError] = deque()
        self.ended = False

    def take(self, wait: bool) -> InputRecord | LineError | None:
        """The next request, or what is wrong with it; None at the end, or if none is there yet.

        With `wait` True None is returned at the end only.
        """
        return self._ahead.popleft() if self._ahead else self._read(wait)

    def peek(self, count: int) -> list[InputRecord]:
        """The first `count` requests, which stay to be taken; waits for them."""
        while sum(isinstance(item, InputRecord) for item in self._ahead) < count:
            item = self._read(wait=True)
            if item is None:
                break
            self._ahead.append(item)
        self.ended = self.ended and not self._ahead
        return [item for item in self._ahead if isinstance(item, InputRecord)]

    def stop(self) -> None:
        """Take no further lines."""
        self._ahead.clear()
        self._read_line = lambda wait: b""
        self.ended = True

    def _read(self, wait: bool) -> InputRecord | LineError | None:
        while raw := self._read_line(wait):
            self._line += 1
            try:
                record = parse_line(raw, self._line, self._base)
                if record is not None:
                    prompt = record.prompt
                    if self._chat and isinstance(prompt, str):
                        prompt = [{"role": "user", "content": prompt}]
                    return replace(record, prompt=prompt, params=self._settled(record))
            except LineError as error:
                return error
        self.ended = raw is not None
        return None

    def _settled(self, record: InputRecord) -> StarsParams:
        if record.params.needs_calibration and not self._base.needs_calibration:
            raise LineError(
                record.line,
                f"target_reward must be a number for method {record.params.method!r}, got "
                f"{record.params.target_reward!r}; give --target-reward auto to calibrate one",
            )
        if record.params.seed is not None:
            return record.params
        return replace(record.params, seed=derive_seed(self._seed, record.line))
