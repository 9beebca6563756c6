"""The batch that the scheduler hands to a paged model.

Terms. A *page* holds `page_size` token slots; page 0 is the null page, scratch that padded entries
point to. *Slot* ``page * page_size + offset`` is one place for a token. A *group* is a sequence
whose prefix is read; a *row* is a candidate that continues a group's prefix with new tokens of its
own. A group's table of pages may hold *prompt padding*, table slots ``padding_start <= s <
padding_end`` that hold nothing: a prompt is padded to a page boundary, so that what follows starts
on a fresh page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class BatchLike(Protocol):
    """G groups, R rows, up to L new tokens each. Valid as long as it is held.

    Attributes
    ----------
    num_groups, num_rows, max_new, num_tokens : int
        G, R, L and ``new_lengths.sum()``.
    group_pages : ndarray
        int32 ``[G, P]``, page ids of each group's table, padded with 0.
    padding_start, padding_end : ndarray
        int32 ``[G]``, table slots of the prompt padding; equal where there is none.
    row_group : ndarray
        int32 ``[R]``, group of each row; rows of a group are adjacent and in group order.
    row_start : ndarray
        int32 ``[R]``, position of the row's first new token = valid prefix tokens of its group.
    new_lengths : ndarray
        int32 ``[R]``, new tokens of the row, 1 to L.
    slots : ndarray
        int64 ``[R, L]``, slot of the row's j-th new token, padded with 0.
    """

    @property
    def num_groups(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def max_new(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def group_pages(self) -> NDArray[np.int32]: ...
    @property
    def padding_start(self) -> NDArray[np.int32]: ...
    @property
    def padding_end(self) -> NDArray[np.int32]: ...
    @property
    def row_group(self) -> NDArray[np.int32]: ...
    @property
    def row_start(self) -> NDArray[np.int32]: ...
    @property
    def new_lengths(self) -> NDArray[np.int32]: ...
    @property
    def slots(self) -> NDArray[np.int64]: ...


@dataclass(frozen=True)
class RowBatch:
    """A `BatchLike` made of arrays, for callers without a scheduler."""

    group_pages: NDArray[np.int32]
    padding_start: NDArray[np.int32]
    padding_end: NDArray[np.int32]
    row_group: NDArray[np.int32]
    row_start: NDArray[np.int32]
    new_lengths: NDArray[np.int32]
    slots: NDArray[np.int64]

    @property
    def num_groups(self) -> int:
        return len(self.group_pages)

    @property
    def num_rows(self) -> int:
        return len(self.row_group)

    @property
    def max_new(self) -> int:
        return int(self.slots.shape[1])

    @property
    def num_tokens(self) -> int:
        return int(self.new_lengths.sum())
