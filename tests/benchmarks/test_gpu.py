"""The staged script: its items, its record, its logs and the cache that it takes along."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stars_fast.benchmarks import gpu, kernel_cases, sampler_peers
from stars_fast.benchmarks.gpu_stages import attention_forms, cache, kernels, samplers
from stars_fast.benchmarks.gpu_stages.items import Item, run_items
from stars_fast.benchmarks.gpu_stages.streamed import run_streamed
from stars_fast.benchmarks.interpreter import ON_GPU
from stars_fast.benchmarks.kernel_cases import TINY


def read(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def test_each_item_is_written_at_once_and_a_failed_one_stops_none(tmp_path: Path) -> None:
    out = tmp_path / "figures" / "record.json"
    seen = []

    def fails() -> None:
        seen.append(read(out))
        raise ValueError("no such kernel")

    items = [Item("first", lambda: {"ms": 1.5}), Item("second", fails), Item("third", list)]
    record: dict[str, Any] = {"device": "made up"}
    assert run_items(items, record, out, seconds=1000.0) == ["second"]
    assert seen[0]["items"]["first"]["found"] == {"ms": 1.5}
    assert seen[0]["left_out"] == ["second", "third"]
    assert read(out) == record
    assert record["device"] == "made up"
    assert record["items"]["second"]["failed"] == "ValueError: no such kernel"
    assert record["items"]["third"]["found"] == []
    assert record["left_out"] == []


def test_what_does_not_begin_in_time_is_listed(tmp_path: Path) -> None:
    record: dict[str, Any] = {}
    run_items([Item("only", list)], record, tmp_path / "record.json", seconds=-1.0)
    assert read(tmp_path / "record.json") == {"items": {}, "left_out": ["only"]}


def test_a_command_that_runs_over_keeps_what_it_printed(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "slow.log"
    slow = [sys.executable, "-c", "import time; print('42 passed', flush=True); time.sleep(60)"]
    with pytest.raises(RuntimeError, match=r"(?s)still running after 3 s; .*42 passed"):
        run_streamed(slow, log, seconds=3, cwd=tmp_path)
    assert log.read_text(encoding="utf-8") == "42 passed\n"


def test_a_command_s_last_line_or_its_failure(tmp_path: Path) -> None:
    show = "import os; print('first'); print(os.environ['ASKED'])"
    log = tmp_path / "log"
    command = [sys.executable, "-c", show]
    assert run_streamed(command, log, seconds=60, cwd=tmp_path, ASKED="yes") == "yes"
    with pytest.raises(RuntimeError, match=r"(?s)exit 1; .*KeyError: 'ASKED'"):
        run_streamed(command, log, seconds=60, cwd=tmp_path)


def test_a_cache_from_elsewhere_lists_its_files_where_they_are_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "unused")
    kernel = tmp_path / "made" / "HASH"
    kernel.mkdir(parents=True)
    (kernel / "k.cubin").write_bytes(b"code")
    listed = {"child_paths": {"k.cubin": "/made/elsewhere/HASH/k.cubin"}}
    (kernel / "__grp__k.json").write_text(json.dumps(listed), encoding="utf-8")
    copy = cache.use_cache(tmp_path / "made")
    path = read(copy / "HASH" / "__grp__k.json")["child_paths"]["k.cubin"]
    assert Path(path) == copy / "HASH" / "k.cubin"
    assert Path(path).read_bytes() == b"code"
    assert read(kernel / "__grp__k.json") == listed
    with pytest.raises(NotADirectoryError, match="the cache must be a folder, got"):
        cache.use_cache(tmp_path / "none")


def test_the_kernels_as_a_table() -> None:
    row = {
        "name": "a | b",
        "least_microseconds": 1.0,
        "ours": {"p50": 4.0},
        "ours_in_a_graph": {"p50": 2.0},
        "share_of_the_least": 0.5,
        "predicted_share": 0.8,
        "others": {"torch": {"p50": 8.0}, "other": {"failed": "RuntimeError"}},
    }
    record = {
        "device": "made up",
        "torch_threads": 1,
        "versions": {"torch": "1", "transformers": "2"},
        "date": "2026-01-01",
        "commit": "0123456789abc",
        "uncommitted_changes": False,
        "command": "python benchmarks/gpu.py",
        "items": {"kernels": {"found": [row]}},
    }
    last = kernels.markdown(record).splitlines()[-1]
    assert last == "| a \\| b | 1.0 | 2.0 | 50% | 80% | torch 8 |"
    record["items"]["samplers"] = {"found": {"times": [{**row, "name": "sample"}]}}
    names = [line.split(" | ")[0] for line in kernels.markdown(record).splitlines()[-2:]]
    assert names == ["| sample", "| a \\| b"]
    with pytest.raises(ValueError, match="the record must have 'kernels', got captured"):
        kernels.markdown({**record, "items": {"captured": {}}})


def test_a_stage_runs_small_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """The kernels' cases run in the benchmarks, the engine on kernels in tests/engine."""
    if ON_GPU:
        pytest.skip("there is one")
    assert gpu.main(["--stage", "1", "--only", "ceilings", "waiting step", "bucket replaced"]) == 0
    shown = capsys.readouterr().out
    assert "nothing is written" in shown
    assert "failed: nothing\nleft out: nothing" in shown


def test_attention_forms_without_a_gpu() -> None:
    """PyTorch's operators in a cascade with the kernels; flash-attn says why not."""
    if ON_GPU:
        pytest.skip("there is one")
    (found,) = (x for x in attention_forms.passes(TINY) if x.name == "segments")
    row = attention_forms._time_pass(replace(found, per_group=1, prefix=5), TINY)
    assert row["triton"]["differs"] == 0.0
    assert row["torch"]["p50"] > 0
    assert row["flash"]["failed"].endswith(
        "flash-attn runs on CUDA devices, and the model is on cpu"
    )


def test_samplers_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if ON_GPU:
        pytest.skip("there is one")
    monkeypatch.setattr(kernel_cases, "FILTERS", {"top-k 40": (0.8, 40, 1.0)})
    monkeypatch.setattr(samplers, "_SIZE", replace(TINY, sample_rows=(1,), vocab_size=61))
    monkeypatch.setattr(sampler_peers.importlib.util, "find_spec", lambda _: None)
    found = samplers.time_samplers()
    assert found["missing"]["vllm"] == "vllm is not installed"
    assert found["kept"] == []
    assert {"torch", "transformers"} <= found["times"][0]["others"].keys()


def test_peers_that_fail_are_recorded() -> None:
    """Packages of others raise what they like."""

    def broken(_: int) -> None:
        raise ImportError("undefined symbol")

    case = kernels.Case("a", lambda _: None, lambda: None, 1, others={"theirs": broken})
    row = kernels.time_case(case, kernels.Machine("made up", 1.0, 1.0))
    assert row["others"]["theirs"] == {"failed": "ImportError: undefined symbol"}


def test_a_gpu_can_be_demanded(capsys: pytest.CaptureFixture[str]) -> None:
    if ON_GPU:
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        gpu.main(["--require-gpu"])
    assert "--require-gpu: torch finds no CUDA device here" in capsys.readouterr().err


def test_unknown_items_are_named() -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--only", "no such item"])


def test_every_stage_has_items_of_different_names(tmp_path: Path) -> None:
    for stage in (1, 2, 3):
        names = [item.name for item in gpu.stage_items(stage, tmp_path, 1.0)]
        assert len(names) == len(set(names)) > 2
