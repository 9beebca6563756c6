"""Correlations by position, on numbers whose answer is known, and a small run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import prefix_correlation
import pytest
from prefix_correlation import CorrelationSettings, correlations, draw, measure, ranks, table
from scipy import stats

from stars_fast import demo


def test_ranks_share_ties() -> None:
    values = [3.0, 1.0, 1.0, 7.0, 3.0, 3.0]
    assert ranks(values) == (stats.rankdata(values) - 1).tolist()


def test_correlations_are_scipys() -> None:
    rng = np.random.default_rng(0)
    gold = rng.normal(size=40).round(1)
    scores = np.exp(gold + rng.normal(size=40))
    found = correlations(scores.tolist(), gold.tolist())
    assert found["pearson"] == pytest.approx(stats.pearsonr(scores, gold).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(scores, gold).statistic)
    assert correlations([1.0, 1.0], [0.0, 1.0]) == {"pearson": 0.0, "spearman": 0.0}


def test_table_takes_the_prefixes_that_are_there() -> None:
    gold = [float(i) for i in range(10)]
    # Ten responses of 2 tokens, eight of which have a third: right at 1, reversed at 2.
    scores = [[0.0, g, -g] + ([g * g] if g >= 2 else []) for g in gold]
    rows = table({"score": scores}, gold, positions=(1, 2, 3, 4))
    assert list(rows) == ["1", "2", "3", "pooled", "end"]
    assert [row["prefixes"] for row in rows.values()] == [10, 10, 8, 28, 10]
    assert rows["1"]["score"] == {"pearson": pytest.approx(1.0), "spearman": pytest.approx(1.0)}
    assert rows["2"]["score"]["spearman"] == pytest.approx(-1.0)
    assert rows["3"]["score"]["spearman"] == pytest.approx(1.0)
    assert rows["3"]["score"]["pearson"] < 1.0
    ends = [scores[i][-1] for i in range(10)]
    assert rows["end"]["score"]["spearman"] == pytest.approx(stats.spearmanr(ends, gold).statistic)


def test_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = CorrelationSettings(
        prompts=8, samples_per_prompt=2, max_tokens=20, value=str(demo.reward_model_dir())
    )
    record = measure(settings)
    rows = record["correlation with gold"]
    assert record["responses"] == 16
    assert list(rows) == ["8", "16", "pooled", "end"]
    for row in rows.values():
        assert row["value"] == row["reward"]  # the same model
        assert -1.0 <= row["reward minus prompt"]["spearman"] <= 1.0
    assert rows["8"]["reward minus prompt"] != rows["8"]["reward"]

    plot = tmp_path / "plot.png"
    draw(record, plot)
    assert plot.stat().st_size > 1000

    out = tmp_path / "out.json"
    monkeypatch.setattr(prefix_correlation, "measure", lambda _: record)
    monkeypatch.setattr("sys.argv", ["prefix_correlation.py", "--out", str(out)])
    prefix_correlation.main()
    assert json.loads(out.read_text()) == record
