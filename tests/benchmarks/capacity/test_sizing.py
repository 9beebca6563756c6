"""The arithmetic of pages and rows, against the scheduler, the engine's pools and the docs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from stars_fast import _core
from stars_fast.benchmarks.capacity import sizing
from stars_fast.benchmarks.capacity.replica import GPUS
from stars_fast.benchmarks.models import LLAMA_3_1_8B, TINY, language_model
from stars_fast.models.paged import PagedModel
from stars_fast.models.pool import enough_pages, page_bytes

PAGE = Path(__file__).resolve().parents[3] / "docs" / "scaling.md"


@pytest.mark.parametrize(
    ("prompt", "response", "candidates", "segment", "page_size"),
    [
        (512, 256, 4, 32, 16),
        (50, 64, 1, 16, 16),
        (33, 100, 3, 32, 16),
        (34, 60, 2, 32, 16),
        (20, 9, 5, 32, 8),
        (7, 40, 8, 8, 4),
    ],
)
def test_a_request_has_the_pages_that_are_counted(
    prompt: int, response: int, candidates: int, segment: int, page_size: int
) -> None:
    scheduler = _core.Scheduler(num_pages=1000, page_size=page_size, prefix_caching=False)
    scheduler.add(
        0,
        list(range(prompt)),
        scored=True,
        segment_length=segment,
        max_tokens=response,
        max_attempts=candidates,
        candidates=candidates,
        alpha=1.0,
        hard=True,
    )
    most = 0
    while scheduler.num_running + scheduler.num_waiting:
        plan = scheduler.plan()
        most = max(most, scheduler.pages_used)
        rows, longest = plan.draft.num_rows, max(1, plan.draft.max_new)
        # The last candidate passes, so that none is done before.
        rewards = [1.0 if number == rows - 1 else -1.0 for number in range(rows)]
        lengths = plan.draft.new_lengths.tolist()
        scheduler.commit(np.ones((rows, longest), np.int32), lengths, [False] * rows, rewards)
    counted = sizing.request_pages(
        prompt, response, candidates=candidates, segment=segment, page_size=page_size
    )
    assert most == counted


def test_a_page_has_the_bytes_that_the_pools_have() -> None:
    model = language_model(TINY)
    for page_size in (4, 16):
        paged = PagedModel(model, num_pages=8, page_size=page_size)
        pools = (*paged._pools.k_pages, *paged._pools.v_pages)
        assert sum(pool.nbytes for pool in pools) == 8 * page_bytes(model, page_size)


def test_the_pools_of_two_models_fit() -> None:
    lm, rm = sizing.pools(GPUS["h200"], LLAMA_3_1_8B, LLAMA_3_1_8B)
    # 32 layers, 8 heads of 128 for keys and as many for values, two bytes, 16 tokens.
    assert lm.page == rm.page == 32 * 8 * 2 * 128 * 2 * 16
    used = sum(pool.weights + pool.num_pages * pool.page for pool in (lm, rm))
    assert used + 1e9 < GPUS["h200"].memory_bytes
    assert lm.num_pages == (int((141e9 - 1e9 - lm.weights) * 0.5)) // lm.page
    small, _ = sizing.pools(GPUS["h200"], TINY, TINY, max_rows=2)
    model = language_model(TINY, device="meta")
    assert small.num_pages == enough_pages(model, page_size=16, max_rows=2) == 2 * 257 + 1
    with pytest.raises(ValueError, match="weights do not fit into the memory of H200"):
        sizing.pools(GPUS["h200"], LLAMA_3_1_8B, LLAMA_3_1_8B, reserved=125e9)
    with pytest.raises(ValueError, match="page_size must divide segment, 30, got 16"):
        sizing.request_pages(1, 1, candidates=1, segment=30)


def test_the_page_of_docs_shows_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    shown = re.findall(
        r"\$ python benchmarks/capacity/sizing\.py ?([^\n]*)\n(.*?)```", PAGE.read_text(), re.DOTALL
    )
    assert len(shown) >= 2
    for arguments, output in shown:
        assert sizing.main(arguments.split()) == 0
        assert capsys.readouterr().out == output
