"""What tests of bulk runs have in common."""

from __future__ import annotations

from typing import Any

import pytest

from stars_fast import demo

MODELS = (str(demo.model_dir()), str(demo.reward_model_dir()))
POOLS: dict[str, Any] = {"num_pages": 300, "reward_num_pages": 300, "device": "cpu"}


def assert_same(records: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same records in this order, rewards up to what the shapes of batches change."""
    assert [record["line"] for record in records] == [record["line"] for record in expected]
    for record, want in zip(records, expected, strict=True):
        for one, other in zip(record["outputs"], want["outputs"], strict=True):
            assert one["reward"] == pytest.approx(other["reward"], abs=1e-4)
            for name in ("text", "token_ids", "finish_reason"):
                assert one[name] == other[name]
            assert len(one["segments"]) == len(other["segments"])
        assert {**record, "outputs": []} == {**want, "outputs": []}
