"""Token ids in two parts, of which the first is often that of many others.

Candidates of a request differ in what is behind its committed text. What is done for each of them
is done to that part alone; the two are joined where somebody asks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["NO_IDS", "Ids", "SplitIds", "common_length", "no_ids"]

Ids = NDArray[np.int64]

#: int64 [0].
NO_IDS: Ids = np.zeros(0, np.int64)


def no_ids() -> Ids:
    """Return `NO_IDS`; the default of a dataclass's field."""
    return NO_IDS


class SplitIds:
    """What has ids in two parts.

    Attributes
    ----------
    shared : int64 [N]
        The first part; that others have the same is seen by its being the same object.
    rest : int64 [M]
        What is behind it.
    """

    __slots__ = ()
    shared: Ids
    rest: Ids

    @property
    def length(self) -> int:
        """N + M."""
        return len(self.shared) + len(self.rest)

    @property
    def ids(self) -> Ids:
        """All of them, int64 [N + M]."""
        return np.concatenate((self.shared, self.rest)) if len(self.shared) else self.rest

    def behind(self, start: int) -> Ids:
        """Return those from number `start` on."""
        skipped = start - len(self.shared)
        if skipped < 0:
            return self.ids[start:]
        return self.rest[skipped:] if skipped else self.rest


def common_length(left: Ids, right: Ids) -> int:
    """Return how many leading ids are equal."""
    length = min(len(left), len(right))
    different = np.flatnonzero(left[:length] != right[:length])
    return int(different[0]) if len(different) else length
