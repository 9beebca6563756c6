"""Causal models that judge, scored incrementally on paged KV.

Each request owns one cached sequence, the committed text. A job forks it where its own ids
first differ, and only the ids from there on are run; the ids behind the response (the suffix of a
chat template) are run with it and never kept. What requests of one prompt have in common is run for
one of them, and its pages are shared with the others. All of this is only cached: what is dropped
to make room is computed again when it is next needed, with the same rewards. A `Reading` turns
hidden states into a reward.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from stars_fast._core import Batch, OutOfPagesError, SequenceCache
from stars_fast.errors import RewardError
from stars_fast.models.paged import PagedModel
from stars_fast.rewards.base import (
    KnownRewards,
    Prompt,
    PromptRewards,
    ScoreJob,
    Scorer,
    finite_reward,
)
from stars_fast.rewards.reading import Cut, Reading
from stars_fast.rewards.tokens import Ids, TokenPrompt, TokenSource, common_length

__all__ = ["CausalScorer"]

NO_PAGES = -1


@dataclass(slots=True)
class _Branch:
    """A scored candidate: its ids, of which the first `keep` stay if it is accepted."""

    ids: Ids
    keep: int
    start: int  # ids before this one are read from the committed sequence
    row: int  # the cache's id for the new ones, NO_PAGES once they were dropped to make room


@dataclass(slots=True)
class _Request:
    prompt: TokenPrompt
    committed: Ids  # what the cached sequence should hold; it may hold less
    same_prompt: dict[int, None]  # the requests that began with the same prompt, itself among them
    hole: int | None = None  # ids that the cached sequence has before its hole
    kept: int | None = None
    branches: dict[int, _Branch] = field(default_factory=dict)


@dataclass(slots=True)
class _Row:
    """One job on its way through the model."""

    place: int  # in the list of results
    request: int
    branch: int
    cut: Cut
    is_prompt: bool  # r(x)
    start: int = 0
    row: int = NO_PAGES

    @property
    def ids(self) -> Ids:
        """What is run of it, cached or not."""
        return self.cut.ids

    @property
    def new(self) -> int:
        """How many of them are run."""
        return len(self.ids) - self.start


class CausalScorer(Scorer):
    """A sequence classifier on a causal backbone, or a language model that judges.

    Requests whose prompts have the same ids share the pages of the prompt, and after a `fork` those
    of committed text.

    When the pool is short, the committed caches of requests that are not being scored go first,
    least recently used first, then the caches of candidates already scored, oldest first, then the
    jobs are split over several forward passes.

    Numbers that are not finite in one candidate's hidden states may make the rewards of its
    request's other candidates of that pass errors too, never those of another request.

    Parameters
    ----------
    model : PagedModel
        Its `extend_all` returns the hidden states.
    reading : Reading
        Which hidden states are read, and how.
    source : TokenSource
        How prompts and jobs become ids.
    num_pages, page_size : int
        The pool's, as given to `model`.
    max_rows : int
        Most rows of one forward pass.
    max_batch_tokens : int
        Most new tokens of one forward pass, padding counted; a longer prompt is run in pieces, a
        longer row alone.
    """

    def __init__(
        self,
        model: PagedModel,
        reading: Reading,
        source: TokenSource,
        *,
        num_pages: int,
        page_size: int,
        max_rows: int = 256,
        max_batch_tokens: int = 8192,
    ) -> None:
        self._model = model
        self.module = model.model
        self._reading = reading
        self._source = source
        self.needs_text = source.needs_text
        self.device = model.device
        self._context = model.max_length
        self._max_rows = max_rows
        self._max_batch_tokens = max_batch_tokens
        self._cache = SequenceCache(num_pages=num_pages, page_size=page_size)
        self._pool_tokens = (num_pages - 1) * page_size  # page 0 is scratch
        self._requests: dict[int, _Request] = {}
        self._same_prompt: dict[bytes, dict[int, None]] = {}  # by the ids of their prompt
        self._prompt_rewards = PromptRewards()
        self._known = KnownRewards()
        # Requests that hold pages and branches that do, the longest unused first.
        self._resident: OrderedDict[int, None] = OrderedDict()
        self._loose: OrderedDict[int, _Branch] = OrderedDict()
        self._busy: frozenset[int] = frozenset()
        self._next_row = 0
        self._counts = dict.fromkeys(("rm_jobs", "rm_calls", "rm_tokens", "rm_evictions"), 0)
        self._tokens: Counter[int] = Counter()  # by request, until they are taken

    def start(self, request: int, prompt: Prompt, max_response_tokens: int) -> None:
        """Admit a request; see `Scorer.start`."""
        bound = self._source.bind(prompt)
        self._check_length(
            len(bound.empty_ids) + max_response_tokens,
            f"the prompt has {len(bound.empty_ids)} tokens {self._reading.form} and up to "
            f"{max_response_tokens} follow",
        )
        self._cache.open(request)
        prefix = bound.empty_ids[: self._reading.prefix(bound)]
        self._known.start(request, prefix.tobytes())
        same_prompt = self._same_prompt.setdefault(prefix.tobytes(), {})
        same_prompt[request] = None
        self._requests[request] = _Request(bound, prefix, same_prompt)

    def score(self, jobs: Sequence[ScoreJob]) -> list[float | Exception]:
        """Run what is new of each job; see `Scorer.score`."""
        self._counts["rm_jobs"] += len(jobs)
        results: list[float | Exception] = [RewardError("not scored")] * len(jobs)
        prompts = [self._requests[job.request].prompt for job in jobs]
        rows: list[_Row] = []
        prompt_places: dict[bytes, list[int]] = {}
        for place, (job, ids) in enumerate(
            zip(jobs, self._source.encode(prompts, jobs), strict=True)
        ):
            if isinstance(ids, Exception):
                results[place] = ids
                continue
            committed = self._requests[job.request].committed
            cut = self._reading.cut(ids, prompts[place], committed)
            if not isinstance(cut, Cut):
                results[place] = cut
                continue
            try:
                self._check_length(len(cut.ids), f"the text has {len(cut.ids)} tokens")
            except ValueError as error:
                results[place] = error
                continue
            row = _Row(place, job.request, job.branch, cut, not job.response_ids)
            if row.is_prompt:
                key = row.ids.tobytes()
                known = self._prompt_rewards.get(key)
                if known is not None:
                    results[place] = known
                    continue
                prompt_places.setdefault(key, []).append(place)
                if len(prompt_places[key]) > 1:
                    continue
            rows.append(row)

        def run(numbers: list[int]) -> list[float | Exception]:
            self._run_all([rows[number] for number in numbers], results)
            return [results[rows[number].place] for number in numbers]

        inputs = [(row.request, row.cut.read) for row in rows]
        for row, reward in zip(rows, self._known.score(inputs, run), strict=True):
            results[row.place] = reward
            if row.row == NO_PAGES and not isinstance(reward, Exception) and not row.is_prompt:
                # Its equal has been run: what it holds is computed if it is accepted.
                branch = _Branch(row.ids, row.cut.keep, 0, NO_PAGES)
                self._requests[row.request].branches[row.branch] = branch

        for key, places in prompt_places.items():
            self._prompt_rewards.put(key, results[places[0]])
            for place in places[1:]:
                results[place] = results[places[0]]
        return results

    def _run_all(self, rows: list[_Row], results: list[float | Exception]) -> None:
        """Score rows, in as many passes as they take."""
        self._busy = frozenset(row.request for row in rows)
        for request in self._busy & self._resident.keys():
            self._resident.move_to_end(request)
        for chunk in self._chunks(rows):
            self._run(chunk, results)
        self._busy = frozenset()

    def keep(self, request: int, branch: int) -> None:
        """Retain a branch; see `Scorer.keep`."""
        state = self._requests[request]
        if state.kept is not None and state.kept != branch:
            self._drop(state, state.kept)
        state.kept = branch

    def accept(self, request: int, branch: int) -> None:
        """Append a branch to the cached sequence; see `Scorer.accept`.

        The branch of r(x) has nothing to append, nor has one that was not scored.
        """
        state = self._requests[request]
        winner = state.branches.get(branch)
        for other in [other for other in state.branches if other != branch]:
            self._drop(state, other)
        state.kept = None
        if winner is None:
            return
        del state.branches[branch]
        if winner.row != NO_PAGES:
            del self._loose[winner.row]
            self._cache.promote(winner.row, max(winner.keep - winner.start, 0))
            self._cut_hole(state, winner.start)
        state.committed = winner.ids[: winner.keep]
        cached = self._cache.common_prefix(request, state.committed)
        if cached < self._cache.length(request):
            self._truncate(request, cached)

    def fork(self, source: int, target: int) -> None:
        """Share the committed pages of another request; see `Scorer.fork`."""
        theirs, mine = self._requests[source], self._requests[target]
        for branch in list(mine.branches):
            self._drop(mine, branch)
        mine.kept = None
        mine.committed = theirs.committed
        self._copy(source, target)

    def prune(self, request: int) -> None:
        """Drop every branch but the kept one."""
        state = self._requests[request]
        for branch in [branch for branch in state.branches if branch != state.kept]:
            self._drop(state, branch)

    def finish(self, request: int) -> None:
        """Forget the request and free its pages."""
        state = self._requests.pop(request, None)
        if state is None:
            return
        for branch in list(state.branches):
            self._drop(state, branch)
        self._cache.close(request)
        self._resident.pop(request, None)
        self._known.finish(request)
        del state.same_prompt[request]
        if not state.same_prompt:
            prompt = state.prompt
            del self._same_prompt[prompt.empty_ids[: self._reading.prefix(prompt)].tobytes()]

    def take_tokens(self) -> dict[int, int]:
        """Return the tokens run for each request; see `Scorer.take_tokens`."""
        taken, self._tokens = self._tokens, Counter()
        return taken

    def stats(self) -> dict[str, int]:
        """Return the counters of `Scorer.stats`, evictions, the pool's pages, bytes copied."""
        return {
            **self._counts,
            "rm_pages_used": self._cache.pages_used,
            "rm_pages_free": self._cache.pages_free,
            "rm_copied_bytes": self._model.copied_bytes,
        }

    def _check_length(self, tokens: int, what: str) -> None:
        whose, shorten = self._reading.whose, self._reading.shorten
        if self._context is not None and tokens > self._context:
            raise ValueError(
                f"{what}: more than {whose}'s context of {self._context} tokens; shorten "
                f"{shorten} or lower max_tokens"
            )
        if tokens > self._pool_tokens:
            raise ValueError(
                f"{what}: more than {whose}'s cache of {self._pool_tokens} tokens; raise "
                f"num_pages, shorten {shorten} or lower max_tokens"
            )

    def _chunks(self, rows: list[_Row]) -> Iterator[list[_Row]]:
        """Cut the rows into forward passes: requests kept together, like lengths side by side."""
        longest: dict[int, int] = {}
        for row in rows:
            new = len(row.ids) - max(self._fork_point(row), self._restorable(row))
            longest[row.request] = max(longest.get(row.request, 1), new)
        chunk: list[_Row] = []
        for row in sorted(rows, key=lambda row: (longest[row.request], row.request)):
            padded = (len(chunk) + 1) * longest[row.request]
            if chunk and (len(chunk) == self._max_rows or padded > self._max_batch_tokens):
                yield chunk
                chunk = []
            chunk.append(row)
        if chunk:
            yield chunk

    def _fork_point(self, row: _Row) -> int:
        # The last token is run even if it is cached: its hidden state is not.
        return min(self._cache.common_prefix(row.request, row.ids), len(row.ids) - 1)

    def _run(self, rows: list[_Row], results: list[float | Exception]) -> None:
        """Score rows, in several passes if their pages do not fit at once."""
        protected = frozenset(row.request for row in rows)
        self._restore(rows, protected)
        hidden = self._forward(rows, protected)
        if isinstance(hidden, OutOfPagesError) and len(rows) > 1:
            self._run(rows[: len(rows) // 2], results)
            self._run(rows[len(rows) // 2 :], results)
            return
        if isinstance(hidden, OutOfPagesError):
            self._evict(rows[0].request)
            hidden = self._forward(rows, protected)
        assert not isinstance(hidden, OutOfPagesError)  # any text that passed the length check fits
        rewards = hidden if isinstance(hidden, RewardError) else self._read(rows, hidden)
        if isinstance(rewards, RewardError):
            for row in rows:
                results[row.place] = rewards
            return
        for row, reward in zip(rows, rewards, strict=True):
            results[row.place] = finite_reward(reward)
            self._settle(row)

    def _read(self, rows: list[_Row], hidden: torch.Tensor) -> list[float] | RewardError:
        """Return the rewards of rows that have run, from the hidden states [T, hidden]."""
        ends = np.cumsum([row.new for row in rows])
        places = np.concatenate(
            [
                np.arange(end - (len(row.ids) - row.cut.first), end)
                for row, end in zip(rows, ends, strict=True)
            ]
        )
        try:
            with torch.inference_mode():
                read = hidden.index_select(0, torch.from_numpy(places).to(hidden.device))
                return self._reading.values(read, [row.cut for row in rows])
        except Exception as error:  # noqa: BLE001 - one bad pass must not end other requests
            return self._failed(rows, error)

    def _settle(self, row: _Row) -> None:
        """File a row that was run among its request's branches; r(x) leaves the prompt behind."""
        state = self._requests[row.request]
        if row.is_prompt:
            if self._cache.length(row.request) == 0 and not state.branches:
                self._cache.promote(row.row, min(row.cut.keep, len(state.committed)))
                self._seal(row.request)
            else:
                self._cache.drop(row.row)
            return
        self._drop(state, row.branch)
        branch = _Branch(row.ids, row.cut.keep, row.start, row.row)
        state.branches[row.branch] = branch
        self._loose[row.row] = branch

    def _restore(self, rows: list[_Row], protected: frozenset[int]) -> None:
        """Cache what the rows of each request are known to share and the cache lacks.

        That is the prompt on first use, and committed text that was dropped to make room. What
        another request holds is shared with it, what several lack is run for one of them. A prompt
        that is about to be scored by itself needs no pass of its own.
        """
        self._share(self._targets(rows, self._shared))
        missing = self._targets(rows, self._restorable)
        for request in missing:
            state = self._requests[request]
            for branch in state.branches.values():
                self._release(branch)
        self._share(missing)
        while missing:
            pieces = list(self._pieces(missing))
            hidden = self._forward(pieces, protected)
            if isinstance(hidden, OutOfPagesError) and len(pieces) > 1:
                del missing[pieces[-1].request]
                continue
            if isinstance(hidden, Exception):
                return  # the rows will run without a common prefix, or fail in their place
            for piece in pieces:
                self._cache.promote(piece.row, piece.new)
                if len(piece.ids) == missing[piece.request]:
                    del missing[piece.request]
                    self._seal(piece.request)
            self._share(missing)

    def _targets(self, rows: list[_Row], shared: Callable[[_Row], int]) -> dict[int, int]:
        """Return what each request's rows have in common, of the requests that do not hold it."""
        targets: dict[int, int] = {}
        for row in rows:
            ids = shared(row)
            targets[row.request] = min(targets.get(row.request, ids), ids)
        return {
            request: target
            for request, target in targets.items()
            if target > self._cache.length(request)
        }

    def _shared(self, row: _Row) -> int:
        """Return how many ids of the row are committed; 0: none that are not cached."""
        committed = self._requests[row.request].committed
        if self._cache.length(row.request) >= len(committed):
            return 0
        return common_length(row.ids, committed)

    def _restorable(self, row: _Row) -> int:
        """Return how many ids of the row `_restore` caches if they are not; 0: none are missing."""
        cached = self._cache.length(row.request)
        alone = row.is_prompt and cached == 0 and len(row.ids) <= self._max_batch_tokens
        return 0 if alone else self._shared(row)

    def _share(self, missing: dict[int, int]) -> None:
        """Give each request what another of its prompt holds; whoever is content leaves `missing`.

        One whose candidates hold pages is passed over.
        """
        holders: dict[int, list[int]] = {}  # of a prompt, by the first of its requests
        for request, target in list(missing.items()):
            state = self._requests[request]
            if any(branch.row != NO_PAGES for branch in state.branches.values()):
                continue
            most, source = self._cache.length(request), request
            first = next(iter(state.same_prompt))
            if first not in holders:
                holders[first] = [twin for twin in state.same_prompt if self._cache.length(twin)]
            for twin in holders[first]:
                held = self._cache.common_prefix(twin, state.committed[:target])
                if held > most:
                    most, source = held, twin
                if most == target:
                    break
            if source != request:
                self._copy(source, request)
                self._truncate(request, most)
            if most == target:
                del missing[request]
                self._seal(request)

    def _pieces(self, missing: dict[int, int]) -> Iterator[_Row]:
        """Yield the next piece of each missing prefix, as far as one forward pass goes."""
        width = 0
        count = 0
        leading: dict[int, Ids] = {}  # of the requests of a prompt, by the first of them
        for request, target in missing.items():
            state = self._requests[request]
            cached = self._cache.length(request)
            first = next(iter(state.same_prompt))
            if first in leading and common_length(leading[first], state.committed) > cached:
                continue  # gets it from the one that runs it
            end = min(target, cached + self._max_batch_tokens)
            width = max(width, end - cached)
            count += 1
            if count > 1 and count * width > self._max_batch_tokens:
                return
            ids = state.committed[:end]
            leading.setdefault(first, ids)
            yield _Row(-1, request, -1, Cut(ids, end, end, ids[:0]), False)

    def _copy(self, source: int, target: int) -> None:
        """Let `target`, whose branches have no pages, hold what `source` does."""
        self._cache.copy(source, target)
        self._requests[target].hole = self._requests[source].hole
        self._resident.pop(target, None)
        if self._cache.length(target):
            self._resident[target] = None

    def _truncate(self, request: int, length: int) -> None:
        self._cache.truncate(request, length)
        self._cut_hole(self._requests[request], length)

    def _cut_hole(self, state: _Request, length: int) -> None:
        """Note that the ids from `length` on were dropped, and a hole that lay behind them."""
        if state.hole is not None and length < state.hole:
            state.hole = None

    def _seal(self, request: int) -> None:
        state = self._requests[request]
        if state.hole is None:
            self._cache.seal_prompt(request)
            state.hole = self._cache.length(request)

    def _forward(
        self, rows: list[_Row], protected: frozenset[int]
    ) -> torch.Tensor | OutOfPagesError | RewardError:
        """Fork the rows, put in order, and run what is new; its hidden states [T, hidden].

        To make room, nothing of the protected requests is given up but candidates already scored.
        """
        forked = self._fork(rows)
        while isinstance(forked, OutOfPagesError) and self._free(protected):
            forked = self._fork(rows)
        if isinstance(forked, OutOfPagesError):
            return forked
        batch, token_ids = forked
        copies = self._cache.take_copies()
        if len(copies[0]):
            self._model.copy_pages(*copies)
        self._counts["rm_calls"] += 1
        self._counts["rm_tokens"] += len(token_ids)
        for row in rows:
            self._tokens[row.request] += row.new
        try:
            ids = torch.from_numpy(token_ids).to(self._model.device)
            return self._model.extend_all(batch, ids)
        except Exception as error:  # noqa: BLE001 - one bad pass must not end other requests
            return self._failed(rows, error)

    def _failed(self, rows: list[_Row], error: Exception) -> RewardError:
        """Drop the rows of a pass that raised; the error to put in their place."""
        for row in rows:
            self._cache.drop(row.row)
        failure = RewardError(f"{self._reading.whose} failed: {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure

    def _fork(self, rows: list[_Row]) -> tuple[Batch, Ids] | OutOfPagesError:
        """Order the rows and give each its pages; the batch and its new ids [T]."""
        for row in rows:
            row.start = self._fork_point(row)
            row.row = self._next_row
            self._next_row += 1
        rows.sort(key=lambda row: (row.request, row.start))  # neighbours share a prefix
        token_ids = np.concatenate([row.ids[row.start :] for row in rows])
        try:
            batch = self._cache.branch(
                _int64([row.request for row in rows]),
                _int64([row.row for row in rows]),
                _int32([row.start for row in rows]),
                token_ids,
                _int32([row.new for row in rows]),
            )
        except OutOfPagesError as error:
            return error
        for row in rows:
            self._resident.setdefault(row.request)
        return batch, token_ids

    def _free(self, protected: frozenset[int]) -> bool:
        """Give up one cache to make room; False if nothing is left but the protected ones."""
        idle = next(iter(self._resident), None)
        if idle is not None and idle not in self._busy:
            self._evict(idle)
            return True
        if self._loose:
            self._release(next(iter(self._loose.values())))
            return True
        other = next((request for request in self._resident if request not in protected), None)
        if other is None:
            return False
        self._evict(other)
        return True

    def _evict(self, request: int) -> None:
        """Drop every page of a request; what it holds will be computed again."""
        state = self._requests[request]
        for branch in state.branches.values():
            self._release(branch)
        self._cache.close(request)
        self._cache.open(request)
        state.hole = None
        self._resident.pop(request, None)
        self._counts["rm_evictions"] += 1

    def _drop(self, state: _Request, branch: int) -> None:
        dropped = state.branches.pop(branch, None)
        if dropped is not None:
            self._release(dropped)

    def _release(self, branch: _Branch) -> None:
        """Give up a branch's pages; what it holds will be computed again if it is accepted."""
        if branch.row != NO_PAGES:
            del self._loose[branch.row]
            self._cache.drop(branch.row)
            branch.row = NO_PAGES


def _int64(values: list[int]) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def _int32(values: list[int]) -> NDArray[np.int32]:
    return np.array(values, dtype=np.int32)
