"""What the mapper does alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.ray_records import MODELS, POOLS, assert_same

from stars_fast import StarsParams, demo
from stars_fast.cluster.bulk import StarsMapper, calibrate, map_rows
from stars_fast.cluster.rows import as_rows

for package in ("ray", "pandas", "pyarrow"):
    pytest.importorskip(package, reason=f"needs {package}, of the extra ray")

PARAMS = StarsParams(segment_length=4, max_tokens=12, target_reward="auto")


def test_a_batch_alone(tmp_path: Path) -> None:
    """Rows of a table without lines, and without a calibration, in a batch of numpy's."""
    import numpy as np

    mapper = StarsMapper(*MODELS, params=PARAMS, **POOLS)
    prompts = np.array([*demo.prompts(3), ""], dtype=object)
    params = np.array([{"target_reward": 1.0}] * 2 + [{"target_reward": None}] * 2, dtype=object)
    batch = {"id": np.arange(4), "prompt": prompts, "params": params}
    records = mapper(batch).to_dict("records")
    assert [record["id"] for record in records] == [0, 1, 2, None]
    assert [record["line"] for record in records] == [0] * 4
    assert [bool(record["outputs"]) for record in records] == [True, True, False, False]
    assert "calibrate(...) once" in records[2]["error"]
    assert "prompt must be text" in records[3]["error"]
    # The others change nothing.
    alone = mapper({name: column[1:2] for name, column in batch.items()}).to_dict("records")
    assert_same(alone, records[1:2])


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        map_rows(None, *MODELS, workers=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="quantile must be in"):
        calibrate([], *MODELS, quantile=1.0)
    with pytest.raises(ValueError, match="num_prompts must be at least 1 or None, got 0"):
        calibrate([], *MODELS, num_prompts=0)
    with pytest.raises(ValueError, match="rows must hold at least one request"):
        calibrate(as_rows([{"prompt": ""}]), *MODELS)
