"""Drafting on a GPU: a step is one CUDA graph, a round its replays and one transfer each way.

Rounds differ in their rows, prefixes and lengths. All of that is written to tensors that never
move, and a graph is captured for *buckets* of rows only: a round runs in the smallest bucket that
holds it, its spare rows on the null page, neither sampled nor counted. The usual steps are captured
at load; a round that needs another one waits for its capture, and is counted. A graph holds the
weights' addresses: where they have moved since, all are captured again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from stars_fast.drafting.adjust import KnownTokens, Widths, num_tokens
from stars_fast.drafting.base import Draft, RowSampling, position_shifts
from stars_fast.drafting.graph import GraphMemory, StepGraph
from stars_fast.drafting.plan_rows import RowPlan
from stars_fast.drafting.rows import Progress, RowParameters, StepNeeds, most_stop_ids
from stars_fast.kernels.attention import Tiles
from stars_fast.models.kernel_attention import DecodeCapacity, KernelDecode
from stars_fast.models.paged import PagedModel

_log = logging.getLogger(__name__)

# What a bucket holds at least, so that few rounds outgrow one.
_NEW_TOKENS = 64
_PREFIX_TOKENS = 2048
_STOP_IDS = 4
_SEEN = 256
_FINE_ROWS = 64  # from which on the buckets are so many rows apart:
_ROWS_APART = 16

# Rows, tiles by query heads per KV head, and what the steps look at.
_Key = tuple[int, tuple[tuple[int, Tiles], ...], StepNeeds]


class CapturedDrafter:
    """Runs the steps of a round as replays of a captured one.

    Parameters
    ----------
    model
        The language model, on the Triton backend.
    segment_ends, known
        See `EagerDrafter`.

    Attributes
    ----------
    capture_waits
        Rounds that waited for a step to be captured.
    """

    def __init__(
        self,
        model: PagedModel,
        segment_ends: Callable[[], torch.Tensor],
        known: KnownTokens | None = None,
    ) -> None:
        self._model = model
        self._segment_ends = segment_ends
        self._known = known
        self._buckets: dict[_Key, _Bucket] = {}
        self._memory = GraphMemory(model.device) if model.device.type == "cuda" else None
        # Another engine on the same model may join its weights. Of other types, nothing is moved.
        self._weights = [x for x in model.model.parameters() if type(x) is nn.Parameter]
        self._places = self._places_of_weights()
        self.capture_waits = 0

    @property
    def captures(self) -> dict[_Key, bool]:
        """Whether each bucket is a CUDA graph, by its key."""
        return {key: bucket.graph.captured for key, bucket in self._buckets.items()}

    @torch.inference_mode()
    def capture(self, max_rows: int) -> None:
        """Capture the steps of rounds of up to so many rows, the largest first.

        Those of plain rows, in groups of one: as the tiles are the same, also of a few each. Does
        nothing on a CPU. Ends at the first that cannot be captured.
        """
        if self._memory is None:
            return
        begun, needs = time.perf_counter(), StepNeeds()
        columns = _Columns(1, Widths(0, 0))
        with self._model.on_backend():
            tiles = self._model.decode_tiles(1)
            for rows in reversed(buckets(max_rows)):
                needed = DecodeCapacity(rows, page_entries=0, new_tokens=0, prefix_tokens=0)
                bucket = self._make((rows, tuple(tiles.items()), needs), needed, tiles, columns)
                if not bucket.graph.captured:
                    return
        took = time.perf_counter() - begun
        _log.info("captured %d steps in %.1f s", len(self._buckets), took)

    def draft(self, plan: RowPlan, sampling: Sequence[RowSampling]) -> Draft:
        """Draw the segments of a round; see `Drafter.draft`."""
        return self.launch(plan, sampling)()

    def launch(self, plan: RowPlan, sampling: Sequence[RowSampling]) -> Callable[[], Draft]:
        """Launch the replays of a round; see `LaunchingDrafter`."""
        self._forget_moved()
        with self._model.on_backend():
            needs = StepNeeds.of(plan, sampling, num_tokens(self._model.vocab_size, self._known))
            columns = _Columns(most_stop_ids(sampling), Widths.of(sampling))
            bucket = self._bucket(plan, columns, needs)
            begun = _mark(self._model.device)
            bucket.write(plan, sampling)
            grammars = bucket.progress.grammar_rows(sampling)
            if grammars is None:
                bucket.graph.run(plan.draft.max_new)
            else:  # the host reads each token before it says what may follow
                for _ in range(plan.draft.max_new):
                    grammars.allow()
                    bucket.graph.run(1)
                    grammars.advance(bucket.ids, bucket.progress.live)
            ended = _mark(self._model.device)
        rows, steps = plan.draft.num_rows, plan.draft.max_new

        def read() -> Draft:
            with self._model.on_backend():
                drafted = bucket.progress.read(rows, steps)
            if begun is None or ended is None:
                return drafted
            return replace(drafted, seconds=begun.elapsed_time(ended) / 1000)

        return read

    def _places_of_weights(self) -> list[int]:
        return [x.data_ptr() for x in self._weights]

    def _forget_moved(self) -> None:
        """Drop all buckets if the weights lie elsewhere than when they were made."""
        places = self._places_of_weights()
        if places != self._places:
            _log.warning("the model's weights have been moved: steps are captured again")
            self._buckets.clear()
            self._places = places

    def _bucket(self, plan: RowPlan, columns: _Columns, needs: StepNeeds) -> _Bucket:
        batch = plan.draft
        needed = replace(DecodeCapacity.of(batch), rows=bucket_rows(batch.num_rows))
        tiles = self._model.decode_tiles(-(-batch.num_rows // batch.num_groups))
        key = needed.rows, tuple(tiles.items()), needs
        bucket = self._buckets.get(key)
        if bucket is None or not bucket.holds(needed, columns):
            self.capture_waits += 1
            del bucket
            bucket = self._make(key, needed, tiles, columns)
        return bucket

    def _make(
        self, key: _Key, needed: DecodeCapacity, tiles: Mapping[int, Tiles], columns: _Columns
    ) -> _Bucket:
        """Make a bucket with room to spare; it takes the place of one that is outgrown."""
        needs = key[2]
        width = max(_NEW_TOKENS, needed.new_tokens)
        prefix = max(_PREFIX_TOKENS, needed.prefix_tokens)
        pages = -(-prefix // self._model.page_size) + 2  # padding, and one begun
        roomy = DecodeCapacity(
            rows=needed.rows,
            page_entries=_power_of_two(max(needed.page_entries, needed.rows * pages)),
            new_tokens=_power_of_two(width),
            prefix_tokens=_power_of_two(prefix),
        )
        # The old graph first: the new one takes its memory.
        self._buckets.pop(key, None)
        bucket = self._buckets[key] = _Bucket.make(
            self._model,
            roomy,
            tiles,
            columns.rounded_up(adjusts=needs.adjusts),
            self._memory,
            needs,
            self._segment_ends() if needs.ends_early else None,
            self._known,
        )
        return bucket


@dataclass(frozen=True)
class _Columns:
    """Columns that the rows' own lists of tokens take."""

    stop_ids: int
    widths: Widths

    def rounded_up(self, *, adjusts: bool) -> _Columns:
        """With some to spare, so that few rounds outgrow them."""
        widths = Widths(0, 0)
        if adjusts:
            widths = Widths(
                biases=_power_of_two(self.widths.biases) if self.widths.biases else 0,
                seen=_power_of_two(max(_SEEN, self.widths.seen)),
                words=_power_of_two(self.widths.words) if self.widths.words else 0,
                word_tokens=_power_of_two(self.widths.word_tokens) if self.widths.words else 0,
            )
        return _Columns(_power_of_two(max(_STOP_IDS, self.stop_ids)), widths)


