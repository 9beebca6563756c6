"""The C++ core of stars_fast: randomness, pages, acceptance, scheduler.

Arrays returned by properties are views without a copy; they keep their owner alive. Methods of one
object may be called from one thread at a time.
"""

from collections.abc import Sequence
from typing import Final, final

import numpy as np
import numpy.typing as npt

ROW_PRUNED: Final[int]
ROW_WINNER: Final[int]
ROW_KEPT: Final[int]
EVENT_ACCEPTED: Final[int]
EVENT_FALLBACK: Final[int]
EVENT_FAILED: Final[int]
EVENT_CHOSEN: Final[int]
FINISH_NONE: Final[int]
FINISH_STOP: Final[int]
FINISH_LENGTH: Final[int]

class OutOfPagesError(MemoryError):
    """The page pool cannot give as many pages as asked for; nothing was taken."""

class RequestTooLargeError(ValueError):
    """A request that could not run even with the whole pool to itself."""

def philox4x32(counters: npt.ArrayLike, keys: npt.ArrayLike) -> npt.NDArray[np.uint32]:
    """Philox4x32-10 of counters [n, 4] and keys [n, 2], uint32 -> words [n, 4]."""

def accept_uniform(seed: int, position: int, attempt: int, stream: int) -> float:
    """The uniform in (0, 1) of an accept test, 53 bits.

    `position`: response position at which the segment starts; `attempt`: number of the attempt;
    `stream`: number of the segment, see csrc/philox.h.
    """

@final
class Schedule:
    """Threshold schedule and accept test of STARS (arXiv 2511.03827)."""

    def __init__(
        self, *, target_reward: float, alpha: float, beta: float, max_tokens: int, hard: bool
    ) -> None: ...
    def threshold(self, prompt_reward: float, tokens: int) -> float:
        """tau(t) = min(r*, r0 + (r* - r0) t / M), r0 = (1 - alpha) r(x) + alpha r*."""

    def accepts(self, reward: float, threshold: float, uniform: float) -> bool:
        """Soft: uniform < exp((reward - threshold) / beta). Hard: reward >= threshold."""

