"""Segments that end at clauses: rounds that wait for their longest row against rounds that do not.

Of STARS on the demo's models; `stars_fast.benchmarks.ragged` is the same on any model, with more
figures. That both ways give the same tokens is asserted before anything is timed.
"""

from __future__ import annotations

import pytest

from stars_fast.benchmarks.compare import Compare
from stars_fast.benchmarks.ragged import Ragged, summary


@pytest.mark.sizes("prompts", full=[8, 48], small=[3])
def test_clauses(compare: Compare, full: bool, prompts: int) -> None:
    """A response of each prompt, segments of up to 32 tokens."""
    ragged = Ragged(None, prompts=prompts, max_tokens=64 if full else 24)
    ragged.warm_up()
    runs = ragged.sides()
    pairs = zip(runs["whole"].token_ids, runs["spanning"].token_ids, strict=True)
    assert sum(a == b for a, b in pairs) >= 0.9 * prompts  # a near tie may fall the other way
    compare(
        lambda: ragged.run(ragged.stars, spans=True),
        {
            "whole rounds": lambda: ragged.run(ragged.stars, spans=False),
            "plain": lambda: ragged.run(ragged.plain, spans=True),
        },
        work={"prompts": prompts},
        tokens=sum(map(len, runs["spanning"].token_ids)),
        cost=summary([runs]),
    )