@dataclass(frozen=True)
class _Bucket:
    """A captured step and the tensors that it works on."""

    capacity: DecodeCapacity
    decode: KernelDecode
    parameters: RowParameters
    progress: Progress
    ids: torch.Tensor  # int64 [rows], fed next
    first_position: torch.Tensor  # int64 [rows]
    graph: StepGraph

    @classmethod
    def make(
        cls,
        model: PagedModel,
        capacity: DecodeCapacity,
        tiles: Mapping[int, Tiles],
        columns: _Columns,
        memory: GraphMemory | None,
        needs: StepNeeds,
        segment_ends: torch.Tensor | None,
        known: KnownTokens | None,
    ) -> _Bucket:
        """Allocate and capture; the spare rows of the null page do for the first steps."""
        rows, device = capacity.rows, model.device
        decode = model.new_decode(capacity, tiles)
        parameters = RowParameters.empty(rows, columns.stop_ids, device)
        progress = Progress(
            parameters,
            capacity.new_tokens,
            needs,
            model.vocab_size,
            segment_ends=segment_ends,
            widths=columns.widths,
            known=known,
        )
        ids = torch.zeros(rows, dtype=torch.int64, device=device)
        first_position = torch.zeros(rows, dtype=torch.int64, device=device)
        ones = torch.ones((1, rows), dtype=torch.int64, device=device)

        def step() -> None:
            at = decode.step.to(torch.int64)
            decode.begin_step()
            # A row that has ended stays where it is: the context may also end there.
            ahead = torch.minimum(at, parameters.lengths - 1).clamp_(min=0)
            positions = (first_position + ahead).unsqueeze(0)
            logits = model.forward_decode(ids, positions, decode.attention, ones)
            ids.copy_(progress.draw(logits, at))
            decode.end_step()

        graph = StepGraph(step, memory)
        return cls(capacity, decode, parameters, progress, ids, first_position, graph)

    def holds(self, needed: DecodeCapacity, columns: _Columns) -> bool:
        """Whether a round fits."""
        own = self.progress.adjustments
        return (
            self.capacity.holds(needed)
            and self.parameters.stop_ids.shape[1] >= columns.stop_ids
            and (own is None or own.widths.hold(columns.widths))
        )

    def write(self, plan: RowPlan, sampling: Sequence[RowSampling]) -> None:
        """Put a round in place."""
        rows = plan.draft.num_rows
        self.decode.write(plan.draft)
        self.parameters.write(plan, sampling)
        self.progress.begin()
        if self.progress.adjustments is not None:
            self.progress.adjustments.write(sampling)
        self.ids[:rows].copy_(torch.from_numpy(plan.first_token))
        self.first_position[:rows].copy_(torch.from_numpy(plan.draft.row_start))
        if (shift := position_shifts(sampling)) is not None:
            self.first_position[:rows] += torch.from_numpy(shift).to(self.first_position.device)
        self.ids[rows:].zero_()
        self.first_position[rows:].zero_()


def _mark(device: torch.device) -> torch.cuda.Event | None:
    """Put an event that takes the time into the device's stream; None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def bucket_rows(rows: int) -> int:
    """Return the rows of the bucket for `rows` rows.

    A power of two, or 1.5 times one from 8 on; from 64 on the next multiple of 16.
    """
    if rows > _FINE_ROWS:
        return -(-rows // _ROWS_APART) * _ROWS_APART
    above = _power_of_two(rows)
    between = above * 3 // 4
    return between if above > 8 and rows <= between else above


def buckets(max_rows: int) -> list[int]:
    """Return the rows of every bucket that rounds of up to `max_rows` rows run in, ascending."""
    return sorted({bucket_rows(rows) for rows in range(1, max_rows + 1)})


def _power_of_two(at_least: int) -> int:
    return 1 << max(0, at_least - 1).bit_length()
