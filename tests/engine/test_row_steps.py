"""Row-steps: what drafting ran, beside the tokens that became part of an attempt."""

from __future__ import annotations

import pytest

from stars_fast import Engine, StarsParams, demo
from stars_fast.engine.round import Round

PLAIN = StarsParams(method="vanilla", segment_length=5, max_tokens=10)
CLAUSES = StarsParams(
    segment_end="clause", segment_length=12, target_reward=1.0, alpha=1.0, max_tokens=24
)
CARDS = StarsParams(method="cards", entropy_threshold=1.5, target_reward=1.0, max_tokens=24)


@pytest.mark.parametrize("params", [PLAIN, CLAUSES, CARDS], ids=["plain", "clauses", "cards"])
def test_rows_that_wait_are_row_steps_without_tokens(params: StarsParams) -> None:
    engine = Engine.demo(device="cpu")
    waited = []

    def look(done: Round) -> None:
        rows = done.plan.draft.num_rows
        drawn = [end - start for start, end in zip(done.drawn, done.lengths, strict=True)]
        waited.append(rows * done.draft.steps - int(sum(drawn)))

    engine.loop.on_round = look
    engine.generate(demo.prompts(6), params.with_method(params.method, seed=3), use_tqdm=False)
    stats = engine.stats()
    assert stats["row_steps"] - stats["drafted_tokens"] == sum(waited)
    if params is PLAIN:
        assert stats["row_steps"] == stats["drafted_tokens"] == 6 * 10  # none ends early
    else:
        assert sum(waited) > 0
