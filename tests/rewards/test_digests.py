"""Digests of texts that begin alike are those of the whole texts."""

from __future__ import annotations

import itertools

import numpy as np

from stars_fast.rewards.reading import Cut, Digests


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def cut(text: np.ndarray, *following: int, first: int = 0, marks: tuple[int, ...] = ()) -> Cut:
    return Cut(text, len(text), first, ids(*following), marks)


#: No two are the same, though some have the same numbers one after the other.
CUTS = [
    cut(ids()),
    cut(ids(1, 2, 3)),
    cut(ids(1, 2, 3), first=1),
    cut(ids(1, 2), 3),
    cut(ids(1, 2), 3, first=1),
    cut(ids(1), 2, 3),
    cut(ids(1, 2, 3), marks=(0,)),
    cut(ids(1, 2, 3), marks=(0, 2)),
    cut(ids(1, 2, 3), 0),
    cut(ids(1, 2, 3, 0)),
    cut(ids(1, 2, 4)),
    cut(ids(1, 2, 3, 4, 5)),
    cut(ids(9, 2, 3)),
]


def test_equal_for_equal_cuts_alone() -> None:
    digests = Digests(ids(1, 2))
    found = [digests.of(one) for one in CUTS]
    assert len(set(found)) == len(CUTS)
    again = [Cut(c.ids.copy(), 0, c.first, c.following.copy(), c.marks) for c in CUTS]
    assert [digests.of(one) for one in again] == found  # what is kept is no part of it


def test_the_same_whatever_texts_begin_with() -> None:
    want = [Digests(ids()).of(one) for one in CUTS]
    texts = [ids(1), ids(1, 2), ids(1, 2, 3), ids(1, 2, 3, 4, 5, 6), ids(7), ids(9, 2)]
    for first, then in itertools.product(texts, repeat=2):
        digests = Digests(first)
        assert [digests.of(one) for one in CUTS] == want
        grown = digests.grown(then)
        assert [grown.of(one) for one in CUTS] == want
        assert [digests.of(one) for one in CUTS] == want  # which is as it was
