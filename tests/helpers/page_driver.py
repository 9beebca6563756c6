"""Drives a paged model through random forks and rollbacks, against the plain model as oracle.

It has a page allocator of its own, the simplest that will do, so that the tests of the models do
not lean on the C++ core. Pages that are not in use hold NaN, as does the null page: whatever reads
them by mistake shows.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from stars_fast.config import Attention
from stars_fast.models.paged import PagedModel
from stars_fast.ops.backend import Backend
from stars_fast.ops.batch import RowBatch


@dataclass
class Sequence:
    """Committed tokens and the pages that hold their keys and values."""

    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    padding: tuple[int, int] = (0, 0)

    @property
    def extent(self) -> int:
        start, end = self.padding
        return len(self.tokens) + (end - start if len(self.tokens) >= start else 0)


@dataclass
class Row:
    """A candidate: its own tokens and pages; the first page may begin with the parent's tail."""

    tokens: list[int]
    pages: list[int]
    slots: list[int]


class PageDriver:
    """Sequences on a `PagedModel`, with checks of every result against eager attention."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        page_size: int,
        num_pages: int = 96,
        tolerance: float,
        backend: Backend = "auto",
        attention: Attention = "auto",
    ) -> None:
        self.model = model
        self.paged = PagedModel(
            model,
            num_pages=num_pages,
            page_size=page_size,
            backend=backend,
            attention=attention,
        )
        self.page_size = page_size
        self.free = list(range(1, num_pages))
        self.tolerance = tolerance
        self.compared = 0
        self.vocab_size = self.paged.vocab_size
        self._poison([0, *self.free])

    # Pages

    def _poison(self, pages: list[int]) -> None:
        for pool in (*self.paged._pools.k_pages, *self.paged._pools.v_pages):
            pool[pages] = torch.nan

    def _take(self, count: int) -> list[int]:
        assert len(self.free) >= count, "the test asks for more pages than its pool has"
        return [self.free.pop() for _ in range(count)]

    def _release(self, pages: list[int]) -> None:
        if pages:
            self._poison(pages)
            self.free.extend(pages)

    # Batches

    def _fork(self, sequence: Sequence, tokens: list[int]) -> Row:
        offset = sequence.extent % self.page_size
        pages = self._take(-(-(offset + len(tokens)) // self.page_size))
        at = [offset + i for i in range(len(tokens))]
        slots = [pages[s // self.page_size] * self.page_size + s % self.page_size for s in at]
        return Row(tokens, pages, slots)

    def batch(self, groups: list[tuple[Sequence, list[Row]]]) -> RowBatch:
        """The batch of some sequences and the rows that continue each."""
        rows = [(g, s, row) for g, (s, candidates) in enumerate(groups) for row in candidates]
        width = max(1, *(len(s.pages) for s, _ in groups)) if groups else 1
        longest = max(len(row.slots) for _, _, row in rows)

        def array(values: list[int]) -> NDArray[np.int32]:
            return np.array(values, dtype=np.int32)

        return RowBatch(
            group_pages=np.array(
                [s.pages + [0] * (width - len(s.pages)) for s, _ in groups], dtype=np.int32
            ),
            padding_start=array([s.padding[0] for s, _ in groups]),
            padding_end=array([s.padding[1] for s, _ in groups]),
            row_group=array([g for g, _, _ in rows]),
            row_start=array([len(s.tokens) for _, s, _ in rows]),
            new_lengths=array([len(row.tokens) for _, _, row in rows]),
            slots=np.array(
                [row.slots + [0] * (longest - len(row.slots)) for _, _, row in rows],
                dtype=np.int64,
            ),
        )

    # Steps: each runs the paged model and compares

    def random_tokens(self, rng: random.Random, count: int) -> list[int]:
        return [rng.randrange(3, self.vocab_size) for _ in range(count)]

    def extend(self, groups: list[tuple[Sequence, list[list[int]]]]) -> list[list[Row]]:
        """Extend every sequence by candidates; checks the hidden states."""
        forked = [(s, [self._fork(s, tokens) for tokens in rows]) for s, rows in groups]
        ids = [t for _, rows in forked for row in rows for t in row.tokens]
        hidden = self.paged.extend(self.batch(forked), self._tensor(ids))
        flat = [(s, row) for s, rows in forked for row in rows]
        assert hidden.shape[0] == len(flat)
        for got, (sequence, row) in zip(hidden, flat, strict=True):
            self._compare(got, self._eager(sequence.tokens + row.tokens, hidden=True)[-1])
        return [rows for _, rows in forked]

    def decode(self, groups: list[tuple[Sequence, list[list[int]]]]) -> list[list[Row]]:
        """Decode candidates token by token; checks the logits of every step."""
        forked = [(s, [self._fork(s, tokens) for tokens in rows]) for s, rows in groups]
        flat = [(s, row) for s, rows in forked for row in rows]
        batch = self.batch(forked)
        state = self.paged.begin_decode(batch)
        logits = []
        for j in range(batch.max_new):
            step = [row.tokens[min(j, len(row.tokens) - 1)] for _, row in flat]
            logits.append(self.paged.decode_step(state, j, self._tensor(step)))
        for r, (sequence, row) in enumerate(flat):
            want = self._eager(sequence.tokens + row.tokens, hidden=False)
            for j in range(len(row.tokens)):
                self._compare(logits[j][r], want[len(sequence.tokens) + j])
        return [rows for _, rows in forked]

    def commit(self, sequence: Sequence, rows: list[Row], winner: int | None, keep: int) -> None:
        """Keep the first `keep` tokens of one row, or none; free everything else."""
        if winner is None or keep == 0:
            for row in rows:
                self._release(row.pages)
            return
        row = rows[winner]
        offset = sequence.extent % self.page_size
        if offset:  # the row's first page starts with a copy of the sequence's tail
            tail = sequence.pages.pop()
            self.paged.copy_pages(
                np.array([tail], dtype=np.int32),
                np.array([row.pages[0]], dtype=np.int32),
                np.array([offset], dtype=np.int32),
            )
            self._release([tail])
        kept = -(-(offset + keep) // self.page_size)
        sequence.pages += row.pages[:kept]
        sequence.tokens += row.tokens[:keep]
        self._release(row.pages[kept:])
        for number, other in enumerate(rows):
            if number != winner:
                self._release(other.pages)

    def seal(self, sequence: Sequence) -> None:
        """Pad up to the next page boundary."""
        if sequence.padding == (0, 0) and sequence.tokens:
            end = sequence.extent
            sequence.padding = (end, -(-end // self.page_size) * self.page_size)

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Roll back to the first `length` tokens."""
        del sequence.tokens[length:]
        start, end = sequence.padding
        if length < start:
            sequence.padding = (0, 0)
        extent = sequence.extent
        if length == start < end:
            extent = end  # the padding's pages stay
        kept = -(-extent // self.page_size)
        self._release(sequence.pages[kept:])
        del sequence.pages[kept:]

    def random_step(self, rng: random.Random, sequences: list[Sequence], room: int) -> None:
        """One random operation on some of the sequences, each checked."""
        chosen = sorted(rng.sample(range(len(sequences)), rng.randint(1, len(sequences))))
        action = rng.choice(["extend", "decode", "decode", "truncate", "seal"])
        if action in ("truncate", "seal"):
            for number in chosen:
                sequence = sequences[number]
                if action == "seal":
                    self.seal(sequence)
                else:
                    self.truncate(sequence, rng.randint(0, len(sequence.tokens)))
            return
        groups = []
        for number in chosen:
            sequence = sequences[number]
            left = room - len(sequence.tokens)
            if left < 1:
                self.truncate(sequence, room // 2)
                left = room - room // 2
            longest = min(left, rng.choice([1, 5, 9, 20]))
            rows = [
                self.random_tokens(rng, rng.randint(1, longest)) for _ in range(rng.randint(1, 4))
            ]
            groups.append((sequence, rows))
        forked = self.extend(groups) if action == "extend" else self.decode(groups)
        for (sequence, _), rows in zip(groups, forked, strict=True):
            winner = rng.choice([None, *range(len(rows))])
            keep = 0 if winner is None else rng.randint(0, len(rows[winner].tokens))
            self.commit(sequence, rows, winner, keep)

    # The oracle

    def _eager(self, tokens: list[int], *, hidden: bool) -> torch.Tensor:
        module = self.model.base_model if hidden else self.model
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        ids = self._tensor([tokens])
        with torch.inference_mode():
            output = module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        self.model.set_attn_implementation(before)
        return output[0][0]

    def _tensor(self, ids: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(ids, device=self.paged.device)

    def _compare(self, got: torch.Tensor, want: torch.Tensor) -> None:
        self.compared += 1
        torch.testing.assert_close(
            got.float(), want.float(), atol=self.tolerance, rtol=self.tolerance
        )
