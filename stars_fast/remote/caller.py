"""Calls to a server, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent import futures
from dataclasses import replace

from stars_fast.remote.calls import Call, Drawn
from stars_fast.remote.completions import Choice, Route
from stars_fast.remote.history import History
from stars_fast.remote.http import RemoteError
from stars_fast.text.decoders import HALF_CHARACTER

#: Bytes of a character in UTF-8 but the first, and so tokens that complete it at most.
_MORE_TOKENS = 3


class CompletionsCaller:
    """Draws segments at a server; a `Caller`.

    Parameters
    ----------
    route
        Makes one call.
    history
        Makes segments of what it returns.
    max_concurrency
        Calls under way at once.
    """

    def __init__(self, route: Route, history: History, *, max_concurrency: int) -> None:
        self._route = route
        self._history = history
        self._threads = futures.ThreadPoolExecutor(max_concurrency, "stars-fast-call")
        #: Segments that lost bytes of a character which further tokens did not complete.
        self.cut_characters = 0

    def run(self, calls: Sequence[Call]) -> Iterator[list[Drawn] | Exception]:
        """Make calls, see `Caller`."""
        running = [self._threads.submit(self._draw, call) for call in calls]
        try:
            for call, answer in zip(calls, running, strict=True):
                try:
                    yield self._segments(call, answer.result())
                except RemoteError as error:
                    yield error
        finally:
            for answer in running:
                answer.cancel()

    def interrupt(self, request_id: str) -> None:
        """Do nothing: a call under way is waited for."""

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _draw(self, call: Call) -> list[Choice]:
        choices = self._once(call, call.wanted)
        if isinstance(call.prompt, str) and not call.is_last and _is_cut(choices[0]):
            return [self._completed(call, choices[0])]
        return choices

    def _completed(self, call: Call, cut: Choice) -> Choice:
        """Return a segment with the rest of its last character.

        The bytes of half a character cannot be sent back as text. With the same seed the server
        draws the same tokens and more, so nothing is chosen by what it happens to end with.
        """
        for more in range(1, _MORE_TOKENS + 1):
            (choice,) = self._once(call, call.wanted + more)
            if not _is_cut(choice):
                return choice
        self.cut_characters += 1
        return replace(cut, text=cut.text.rstrip(HALF_CHARACTER))

    def _once(self, call: Call, max_tokens: int) -> list[Choice]:
        return self._route.draw(
            call.prompt,
            call.request.params,
            max_tokens,
            request_id=call.request.request_id,
            n=len(call.rows),
            seed=call.seed,
            position=call.position,
        )

    def _segments(self, call: Call, choices: Sequence[Choice]) -> list[Drawn]:
        request = call.request
        return [
            self._history.segment(request.request_id, request.params, choice, call.wanted)
            for choice in choices
        ]


def _is_cut(choice: Choice) -> bool:
    return choice.finish == "length" and choice.text.endswith(HALF_CHARACTER)
