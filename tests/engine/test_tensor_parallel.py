"""Two processes over gloo draw, score and decide what one process does, and alike."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import two_ranks
from helpers.tiny_architectures import tiny_lm
from helpers.tiny_lm import small_model
from helpers.tiny_rewards import reward_model
from helpers.tiny_tokenizers import bpe_tokenizer
from helpers.two_ranks import LOG_RATIO, PARAMS, PERSONA, PROMPTS

from stars_fast import LogRatio
from stars_fast.errors import UnsupportedModelError
from stars_fast.models.load import load_causal_lm
from stars_fast.outputs import RequestOutput
from stars_fast.rewards import Persona


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The saved models."""
    path = tmp_path_factory.mktemp("models")
    tokenizer = bpe_tokenizer()
    dpo = copy.deepcopy(small_model())
    dpo.lm_head.weight.data *= 1.1
    saved = ("lm", small_model()), ("rm", reward_model("llama", tokenizer)), ("dpo", dpo)
    for name, model in saved:
        model.save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    return path


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What two processes saw."""
    pytest.importorskip("accelerate", reason="transformers needs accelerate to split a model")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, two_ranks.__file__, str(folder)],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,  # in the checkout, its source folder would hide the installed package
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[RequestOutput]]:
    """What one process makes of the same."""
    return two_ranks.every_method(two_ranks.engine(folder))


def check_same(found: list[RequestOutput], wanted: list[RequestOutput]) -> None:
    """The same tokens and decisions; rewards and log-probabilities to rounding."""
    for one, other in zip(found, wanted, strict=True):
        assert (one.error, one.finished) == (other.error, other.finished)
        assert one.prompt_token_ids == other.prompt_token_ids
        for mine, theirs in zip(one.outputs, other.outputs, strict=True):
            assert mine.token_ids == theirs.token_ids
            assert (mine.text, mine.finish_reason) == (theirs.text, theirs.finish_reason)
            assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
            assert mine.reward == pytest.approx(theirs.reward, abs=1e-4)
            decisions = [
                [replace(s, reward=None, threshold=None, rejected=()) for s in output.segments]
                for output in (mine, theirs)
            ]
            assert decisions[0] == decisions[1]
            for at, segment in enumerate(mine.segments):
                assert segment.reward == pytest.approx(theirs.segments[at].reward, abs=1e-4)


def test_the_cases_decide_something(alone: dict[str, list[RequestOutput]]) -> None:
    segments = [s for output in alone["stars"] for s in output.outputs[0].segments]
    assert {s.accepted for s in segments} == {"test", "fallback"}
    assert len({s.attempts for s in segments}) > 2
    ragged = {s.end - s.start for o in alone["cards"] for s in o.outputs[0].segments}
    assert len(ragged) > 1


def test_each_rank_has_its_share(ranks: list[dict[str, Any]], folder: Path) -> None:
    whole = two_ranks.engine(folder)
    pages, tokens, kv_heads, dim = whole.loop.model._pools.k_pages[0].shape
    for seen in ranks:
        assert tuple(seen["layout"]) == (pages, tokens, kv_heads // 2, dim)
        assert seen["parameters"] == whole.num_parameters()


@pytest.mark.parametrize("method", PARAMS)
def test_same_tokens_as_one_process(
    method: str, ranks: list[dict[str, Any]], alone: dict[str, list[RequestOutput]]
) -> None:
    """On rank 1, too, which has another clock and draws other tokens: nobody gets to see them."""
    for seen in ranks:
        check_same(seen["methods"][method], alone[method])
    assert ranks[0]["methods"][method] == ranks[1]["methods"][method]


def test_persona(ranks: list[dict[str, Any]], folder: Path) -> None:
    one = two_ranks.engine(folder, Persona(template="Human: {prompt}"))
    for seen in ranks:
        check_same(seen["persona"], two_ranks.generated(one, PERSONA))
    assert ranks[0]["persona"] == ranks[1]["persona"]


def test_log_ratio(ranks: list[dict[str, Any]], folder: Path) -> None:
    one = two_ranks.engine(folder, LogRatio(folder / "dpo"))
    wanted = two_ranks.generated(one, LOG_RATIO)
    for seen in ranks:
        check_same(seen["log ratio"], wanted)
    assert ranks[0]["log ratio"] == ranks[1]["log ratio"]
    segments = [s for output in wanted for s in output.outputs[0].segments]
    assert len({s.reward for s in segments}) == len(segments) > 3


def test_a_loaded_model(ranks: list[dict[str, Any]], alone: dict[str, list[RequestOutput]]) -> None:
    for seen in ranks:
        assert [o.outputs[0].token_ids for o in seen["loaded"]] == [
            o.outputs[0].token_ids for o in alone["vanilla"]
        ]
        assert "split over 2 ranks: pass tensor_parallel=True" in seen["not told"]
        assert "must be split over the 2 ranks there are, got one on 1" in seen["whole"]
        assert "overlap_scoring must be off with tensor_parallel=True" in seen["overlap"]


def test_ranks_count_the_same(ranks: list[dict[str, Any]]) -> None:
    for name in "stats", "led stats":
        first, second = (
            {key: value for key, value in seen[name].items() if not key.startswith("seconds")}
            for seen in ranks
        )
        assert first == second
        assert first["pages_used"] == 0


def test_random_rewards_are_those_of_rank_0(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["random rewards"] == ranks[1]["random rewards"]
    segments = [s for o in ranks[0]["random rewards"] for s in o.outputs[0].segments]
    assert len({segment.attempts for segment in segments}) > 1
    assert all(segment.rewards["random"] == segment.reward for segment in segments)
    assert all(segment.rewards["split"] for segment in segments)
    assert ranks[0]["reward calls"] > 0
    assert ranks[1]["reward calls"] == 0
    for seen in ranks:
        assert len(seen["failing rewards"]) == len(PROMPTS)
        assert all("ZeroDivisionError" in error for error in seen["failing rewards"])


def test_rank_0_leads(ranks: list[dict[str, Any]], folder: Path) -> None:
    found, wanted = ranks[0]["led"], two_ranks.lead(two_ranks.engine(folder, two_ranks.text_reward))
    for name in "auto", "b", "served":
        check_same(found[name], wanted[name])
    check_same([found["aborted"]], [wanted["aborted"]])
    assert found["aborted"].outputs[0].finish_reason == "abort"
    assert found["score"] == wanted["score"]
    assert found["calibration"].rewards == pytest.approx(wanted["calibration"].rewards)
    assert found["refused"] == wanted["refused"]
    assert len(found["refused"]) == 3
    assert "rank 0 leads: use lead()" in ranks[0]["follow"]
    assert "this is rank 1: call follow()" in ranks[1]["lead"]


def test_other_requests_on_a_rank_end_the_engine(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert seen["differ"].startswith("RuntimeError: the round differs between ranks")
        assert "from rank 0's on rank 1" in seen["differ"]
        assert seen["after"].startswith("EngineStoppedError: rank")


def test_a_follower_that_cannot_follow_stops_the_leader(ranks: list[dict[str, Any]]) -> None:
    assert ranks[1]["only 0 can"].startswith("AttributeError: ")
    assert ranks[0]["only 0 can"].startswith("RuntimeError: rank 0 lost the other ranks: one of ")


def test_one_rank_that_fails_stops_the_other(ranks: list[dict[str, Any]]) -> None:
    assert ranks[1]["one fails"] == "MemoryError: no room"
    # Within a pass of the model, the words are gloo's: they depend on how it saw the end.
    assert ranks[0]["one fails"].startswith("RuntimeError: ")
    assert "gloo/transport" in ranks[0]["one fails"]


# In one process


def test_one_process_is_an_engine_like_any_other(
    folder: Path, alone: dict[str, list[RequestOutput]]
) -> None:
    one = two_ranks.engine(folder, tensor_parallel=True)
    assert one.rank == 0
    with one.lead():
        check_same(two_ranks.generated(one, PARAMS["stars"]), alone["stars"])
    with pytest.raises(ValueError, match="there is one process, which has nobody to follow"):
        one.follow()


def test_heads_that_cannot_be_shared(folder: Path) -> None:
    with pytest.raises(
        UnsupportedModelError,
        match=r"num_key_value_heads must be divisible .* got 2 heads on 4 ranks",
    ):
        load_causal_lm(folder / "lm", num_ranks=4)
    with pytest.raises(UnsupportedModelError, match=r"num_attention_heads .* 4 heads on 3 ranks"):
        load_causal_lm(folder / "lm", num_ranks=3)


def test_an_architecture_without_a_plan(tmp_path: Path) -> None:
    tiny_lm("opt").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no tensor-parallel plan for model type 'opt'"):
        load_causal_lm(tmp_path, num_ranks=2)
