"""Scoring beside the next round's draft: the same results, and nothing lost if things go wrong."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
from helpers.tiny_lm import small_model
from helpers.tiny_rewards import reward_model
from helpers.tiny_tokenizers import bpe_tokenizer

from stars_fast import Engine, StarsParams
from stars_fast.outputs import RequestOutput

PROMPTS = [f"The film was {word}" for word in ("slow", "bad", "good", "old", "red", "late", "ok")]
PARAMS = StarsParams(
    segment_length=8,
    max_tokens=30,
    max_attempts=4,
    target_reward=3.0,
    beta=0.6,
    temperature=1.0,
    top_k=30,
    ignore_eos=True,
)


def engine(rewards: Any = None, **options: Any) -> Engine:
    tokenizer = bpe_tokenizer()
    settings: dict[str, Any] = {"num_pages": 200, "page_size": 8, "max_rows": 16}
    if rewards is None:
        rewards = reward_model("llama", tokenizer)
        settings |= {"reward_template": "plain", "reward_tokenizer": tokenizer}
    return Engine(small_model(), rewards, tokenizer=tokenizer, **(settings | options))


def run(engine: Engine, params: StarsParams = PARAMS) -> list[RequestOutput]:
    each = [dataclasses.replace(params, seed=i) for i in range(len(PROMPTS))]
    return engine.generate(PROMPTS, each, use_tqdm=False)


def decisions(outputs: list[RequestOutput]) -> list[Any]:
    """Tokens and what led to them; rewards differ in their last digits between batch shapes."""
    return [
        (
            output.token_ids,
            output.finish_reason,
            [(s.attempts, s.accepted) for s in output.segments],
        )
        for request in outputs
        for output in request.outputs
    ]


@pytest.mark.parametrize("pages", [200, 24], ids=["roomy", "preempting"])
@pytest.mark.parametrize("candidates", ["auto", 3])
def test_same_results(candidates: Any, pages: int) -> None:
    params = dataclasses.replace(PARAMS, candidates=candidates)
    want = run(engine(overlap_scoring=False), params)
    overlapped = engine(overlap_scoring=True, num_pages=pages)
    got = run(overlapped, params)
    assert [output.error for output in got] == [None] * len(got)
    assert decisions(got) == decisions(want)
    stats = overlapped.stats()
    assert (stats["preemptions"] > 0) == (pages < 100)
    assert stats["pages_used"] == stats["rm_pages_used"] == stats["requests_running"] == 0
    assert run(overlapped, params.with_method("best_of_n", candidates=2))


def test_one_request_alone() -> None:
    params = dataclasses.replace(PARAMS, seed=0)
    outputs = [
        engine(overlap_scoring=overlap).generate(PROMPTS[:1], params, use_tqdm=False)
        for overlap in (False, True)
    ]
    assert decisions(outputs[0]) == decisions(outputs[1])


def test_a_draft_runs_while_a_round_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward function returns only once the next draft is over."""
    drafted = threading.Event()
    overlaps = []

    def rewards(prompts: list[str], responses: list[str]) -> list[float]:
        if any(responses):
            drafted.clear()
            overlaps.append(drafted.wait(timeout=0.5))
        return [len(set(response)) / 10 for response in responses]

    one = engine(rewards, overlap_scoring=True)
    draft = one.loop.drafter.draft

    def noting(*args: Any) -> Any:
        result = draft(*args)
        drafted.set()
        return result

    monkeypatch.setattr(one.loop.drafter, "draft", noting)
    assert [output.error for output in run(one)] == [None] * len(PROMPTS)
    assert sum(overlaps) > len(overlaps) / 2


def test_failing_rewards_end_their_requests_alone() -> None:
    calls = []

    def rewards(prompts: list[str], responses: list[str]) -> list[float]:
        calls.append(len(prompts))
        if any("bad" in prompt for prompt in prompts):
            raise RuntimeError("no opinion")
        return [0.1 * len(response) for response in responses]

    got = run(engine(rewards, overlap_scoring=True))
    want = run(engine(rewards, overlap_scoring=False))
    assert [o.error is None for o in got] == [o.error is None for o in want]
    assert not all(o.error is None for o in got)


def test_abort_and_add_while_a_round_is_scored() -> None:
    one = engine(overlap_scoring=True)
    for i, prompt in enumerate(PROMPTS[:4]):
        one.add_request(f"r{i}", prompt, dataclasses.replace(PARAMS, seed=i))
    one.step()  # its round is being scored now
    aborted = one.abort("r1")
    assert aborted is not None
    assert aborted.outputs[0].finish_reason == "abort"
    one.add_request("late", PROMPTS[4], dataclasses.replace(PARAMS, seed=4))
    done = {}
    while one.has_unfinished():
        done.update({o.request_id: o for o in one.step() if o.finished})
    assert set(done) == {"r0", "r2", "r3", "late"}
    want = run(engine(overlap_scoring=False))
    got = [done[name] for name in ("r0", "r2", "r3", "late")]
    assert decisions(got) == decisions([want[i] for i in (0, 2, 3, 4)])
    assert one.stats()["pages_used"] == 0


def test_a_phase_that_raises_undoes_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine(overlap_scoring=True)
    draft, calls = one.loop.drafter.draft, []

    def failing(*args: Any) -> Any:
        calls.append(None)
        if len(calls) in (2, 5):
            raise KeyboardInterrupt
        return draft(*args)

    monkeypatch.setattr(one.loop.drafter, "draft", failing)
    for i, prompt in enumerate(PROMPTS):
        one.add_request(f"r{i}", prompt, dataclasses.replace(PARAMS, seed=i))
    done = {}
    while one.has_unfinished():
        try:
            done.update({o.request_id: o for o in one.step() if o.finished})
        except KeyboardInterrupt:
            one.loop._scheduler.check()
    assert len(calls) > 5
    want = run(engine(overlap_scoring=False))
    assert decisions([done[f"r{i}"] for i in range(len(PROMPTS))]) == decisions(want)


def test_abort_of_the_last_request_gives_its_pages_back() -> None:
    """Also of the round that is being scored, which nobody will step to its end."""
    for steps in range(1, 5):
        one = engine(overlap_scoring=True)
        one.add_request("a", PROMPTS[0], PARAMS)
        for _ in range(steps):
            one.step()
        one.abort("a")
        assert not one.has_unfinished()
        stats = one.stats()
        assert stats["pages_used"] == stats["rm_pages_used"] == 0
