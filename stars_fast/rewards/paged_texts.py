"""Texts on the pages of a paged model: one committed text for each request, and its candidates.

Every cache is only that: whatever is dropped to make room is computed again when it is next needed.
What requests of one prompt have in common is run for one of them, and its pages are shared with the
others.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np
import torch

from stars_fast._core import Batch, OutOfPagesError, SequenceCache
from stars_fast.errors import RewardError
from stars_fast.models.images import ImageRows, SeenPrompt
from stars_fast.models.paged import PagedModel
from stars_fast.rewards.reading import Cut, Digests
from stars_fast.rewards.split_ids import Ids, common_length

NO_PAGES = -1


@dataclass(slots=True)
class _Request:
    prefix: Ids  # what its prompt has in common with others'
    committed: Ids  # what the cached sequence should hold; it may hold less
    digests: Digests  # of texts that begin with that
    same_prompt: dict[int, None]  # the requests that began with the same prompt, and itself
    marks: tuple[int, ...]  # of the ids of its prompt, of whose hidden states something is kept
    marked: dict[bytes, torch.Tensor]  # what is kept [D], by ids up to the mark; shared
    padding: int | None = None  # ids that the cached sequence has before its padding
    kept: int | None = None
    branches: dict[int, Row] = field(default_factory=dict)  # scored candidates


@dataclass(slots=True)
class Row:
    """One job on its way through the model, and what is left of it until it is accepted."""

    place: int  # in the list of results
    request: int
    branch: int
    cut: Cut
    is_prompt: bool  # r(x)
    start: int = 0  # ids before this one are read from the committed sequence
    row: int = NO_PAGES  # the cache's id for the new ones, until they are dropped to make room

    @property
    def ids(self) -> Ids:
        """What is run of it, cached or not."""
        return self.cut.ids

    @property
    def new(self) -> int:
        """How many of them are run."""
        return self.cut.length - self.start


class PagedTexts:
    """Committed texts and candidates on pages, and the forward passes that fill them.

    When the pool is short, the committed caches of requests that are not `busy` go first, least
    recently used first, then the caches of candidates already scored, oldest first.

    Parameters
    ----------
    model : PagedModel
        Its `extend_all` returns the hidden states.
    num_pages, page_size : int
        The pool's, as given to `model`.
    max_batch_tokens : int
        Most new tokens of a pass that only fills the cache.
    whose : str
        What the model is called in errors.
    kept : callable
        What is kept of hidden states at marks, see `Reading.kept`.

    Attributes
    ----------
    busy : frozenset of int
        The requests that are being scored.
    calls, num_tokens, evictions : int
        Forward passes, the tokens run in them, and requests that lost their pages.
    tokens : dict
        Tokens run for each request, until they are taken.
    """

    def __init__(
        self,
        model: PagedModel,
        *,
        num_pages: int,
        page_size: int,
        max_batch_tokens: int,
        whose: str,
        kept: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._model = model
        self._whose = whose
        self._kept = kept
        self._max_batch_tokens = max_batch_tokens
        self._cache = SequenceCache(num_pages=num_pages, page_size=page_size)
        self._requests: dict[int, _Request] = {}
        self._seen: dict[int, SeenPrompt] = {}  # of requests whose prompts have images
        self._marking: set[int] = set()  # requests whose prompts have marks
        self._same_prompt: dict[bytes, dict[int, None]] = {}  # by the ids of their prompt
        # Requests that hold pages and branches that do, the longest unused first.
        self._resident: OrderedDict[int, None] = OrderedDict()
        self._loose: OrderedDict[int, Row] = OrderedDict()
        self.busy: frozenset[int] = frozenset()
        self._next_row = 0
        self.calls = 0
        self.num_tokens = 0
        self.evictions = 0
        self.tokens: dict[int, int] = {}

    @property
    def pages_used(self) -> int:
        """Pages of the pool that are in use."""
        return self._cache.pages_used

    @property
    def pages_free(self) -> int:
        """Pages of the pool that are free."""
        return self._cache.pages_free

    def open(self, request: int, prefix: Ids, marks: tuple[int, ...] = ()) -> None:
        """Admit a request, whose committed text begins as `prefix`.

        Something of the hidden states of `marks` is kept when they run, see `marked`.
        """
        self._cache.open(request)
        same_prompt = self._same_prompt.setdefault(prefix.tobytes(), {})
        marked = next((self._requests[other].marked for other in same_prompt), {})
        same_prompt[request] = None
        if marks:
            self._marking.add(request)
        self._requests[request] = _Request(
            prefix, prefix, Digests(prefix), same_prompt, marks, marked
        )

    def see(self, request: int, prompt: SeenPrompt) -> None:
        """Note the images of a request's prompt, which is the beginning of its prefix."""
        self._seen[request] = prompt

    def marked(self, rows: list[Row]) -> list[torch.Tensor]:
        """Return what was kept [D] at each mark of the rows; all have run at some time."""
        return [
            self._requests[row.request].marked[key]
            for row in rows
            if row.cut.marks
            for key in _mark_keys(row.ids, row.cut.marks)
        ]

    def committed(self, request: int) -> Ids:
        """Return the committed text."""
        return self._requests[request].committed

    def digest(self, row: Row) -> bytes:
        """Return 16 bytes that stand for everything that the row's reward depends on."""
        return self._requests[row.request].digests.of(row.cut)

    def touch(self, requests: frozenset[int]) -> None:
        """Make requests `busy`, and the last to lose their pages."""
        self.busy = requests
        for request in requests & self._resident.keys():
            self._resident.move_to_end(request)

    def know(self, row: Row) -> None:
        """File a row that was not run, for its equal was: it is computed if it is accepted."""
        self._requests[row.request].branches[row.branch] = row

    def keep(self, request: int, branch: int) -> None:
        """Retain a branch that lost its test but is the best so far; one kept before is dropped."""
        state = self._requests[request]
        if state.kept is not None and state.kept != branch:
            self._drop(state, state.kept)
        state.kept = branch

    def accept(self, request: int, branch: int) -> None:
        """Append a branch to the committed text, and drop the request's others.

        The branch of r(x) has nothing to append, nor has one that was not scored.
        """
        state = self._requests[request]
        winner = state.branches.pop(branch, None)
        for other in state.branches.values():
            self._release(other)
        state.branches.clear()
        state.kept = None
        if winner is None:
            return
        keep = winner.cut.keep
        state.committed = winner.ids[:keep]
        state.digests = state.digests.grown(state.committed)
        if winner.row == NO_PAGES:
            cached = self._cache.common_prefix(request, state.committed)
        else:
            del self._loose[winner.row]
            self._cache.promote(winner.row, max(keep - winner.start, 0))
            self._cut_padding(state, winner.start)
            cached = keep
        if cached < self._cache.length(request):
            self._truncate(request, cached)

    def fork(self, source: int, target: int) -> None:
        """Share the committed pages of another request of the same prompt."""
        theirs, mine = self._requests[source], self._requests[target]
        for branch in list(mine.branches):
            self._drop(mine, branch)
        mine.kept = None
        mine.committed, mine.digests = theirs.committed, theirs.digests
        self._copy(source, target)

    def prune(self, request: int) -> None:
        """Drop every branch but the kept one."""
        state = self._requests[request]
        for branch in [branch for branch in state.branches if branch != state.kept]:
            self._drop(state, branch)

    def close(self, request: int) -> None:
        """Forget the request and free its pages."""
        state = self._requests.pop(request)
        self._seen.pop(request, None)
        self._marking.discard(request)
        for branch in list(state.branches):
            self._drop(state, branch)
        self._cache.close(request)
        self._resident.pop(request, None)
        del state.same_prompt[request]
        if not state.same_prompt:
            del self._same_prompt[state.prefix.tobytes()]

    def set_starts(self, rows: Sequence[Row]) -> None:
        """Set how many ids of each row are not run."""
        states, length, common = self._requests, self._cache.length, self._cache.common_prefix
        for row in rows:
            request, cut = row.request, row.cut
            # What is cached is what is committed, or the first of it.
            known = cut.shared is states[request].committed
            cached = length(request) if known else common(request, cut.ids)
            # What is read is run even if it is cached: its hidden state is not.
            row.start = min(cached, cut.first)

    def lacking(self, requests: Iterable[int]) -> set[int]:
        """Return the requests of whose committed text the cache lacks some."""
        length, states = self._cache.length, self._requests
        return {request for request in requests if length(request) < len(states[request].committed)}

    def restorable(self, row: Row) -> int:
        """Return how many ids `restore` caches of a row whose request is `lacking`."""
        alone = row.is_prompt and row.cut.length <= self._max_batch_tokens
        return 0 if alone and self._cache.length(row.request) == 0 else self._shared(row)

    def settle(self, rows: list[Row]) -> None:
        """File rows that were run among their requests' branches; r(x) leaves the prompt behind."""
        for row in rows:
            state = self._requests[row.request]
            if not row.is_prompt:
                self._drop(state, row.branch)
                state.branches[row.branch] = self._loose[row.row] = row
            elif self._cache.length(row.request) == 0 and not state.branches:
                self._cache.promote(row.row, min(row.cut.keep, len(state.committed)))
                self._seal(row.request)
            else:
                self._cache.drop(row.row)

    def restore(self, rows: list[Row], protected: frozenset[int]) -> None:
        """Cache what the rows of each request are known to share and the cache lacks.

        That is the prompt on first use, and committed text that was dropped to make room. What
        another request holds is shared with it, what several lack is run for one of them. A prompt
        that is about to be scored by itself needs no pass of its own.
        """
        lacking = self.lacking(protected)
        if not lacking:
            return
        rows = [row for row in rows if row.request in lacking]
        self._share(self._targets(rows, self._shared))
        missing = self._targets(rows, self.restorable)
        for request in missing:
            state = self._requests[request]
            for branch in state.branches.values():
                self._release(branch)
        self._share(missing)
        while missing:
            pieces = list(self._pieces(missing))
            self.set_starts(pieces)
            hidden = self.forward(pieces, protected)
            if isinstance(hidden, OutOfPagesError) and len(pieces) > 1:
                del missing[pieces[-1].request]
                continue
            if isinstance(hidden, Exception):
                return  # the rows will run without a common prefix, or fail in their place
            for piece in pieces:
                self._cache.promote(piece.row, piece.new)
                if piece.cut.length == missing[piece.request]:
                    del missing[piece.request]
                    self._seal(piece.request)
            self._share(missing)

    def _targets(self, rows: list[Row], shared: Callable[[Row], int]) -> dict[int, int]:
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

    def _shared(self, row: Row) -> int:
        """Return how many ids of the row are committed."""
        committed = self._requests[row.request].committed
        if row.cut.shared is committed:
            return min(len(committed), row.cut.length)
        return common_length(row.ids, committed)

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
                holders[first] = [o for o in state.same_prompt if self._cache.length(o)]
            for other in holders[first]:
                held = self._cache.common_prefix(other, state.committed[:target])
                if held > most:
                    most, source = held, other
                if most == target:
                    break
            if source != request:
                self._copy(source, request)
                self._truncate(request, most)
            if most == target:
                del missing[request]
                self._seal(request)

    def _pieces(self, missing: dict[int, int]) -> Iterator[Row]:
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
            yield Row(-1, request, -1, Cut(ids, end, end, ids[:0]), False)

    def _copy(self, source: int, target: int) -> None:
        """Let `target`, whose branches have no pages, hold what `source` does."""
        self._cache.copy(source, target)
        self._requests[target].padding = self._requests[source].padding
        self._resident.pop(target, None)
        if self._cache.length(target):
            self._resident[target] = None

    def _truncate(self, request: int, length: int) -> None:
        self._cache.truncate(request, length)
        self._cut_padding(self._requests[request], length)

    def _cut_padding(self, state: _Request, length: int) -> None:
        """Note that the ids from `length` on were dropped, and padding that lay behind them."""
        if state.padding is not None and length < state.padding:
            state.padding = None

    def _seal(self, request: int) -> None:
        state = self._requests[request]
        if state.padding is None:
            self._cache.seal_prompt(request)
            state.padding = self._cache.length(request)

    def forward(
        self, rows: list[Row], protected: frozenset[int]
    ) -> torch.Tensor | OutOfPagesError | RewardError:
        """Fork the rows, put in order, and run what is new; its hidden states [T, hidden].

        Their starts are set. To make room, nothing of the protected requests is given up but
        candidates already scored.
        """
        forked = self._fork(rows)
        while isinstance(forked, OutOfPagesError) and self._free(protected):
            self.set_starts(rows)
            forked = self._fork(rows)
        if isinstance(forked, OutOfPagesError):
            return forked
        batch, token_ids = forked
        copies = self._cache.take_copies()
        if len(copies[0]):
            self._model.copy_pages(*copies)
        self.calls += 1
        self.num_tokens += len(token_ids)
        try:
            images = None
            if self._seen:
                seen = [self._seen.get(row.request) for row in rows]
                images = ImageRows.of(batch, token_ids, seen) if any(seen) else None
            ids = torch.from_numpy(token_ids).to(self._model.device)
            hidden = self._model.extend_all(batch, ids, images)
            self._keep_marked(rows, hidden)
        except Exception as error:  # noqa: BLE001 - one bad pass must not end other requests
            return self.failed(rows, error)
        finally:
            self._charge(rows)
        return hidden

    def _charge(self, rows: list[Row]) -> None:
        run = self.tokens
        for row in rows:
            run[row.request] = run.get(row.request, 0) + row.new

    def _keep_marked(self, rows: list[Row], hidden: torch.Tensor) -> None:
        """Keep what is kept of marks that have run; `hidden` is [T, hidden]."""
        if not (self._marking or any(row.cut.marks for row in rows)):
            return
        new: dict[tuple[int, bytes], int] = {}  # where in `hidden`, by request and key
        end = 0
        for row in rows:
            end += row.new
            state = self._requests[row.request]
            if not (row.cut.marks or state.marks):
                continue
            marks = [m for m in row.cut.marks or state.marks if m < row.cut.length]
            for mark, key in zip(marks, _mark_keys(row.ids, marks), strict=True):
                if mark >= row.start and key not in state.marked:
                    new[row.request, key] = end + mark - row.cut.length
        if not new:
            return
        with torch.inference_mode():
            places = torch.tensor(list(new.values()), device=hidden.device)
            kept = self._kept(hidden.index_select(0, places))
        for (request, key), value in zip(new, kept, strict=True):
            self._requests[request].marked.setdefault(key, value)

    def failed(self, rows: list[Row], error: Exception) -> RewardError:
        """Drop the rows of a pass that raised; the error to put in their place."""
        for row in rows:
            self._cache.drop(row.row)
        return self._failure(error)

    def unsettle(self, rows: list[Row], error: Exception) -> RewardError:
        """Drop what `settle` has filed of a pass, as its results could not be read; the error."""
        for row in rows:
            if row.is_prompt:
                self.evict(row.request)
            else:
                self._drop(self._requests[row.request], row.branch)
        return self._failure(error)

    def _failure(self, error: Exception) -> RewardError:
        failure = RewardError(f"{self._whose} failed: {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure

    def _fork(self, rows: list[Row]) -> tuple[Batch, Ids] | OutOfPagesError:
        """Order the rows and give each its pages; the batch and its new ids [T]."""
        for row in rows:
            row.row = self._next_row
            self._next_row += 1
        rows.sort(key=attrgetter("request", "start"))  # neighbours share a prefix
        new = [row.cut.behind(row.start) for row in rows]
        token_ids = np.concatenate(new)
        try:
            batch = self._cache.branch(
                [row.request for row in rows],
                [row.row for row in rows],
                [row.start for row in rows],
                token_ids,
                [len(ids) for ids in new],
            )
        except OutOfPagesError as error:
            return error
        for row in rows:
            self._resident.setdefault(row.request)
        return batch, token_ids

    def _free(self, protected: frozenset[int]) -> bool:
        """Give up one cache to make room; False if nothing is left but the protected ones."""
        idle = next(iter(self._resident), None)
        if idle is not None and idle not in self.busy:
            self.evict(idle)
            return True
        if self._loose:
            self._release(next(iter(self._loose.values())))
            return True
        other = next((request for request in self._resident if request not in protected), None)
        if other is None:
            return False
        self.evict(other)
        return True

    def evict(self, request: int) -> None:
        """Drop every page of a request; what it holds will be computed again."""
        state = self._requests[request]
        for branch in state.branches.values():
            self._release(branch)
        self._cache.close(request)
        self._cache.open(request)
        state.padding = None
        self._resident.pop(request, None)
        self.evictions += 1

    def _drop(self, state: _Request, branch: int) -> None:
        dropped = state.branches.pop(branch, None)
        if dropped is not None:
            self._release(dropped)

    def _release(self, branch: Row) -> None:
        """Give up a branch's pages; what it holds will be computed again if it is accepted."""
        if branch.row != NO_PAGES:
            del self._loose[branch.row]
            self._cache.drop(branch.row)
            branch.row = NO_PAGES


def _mark_keys(ids: Ids, marks: Sequence[int]) -> list[bytes]:
    """Return a digest of the ids up to each mark, which are in order."""
    state, at, keys = hashlib.blake2b(digest_size=16), 0, []
    for mark in marks:
        state.update(ids[at : mark + 1].tobytes())
        keys.append(state.digest())
        at = mark + 1
    return keys
