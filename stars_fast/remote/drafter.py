"""The draft phase of a round, by calls: the rows are drawn at the server, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import dataclass, replace

import numpy as np

from stars_fast import _core
from stars_fast.drafting.base import Draft, RowSampling
from stars_fast.engine.requests import Request
from stars_fast.params import StarsParams
from stars_fast.remote.completions import Choice, Completions
from stars_fast.remote.history import Drawn, History
from stars_fast.remote.http import RemoteError
from stars_fast.seeds import derive_seed
from stars_fast.text.decoders import HALF_CHARACTER

#: Bytes of a character in UTF-8 but the first, and so tokens that complete it at most.
_MORE_TOKENS = 3
#: Servers take seeds of 32 bits, some with a sign.
_SEED_BITS = 31


@dataclass(frozen=True)
class Call:
    """A call to be made: the rows that it draws, all of one request and one response."""

    rows: tuple[int, ...]
    request: Request
    prompt: str | list[int]
    position: int
    wanted: int
    seed: int | None
    completes: bool  # a character that the segment ends within


class RemoteDrafter:
    """Draws segments at a server; a `Drafter`.

    Parameters
    ----------
    completions
        Makes the calls.
    history
        What they continue.
    request_of
        The request of a response's handle.
    max_concurrency
        Calls under way at once.
    seeded
        Every call gets a seed. Otherwise one call draws all candidates of a response, but for
        requests that have a seed.
    """

    def __init__(
        self,
        completions: Completions,
        history: History,
        request_of: Callable[[int], Request],
        *,
        max_concurrency: int,
        seeded: bool,
    ) -> None:
        self._completions = completions
        self._history = history
        self._request_of = request_of
        self._seeded = seeded
        self._threads = futures.ThreadPoolExecutor(max_concurrency, "stars-fast-call")
        #: Segments that lost bytes of a character which further tokens did not complete.
        self.cut_characters = 0

    def draft(self, plan: _core.Plan, sampling: Sequence[RowSampling]) -> Draft:
        """Draw the segments of a plan; a call that fails is an error of its rows alone."""
        wanted = plan.draft.new_lengths.tolist()
        tokens = np.zeros((len(wanted), plan.draft.max_new), np.int64)
        lengths = np.ones(len(wanted), np.int32)
        stopped = np.zeros(len(wanted), np.bool_)
        errors: dict[int, str] = {}
        calls = self._calls(plan, wanted)
        running = [self._threads.submit(self._draw, call) for call in calls]
        try:
            for call, answer in zip(calls, running, strict=True):
                try:
                    drawn = self._segments(call, answer.result())
                except RemoteError as error:
                    errors |= dict.fromkeys(call.rows, str(error))
                    continue
                for row, segment in zip(call.rows, drawn, strict=True):
                    lengths[row] = len(segment.token_ids)
                    tokens[row, : lengths[row]] = segment.token_ids
                    stopped[row] = segment.stopped
        except BaseException:
            for answer in running:
                answer.cancel()
            raise
        return Draft(
            tokens=tokens,
            lengths=lengths,
            stopped=stopped,
            logprobs=np.zeros(tokens.shape, np.float32),
            nan_step=np.full(len(wanted), -1, np.int64),
            steps=len(calls),
            errors=errors,
        )

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _calls(self, plan: _core.Plan, wanted: Sequence[int]) -> list[Call]:
        """Return the calls of a plan, one for each row or for each response."""
        seeds = plan.seed.view(np.uint64).tolist()
        positions = plan.position.tolist()
        draws = list(
            zip(seeds, positions, plan.attempt.tolist(), plan.stream.tolist(), strict=True)
        )
        shared: dict[int, list[int]] = {}
        calls = []
        for row, handle in enumerate(plan.request.tolist()):
            request = self._request_of(handle)
            if not self._seeded and request.params.seed is None:
                shared.setdefault(handle, []).append(row)
            else:
                seed = call_seed(*draws[row])
                calls.append(self._call(handle, request, (row,), wanted, positions, seed))
        for handle, rows in shared.items():
            request = self._request_of(handle)
            calls.append(self._call(handle, request, tuple(rows), wanted, positions, None))
        return calls

    def _call(
        self,
        handle: int,
        request: Request,
        rows: tuple[int, ...],
        wanted: Sequence[int],
        positions: Sequence[int],
        seed: int | None,
    ) -> Call:
        response = next(r for r in request.responses if r.handle == handle)
        prompt = self._history.prompt(request.prompt, response.output.token_ids)
        position, length = positions[rows[0]], wanted[rows[0]]
        goes_on = position + length < request.params.max_tokens
        completes = isinstance(prompt, str) and goes_on
        return Call(rows, request, prompt, position, length, seed, completes)

    def _draw(self, call: Call) -> list[Choice]:
        choices = self._once(call, call.wanted)
        if call.completes and _is_cut(choices[0]):
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
        params: StarsParams = call.request.params
        return self._completions.draw(
            call.prompt,
            params,
            max_tokens,
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


def call_seed(seed: int, position: int, attempt: int, stream: int) -> int:
    """Return the seed that a call is sent with: of 31 bits, fixed by what the call is for.

    Parameters
    ----------
    seed
        Seed of the response.
    position
        Tokens of the response before the segment.
    attempt
        Number of the attempt.
    stream
        Stream of the draws, see csrc/philox.h.
    """
    for part in (position, attempt, stream):
        seed = derive_seed(seed, 1 + part)
    return seed >> (64 - _SEED_BITS)


def _is_cut(choice: Choice) -> bool:
    return choice.finish == "length" and choice.text.endswith(HALF_CHARACTER)
