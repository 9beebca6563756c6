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
    ids = [token for _, text in texts for token in text]
    lengths = np.array([len(text) for _, text in texts])
    assert cache.common_prefixes(sequences, ids, lengths) == [3, 2, 0, 5, 0]
    for wrong in (lengths + 1, lengths - [1, 0, 0, 0, 0], lengths + np.array([0, 1, -1, 0, 0])):
        with pytest.raises(ValueError, match="add up to 13, the ids given"):
            cache.common_prefixes(sequences, ids, wrong)
    with pytest.raises(ValueError, match="lengths must have 5 entries, got 4"):
        cache.common_prefixes(sequences, ids, lengths[:4])
