"""The batch that the scheduler hands to a paged model.

Terms. A *page* holds `page_size` token slots; page 0 is the null page, scratch that padded entries
point to. *Slot* ``page * page_size + offset`` is one place for a token. A *group* is a sequence
whose prefix is read; a *row* is a candidate that continues a group's prefix with new tokens of its
own. A group's table of pages may hold one *hole*, table slots ``hole_start <= s < hole_end`` that
hold nothing (a prompt is padded to a page boundary, so that what follows starts on a fresh page).
"""

from __future__ import annotations

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
    group_extent : ndarray
        int32 ``[G]``, table slots to read, hole included; 0 is an empty prefix.
    hole_start, hole_end : ndarray
        int32 ``[G]``.
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
    def group_extent(self) -> NDArray[np.int32]: ...
    @property
    def hole_start(self) -> NDArray[np.int32]: ...
    @property
    def hole_end(self) -> NDArray[np.int32]: ...
    @property
    def row_group(self) -> NDArray[np.int32]: ...
    @property
    def row_start(self) -> NDArray[np.int32]: ...
    @property
    def new_lengths(self) -> NDArray[np.int32]: ...
    @property
    def slots(self) -> NDArray[np.int64]: ...
