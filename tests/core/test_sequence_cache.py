"""The cache of token sequences, as Python calls it; `csrc/tests` walks it through its states."""

from __future__ import annotations

import numpy as np
import pytest

from stars_fast._core import SequenceCache


def test_what_a_text_shares_with_a_sequence() -> None:
    cache = SequenceCache(num_pages=16, page_size=4)
    held = {7: [1, 2, 3, 4, 5], 3: [9, 8]}
    for row, (sequence, ids) in enumerate(held.items()):
        cache.open(sequence)
        cache.branch([sequence], [row], [0], ids, [len(ids)])
        cache.promote(row, len(ids))
    texts = [(7, [1, 2, 3, 9]), (3, [9, 8, 7]), (7, []), (7, [1, 2, 3, 4, 5]), (3, [1])]
    found = [cache.common_prefix(sequence, np.array(ids, np.int64)) for sequence, ids in texts]
    assert found == [3, 2, 0, 5, 0]
    with pytest.raises(IndexError, match="no sequence 8"):
        cache.common_prefix(8, np.array([1, 2], np.int64))
