"""The cache of token sequences, as Python calls it; `csrc/tests` walks it through its states."""

from __future__ import annotations

import numpy as np
import pytest

from stars_fast._core import SequenceCache


def test_prefixes_of_many_texts_are_found_in_one_call() -> None:
    cache = SequenceCache(num_pages=16, page_size=4)
    held = {7: [1, 2, 3, 4, 5], 3: [9, 8]}
    for row, (sequence, ids) in enumerate(held.items()):
        cache.open(sequence)
        cache.branch([sequence], [row], [0], ids, [len(ids)])
        cache.promote(row, len(ids))
    texts = [(7, [1, 2, 3, 9]), (3, [9, 8, 7]), (7, []), (7, [1, 2, 3, 4, 5]), (3, [1])]
    sequences = [sequence for sequence, _ in texts]
    ids = [np.array(text, np.int64) for _, text in texts]
    assert cache.common_prefixes(sequences, ids) == [3, 2, 0, 5, 0]
    with pytest.raises(ValueError, match="texts must have 5 entries, got 4"):
        cache.common_prefixes(sequences, ids[:4])
    with pytest.raises(IndexError, match="no sequence 8"):
        cache.common_prefixes([8], ids[:1])