@final
class PagePool:
    """Reference-counted pages and the cache of full, published ones. Page 0 is never given out."""

    def __init__(self, *, num_pages: int, page_size: int = 16) -> None: ...
    def allocate(self) -> int:
        """One page with count 1. Raises `OutOfPagesError`."""

    def retain(self, page: int) -> None: ...
    def release(self, page: int) -> None: ...
    def count(self, page: int) -> int: ...
    def match(self, token_ids: npt.ArrayLike) -> list[int]:
        """The longest chain of published pages that begins `token_ids`, each retained."""

    def publish(self, table: list[int], token_ids: npt.ArrayLike) -> None:
        """Makes the pages of a table, all full, findable by the tokens they hold."""

    def clear_cache(self) -> None: ...
    def check(self) -> None:
        """Raises RuntimeError unless free, evictable and held pages add up."""

    @property
    def num_pages(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def available(self) -> int: ...
    @property
    def used(self) -> int: ...

@final
class Batch:
    """Arrays of one forward pass: G groups of rows that share a cached prefix, R rows."""

    @property
    def num_groups(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def max_new(self) -> int:
        """L: new tokens of the longest row."""

    @property
    def num_tokens(self) -> int:
        """New tokens of all rows."""

    @property
    def group_pages(self) -> npt.NDArray[np.int32]:
        """[G, P] page ids, padded with 0."""

    @property
    def group_extent(self) -> npt.NDArray[np.int32]:
        """[G] slots of the table to read, padding included."""

    @property
    def padding_start(self) -> npt.NDArray[np.int32]:
        """[G] first slot of the padding."""

    @property
    def padding_end(self) -> npt.NDArray[np.int32]:
        """[G] slot behind the padding; there is none where it equals padding_start."""

    @property
    def row_group(self) -> npt.NDArray[np.int32]:
        """[R] group of each row, ascending."""

    @property
    def row_start(self) -> npt.NDArray[np.int32]:
        """[R] position of the row's first new token."""

    @property
    def new_lengths(self) -> npt.NDArray[np.int32]:
        """[R] new tokens of the row."""

    @property
    def slots(self) -> npt.NDArray[np.int64]:
        """[R, L] slot (page * page_size + offset) of each new token, padded with 0."""

@final
class Plan:
    """What to run in a round: the copies, then the prefill, then the draft."""

    @property
    def copies(
        self,
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """(source page, target page, slots), each [C].

        No page is a target twice, or both source and target: they may run side by side.
        """

    @property
    def prefill(self) -> Batch: ...
    @property
    def draft(self) -> Batch: ...
    @property
    def prefill_tokens(self) -> npt.NDArray[np.int64]:
        """Token ids to prefill, [prefill.num_tokens]."""

    @property
    def prefill_request(self) -> npt.NDArray[np.int64]:
        """[P] request of each row of the prefill."""

    @property
    def request(self) -> npt.NDArray[np.int64]:
        """[R] request of each drafted row."""

    @property
    def attempt(self) -> npt.NDArray[np.int32]: ...
    @property
    def seed(self) -> npt.NDArray[np.int64]:
        """[R] the bits of the request's 64-bit key."""

    @property
    def position(self) -> npt.NDArray[np.int32]:
        """[R] response position of the row's first new token."""

    @property
    def drawn(self) -> npt.NDArray[np.int32]:
        """[R] tokens of the row's segment that earlier rounds drew."""

    @property
    def stream(self) -> npt.NDArray[np.int32]:
        """[R] stream of the row's draws, see csrc/philox.h."""

    @property
    def first_token(self) -> npt.NDArray[np.int64]:
        """[R] the token before the row's first new one, which the first decode step feeds."""

    @property
    def held(self) -> npt.NDArray[np.int64]:
        """[H] requests of rows that ended earlier and wait for an attempt before theirs.

        They are not drafted, and come behind the R others in the result.
        """

    @property
    def held_attempt(self) -> npt.NDArray[np.int32]:
        """[H] their attempts."""

    @property
    def unscored(self) -> npt.NDArray[np.int64]:
        """Requests of the round that still lack their prompt reward."""

    @property
    def preempted(self) -> npt.NDArray[np.int64]:
        """Requests that lost their pages in this plan."""

@final
class Decision:
    """What a round decided: arrays over rows, then arrays over requests with an event."""

    @property
    def outcome(self) -> npt.NDArray[np.int8]:
        """[R] ROW_PRUNED, ROW_WINNER or ROW_KEPT (the best of the rejected so far)."""

    @property
    def threshold(self) -> npt.NDArray[np.float64]:
        """[R] tau; NaN where nothing was tested."""

    @property
    def request(self) -> npt.NDArray[np.int64]:
        """[E] requests whose segment was committed, or that failed."""

    @property
    def kind(self) -> npt.NDArray[np.int8]:
        """[E] EVENT_ACCEPTED, EVENT_FALLBACK, EVENT_CHOSEN or EVENT_FAILED."""

    @property
    def row(self) -> npt.NDArray[np.int32]:
        """[E] the winning or failing row; -1: the best of an earlier round."""

    @property
    def start(self) -> npt.NDArray[np.int32]:
        """[E] response position at which the segment starts."""

    @property
    def length(self) -> npt.NDArray[np.int32]:
        """[E] tokens of the segment."""

    @property
    def attempts(self) -> npt.NDArray[np.int32]:
        """[E] attempts made for the segment."""

    @property
    def finish(self) -> npt.NDArray[np.int8]:
        """[E] FINISH_NONE, FINISH_STOP or FINISH_LENGTH."""

    @property
    def copy_target(self) -> npt.NDArray[np.int64]:
        """[C] paths that go on as a copy of the path in the same place of `copy_source`."""

    @property
    def copy_source(self) -> npt.NDArray[np.int64]:
        """[C] paths that are copied, none of them a target."""

    @property
    def dropped(self) -> npt.NDArray[np.int64]:
        """Paths that are over and forgotten."""

    @property
    def chosen(self) -> npt.NDArray[np.int64]:
        """The path of each group that is over; all its paths are forgotten."""

@final
class Scheduler:
    """The accept/reject loop over paged requests.

    A plan is out from `plan` until its `commit` or a `cancel`; up to `lanes` (1 or 2) may be out
    at once, of different requests, and their work must be issued to the device in the order of
    the plans. Every running request belongs to a lane, that of the plan that started it, until it
    ends or is preempted; the lanes take turns, and waiting requests keep them equally filled.
    Raises ValueError for an option out of range.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int = 16,
        max_rows: int = 256,
        max_prefill_tokens: int = 8192,
        prefix_caching: bool = True,
        fixed_cost_rows: float = 16.0,
        lanes: int = 1,
    ) -> None: ...
    def add(
        self,
        request: int,
        prompt: npt.ArrayLike,
        *,
        scored: bool,
        segment_length: int,
        max_tokens: int,
        max_attempts: int = 1,
        candidates: int = 0,
        seed: int = 0,
        target_reward: float = 0.0,
        alpha: float = 0.5,
        beta: float = 1.0,
        hard: bool = False,
        choose: bool = False,
        overrun: bool = False,
        last_untested: bool = False,
        draft_attempts: int = 0,
        attempts_at: Sequence[int] = ...,
        attempts_span: int = 1,
        plain_from: int = 2147483647,
    ) -> None:
        """Queues a request; ``candidates=0`` is auto.

        Not `scored`: every segment is accepted. `choose`: all attempts are made, and one is taken
        with probability proportional to exp(reward / beta), or with `hard` the largest; of the
        first `draft_attempts`, if its reward reaches `target_reward`, else of the rest. Else each
        is tested, the last not if `last_untested`. `overrun`: a segment that begins within
        `max_tokens` may end past them. `attempts_at`, if not empty: attempts by where a segment
        begins, an entry for each `attempts_span` response tokens. Segments that begin at
        `plain_from` or behind are accepted, whatever their reward. Raises ValueError (a value out
        of range, an id in use) or `RequestTooLargeError`.
        """

    def add_group(
        self,
        requests: Sequence[int],
        seeds: Sequence[int],
        prompt: npt.ArrayLike,
        *,
        resample: bool,
        segment_length: int,
        max_tokens: int,
        seed: int = 0,
        beta: float = 1.0,
        ess_threshold: float = 0.5,
        rejection_rate: float = 0.5,
    ) -> None:
        """Queues paths that are compared where their segments end.

        All segments are accepted; a path then waits for the others. `resample`: particles, weight
        exp((r_t - r_(t-1)) / beta) a segment, resampled when their effective number falls below
        `ess_threshold` of them, one drawn by weight at the end. Else the worst `rejection_rate` of
        them ends at each boundary, and the best is taken. Aborting a path, or one that fails, ends
        the group. Raises ValueError, also for more paths than `max_rows`, or
        `RequestTooLargeError`.
        """

    def abort(self, request: int) -> bool:
        """Forgets a request in any state; False if there is none of that id.

        One in flight (part of a plan that is out) keeps its rows and pages until that plan ends.
        """

    def plan(self) -> Plan:
        """The next lane's round.

        With another plan out it may be empty (no rows, no prefill), if its lane has nothing to do;
        it is committed in its turn all the same. With none out it is empty only if nothing is
        unfinished. Its arrays stay as they are for as long as they are held. Raises RuntimeError if
        `lanes` plans are out.
        """

    def set_prompt_reward(self, request: int, reward: float) -> None:
        """r(x) of a request of `Plan.unscored`, before the commit of its plan."""

    def commit(
        self,
        tokens: npt.ArrayLike,
        lengths: npt.ArrayLike,
        stopped: npt.ArrayLike,
        rewards: npt.ArrayLike,
        seconds: float = 0.0,
        breaks: npt.ArrayLike | None = None,
        unfinished: npt.ArrayLike | None = None,
    ) -> Decision:
        """Commits the oldest plan that is out.

        Tests the rows in attempt order and moves the requests on. Rows are those of the draft, then
        those held, each with its whole segment, what earlier rounds drew included.
        `tokens` int64 [R, the longest row or more], `lengths` int32 [R], `stopped` uint8 [R] (the
        row's last token ends the response), `rewards` float64 [R] (not finite: the row has no valid
        result, and the request fails when the row's turn comes), `seconds`: time of the round per
        token position,
        `breaks` uint8 [R]: the row breaks a constraint: it passes no test, and as a fallback, a
        choice or a path loses to any row that breaks none; None: none does. `unfinished` uint8 [R]:
        the row goes on in the next round, and what follows it in attempt order waits; None: none
        does.
        Raises ValueError, nothing changed, if these do not fit the plan.
        """

    def cancel(self) -> None:
        """Gives every plan that is out back undone, and empties the prefix cache.

        What their copies and prefills were to write is prefilled again.
        """

    def clear_cache(self) -> None:
        """Forgets the pages of prompts that are over.

        Raises RuntimeError if anything is unfinished.
        """

    def tokens(self, request: int) -> list[int]:
        """Prompt and committed response. Raises IndexError for an unknown request."""

    def check(self) -> None:
        """Raises RuntimeError unless every page's count equals the tables that hold it.

        The same if a page is the target of two copies of a plan, or both source and target.
        """

    @property
    def has_unfinished(self) -> bool: ...
    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def pages_used(self) -> int: ...
    @property
    def pages_free(self) -> int: ...
    @property
    def stats(self) -> dict[str, int]: ...

@final
class SequenceCache:
    """Paged token sequences and branches, under ids of the caller's choosing.

    Unknown ids raise IndexError, ids in use ValueError.
    """

    def __init__(self, *, num_pages: int, page_size: int = 16) -> None: ...
    def open(self, sequence: int) -> None: ...
    def close(self, sequence: int) -> None:
        """Frees the sequence and its branches."""

    def __contains__(self, sequence: int) -> bool: ...
    def length(self, sequence: int) -> int: ...
    def tokens(self, sequence: int) -> list[int]: ...
    def common_prefix(self, sequence: int, token_ids: npt.ArrayLike) -> int:
        """Tokens at the start of `token_ids` that the sequence holds already."""

    def truncate(self, sequence: int, length: int) -> None: ...
    def copy(self, source: int, target: int) -> None:
        """`target`, open and without branches, becomes a copy of `source` on the same pages.

        Raises IndexError for an unknown sequence, ValueError for one with branches or itself.
        """

    def seal_prompt(self, sequence: int) -> None:
        """Pads the present end: the next token starts a fresh page.

        Raises ValueError if tokens lie behind padding already.
        """

    def branch(
        self,
        sequences: npt.ArrayLike,
        branches: npt.ArrayLike,
        starts: npt.ArrayLike,
        token_ids: npt.ArrayLike,
        lengths: npt.ArrayLike,
    ) -> Batch:
        """Forks row i from the first starts[i] tokens of sequences[i], for lengths[i] tokens.

        `token_ids` holds the rows' tokens one row after the other. Neighbouring rows with one
        sequence and start share a group. Raises `OutOfPagesError` with nothing changed.
        """

    def promote(self, branch: int, length: int) -> None:
        """The branch's first `length` tokens become its sequence's continuation."""

    def drop(self, branch: int) -> None: ...
    def take_copies(
        self,
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """(source page, target page, slots) owed since the last call, each [C]."""

    def check(self) -> None:
        """Raises RuntimeError unless every page's count equals the tables that hold it."""

    @property
    def num_pages(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def pages_used(self) -> int: ...
    @property
    def pages_free(self) -> int: ...
