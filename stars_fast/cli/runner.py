"""Requests from an input through an engine to an output, a bounded number at a time."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, BinaryIO

from tqdm import tqdm

from stars_fast.cli.errors import value_errors
from stars_fast.cli.lines import Requests
from stars_fast.cli.terminal import say
from stars_fast.errors import StarsFastError
from stars_fast.records import (
    Done,
    InputRecord,
    LineError,
    error_record,
    result_record,
    write_record,
)

if TYPE_CHECKING:
    from stars_fast.engine import Engine


class WriteError(StarsFastError):
    """A result that could not be written, as the system says it: a full disk."""


@dataclass
class Runner:
    """The requests of an input on their way through an engine.

    Attributes
    ----------
    written, failed
        Lines written to the output; how many of these are errors.
    bare, empty
        Responses to prompts that were text, and those of them without text.
    """

    engine: Engine
    requests: Requests
    done: Done
    stream: BinaryIO
    bar: tqdm[Any]
    target: float | None
    record_errors: bool
    written: int = 0
    failed: int = 0
    bare: int = 0
    empty: int = 0
    _pending: dict[str, InputRecord] = field(default_factory=dict)
    _code: int = 0

    def run(self, limit: int) -> int:
        """Run every request, at most `limit` of them in progress; returns the exit code.

        After an error that stops the run, requests in progress are finished and written; no others
        are begun.
        """
        while True:
            while not self.requests.ended and len(self._pending) < limit:
                item = self.requests.take(wait=not self._pending)
                if item is None:
                    break
                self._begin(item)
            if not self._pending:
                return self._code
            for output in self.engine.step():
                if output.finished:
                    request = self._pending.pop(output.request_id)
                    if output.error is None:
                        if isinstance(request.prompt, str):
                            self.bare += len(output.outputs)
                            self.empty += sum(not one.text.strip() for one in output.outputs)
                        self._write(result_record(request, output))
                    else:
                        self._fail(request, output.error, result_record(request, output), code=1)

    def _begin(self, item: InputRecord | LineError) -> None:
        if isinstance(item, LineError):
            self._fail(item, item.reason, error_record(item.line, None, item.reason), code=2)
            return
        with value_errors():
            done = self.done.has(item)
        if done:
            return
        params = item.params
        if params.needs_calibration and self.target is not None:
            params = replace(params, target_reward=self.target)
        try:
            self.engine.add_request(str(item.line), item.prompt, params)
        except (ValueError, TypeError) as error:
            self._fail(item, str(error), error_record(item.line, item, str(error)), code=2)
        else:
            self._pending[str(item.line)] = item

    def _write(self, record: dict[str, Any]) -> None:
        try:
            write_record(self.stream, record)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise WriteError(error.strerror) from error
        self.written += 1
        self.bar.update()

    def _fail(
        self, item: InputRecord | LineError, reason: str, record: dict[str, Any], code: int
    ) -> None:
        if self.record_errors:
            self.failed += 1
            self._write(record)
            return
        self.requests.stop()
        self._code = self._code or code
        rest = len(self._pending)
        with self.bar.external_write_mode(file=sys.stderr):
            say(f"input line {item.line}: {reason}")
            if rest:
                say(f"finishing what is in progress, {rest} requests; Ctrl-C stops now")
