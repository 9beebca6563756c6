"""The draft phase of a round, by calls: segments are drawn by another engine, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from stars_fast import _core
from stars_fast.drafting.base import Draft, RowSampling
from stars_fast.engine.requests import Request
from stars_fast.rewards.base import Prompt
from stars_fast.seeds import derive_seed

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

    @property
    def is_last(self) -> bool:
        """Whether the response has no room for tokens behind this segment."""
        return self.position + self.wanted >= self.request.params.max_tokens


@dataclass(frozen=True)
class Drawn:
    """A segment as the rounds take it.

    Attributes
    ----------
    token_ids
        1 to as many as were wanted.
    stopped
        The last of them ends the response.
    logprobs
        Of each token under the raw distribution; empty where they are not known.
    top_logprobs
        Of the most likely tokens at each place, the likeliest first, as many at each; empty where
        nobody asked.
    """

    token_ids: list[int]
    stopped: bool
    logprobs: Sequence[float] = ()
    top_logprobs: Sequence[Mapping[int, float]] = ()


class Caller(Protocol):
    """Makes the calls of a round."""

    def run(self, calls: Sequence[Call]) -> Iterable[list[Drawn] | Exception]:
        """Give what each call drew, a segment for each of its rows, or why it drew nothing."""
        ...

    def interrupt(self, request_id: str) -> None:
        """Let calls of a request that are under way fail at once, if it can be; from any thread."""
        ...

    def close(self) -> None:
        """Make no more calls."""
        ...


class CallDrafter:
    """Draws segments by calls; a `Drafter`.

    Parameters
    ----------
    caller
        Makes the calls.
    prompt_of
        What a call continues: from the prompt and the tokens that are committed.
    request_of
        The request of a response's handle.
    seeded
        Every call gets a seed. Otherwise one call draws all candidates of a response, but for
        requests that have a seed.
    """

    def __init__(
        self,
        caller: Caller,
        prompt_of: Callable[[Prompt, list[int]], str | list[int]],
        request_of: Callable[[int], Request],
        *,
        seeded: bool,
    ) -> None:
        self._caller = caller
        self._prompt_of = prompt_of
        self._request_of = request_of
        self._seeded = seeded

    def draft(self, plan: _core.Plan, sampling: Sequence[RowSampling]) -> Draft:
        """Draw the segments of a plan; a call that fails is an error of its rows alone."""
        wanted = plan.draft.new_lengths.tolist()
        shape = (len(wanted), plan.draft.max_new)
        top = max(one.top_logprobs for one in sampling)
        tokens, logprobs = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        top_tokens, top_logprobs = np.zeros((*shape, top), np.int64), np.zeros((*shape, top), "f4")
        lengths = np.ones(len(wanted), np.int32)
        stopped = np.zeros(len(wanted), np.bool_)
        errors: dict[int, str] = {}
        calls = self._calls(plan, wanted)
        for call, drawn in zip(calls, self._caller.run(calls), strict=True):
            if isinstance(drawn, Exception):
                errors |= dict.fromkeys(call.rows, str(drawn))
                continue
            for row, segment in zip(call.rows, drawn, strict=True):
                length = lengths[row] = len(segment.token_ids)
                tokens[row, :length] = segment.token_ids
                stopped[row] = segment.stopped
                if segment.logprobs:
                    logprobs[row, :length] = segment.logprobs
                for place, likely in enumerate(segment.top_logprobs):
                    top_tokens[row, place, : len(likely)] = [*likely]
                    top_logprobs[row, place, : len(likely)] = [*likely.values()]
        return Draft(
            tokens=tokens,
            lengths=lengths,
            stopped=stopped,
            logprobs=logprobs,
            nan_step=np.full(len(wanted), -1, np.int64),
            steps=len(calls),
            errors=errors,
            top_tokens=top_tokens if top else None,
            top_logprobs=top_logprobs if top else None,
        )

    def interrupt(self, request_id: str) -> None:
        """Let calls of a request fail at once, if that can be done; from any thread."""
        self._caller.interrupt(request_id)

    def close(self) -> None:
        """Make no more calls."""
        self._caller.close()

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
        prompt = self._prompt_of(request.prompt, response.output.token_ids)
        return Call(rows, request, prompt, positions[rows[0]], wanted[rows[0]], seed)


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
