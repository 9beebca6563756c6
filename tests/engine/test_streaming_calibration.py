"""A target that follows the requests: what it is, whom it costs what, and whom it harms."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.gate import Gate
from helpers.letter_law import EOS, Tokens, letter_engine, next_probs, reward_of, text
from helpers.outputs import same
from helpers.tiny_lm import letter_model

from stars_fast import Engine, StarsParams
from stars_fast.engine import streaming
from stars_fast.engine.async_engine import AsyncEngine
from stars_fast.errors import NotCalibratedError

AUTO = StarsParams(
    segment_length=2, max_tokens=4, max_attempts=4, candidates=1, beta=0.3, top_k=0,
    target_reward="auto",
)  # fmt: skip
NUMBER = replace(AUTO, target_reward=0.4)
SHORT = replace(AUTO, segment_length=4)  # a round or two


def grouped(prompts: list[str], responses: list[str]) -> list[float]:
    """Prompts with a "b" are worth less, whatever is answered."""
    return [
        reward_of(r) - (5.0 if "b" in p else 0.0) for p, r in zip(prompts, responses, strict=True)
    ]


def following(quantile: float = 0.75, share: float = 1.0, **options: Any) -> Engine:
    targets = options.pop("targets", "pooled")
    engine = letter_engine(**({"seed": 5, "max_rows": 16} | options))
    engine.calibrate_on_requests(quantile, share, targets=targets)
    return engine


def run(engine: Engine, prompts: Any, params: StarsParams = AUTO) -> Any:
    return engine.generate(prompts, params, use_tqdm=False)


def law(prompt: str, tokens: Tokens = (), chance: float = 1.0) -> Iterator[tuple[float, float]]:
    """Chance and reward of every plain response to a prompt."""
    if len(tokens) == AUTO.max_tokens or tokens[-1:] == (EOS,):
        yield chance, reward_of(text(tokens))
        return
    for token, p in enumerate(next_probs(tokens, prompt=prompt)):
        yield from law(prompt, (*tokens, token), chance * p)


def test_the_target_is_the_quantile_of_the_plain_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "WINDOW", 32)
    prompts = ["ab", "ca", "bb", "aa"] * 2
    engine = following(0.5)
    params = replace(AUTO, acceptance="hard", max_attempts=8)
    before = None
    for _ in range(6):
        outputs = run(engine, prompts, params)
        if before is not None:  # they waited for nothing
            assert {output.target_reward for output in outputs} == {before}
        while engine.samples_prompts:
            engine.step()
        assert engine.calibration is not None
        before = engine.calibration.target_reward
    found = engine.calibration
    assert found is not None
    assert len(found.rewards) == 32 * streaming.SAMPLES
    assert found.target_reward == np.quantile(found.rewards, 0.5)

    def share_below(target: float) -> float:
        """Of plain responses, exactly."""
        return float(np.mean([sum(p for p, r in law(one) if r <= target) for one in prompts[:4]]))

    error = 4 * math.sqrt(0.5 * 0.5 / len(found.rewards))
    assert share_below(found.target_reward) == pytest.approx(0.5, abs=error)
    # Aligned responses, from which it must not be found, are beyond that.
    rewards = [output.outputs[0].reward for output in run(engine, prompts * 4, params)]
    assert share_below(float(np.median(rewards))) > 0.5 + error


def test_the_first_requests_wait_for_samples_of_their_own_prompts() -> None:
    engine = following()
    engine.add_request("first", "ab", replace(AUTO, seed=1))
    engine.add_request("number", "ab", replace(NUMBER, seed=1))
    outputs = {}
    while engine.has_unfinished():
        for output in engine.step():
            assert output.request_id in ("first", "number")
            assert output.finished or output.request_id not in outputs
            if output.finished:
                outputs[output.request_id] = output
    found = engine.calibration
    assert found is not None
    assert len(found.rewards) == streaming.SAMPLES
    first = outputs["first"]
    assert first.target_reward == found.target_reward == np.quantile(found.rewards, 0.75)
    # The number and the seed give the response again, on an engine that follows nothing.
    again = replace(AUTO, seed=1, target_reward=first.target_reward)
    (expected,) = run(letter_engine(), "ab", again)
    assert same(first.outputs[0], expected.outputs[0])
    assert (first.drafted_tokens, first.rm_tokens) == (expected.drafted_tokens, expected.rm_tokens)
    (expected,) = run(letter_engine(), "ab", replace(NUMBER, seed=1))
    assert same(outputs["number"].outputs[0], expected.outputs[0])
    assert outputs["number"].target_reward == 0.4


def test_no_draw_of_others_changes() -> None:
    prompts = ["ab", "ca", "bb", "cc"] * 5
    mixed = [AUTO if number % 3 == 0 else NUMBER for number in range(20)]
    plain = [replace(one, target_reward=0.4) for one in mixed]
    outputs = following().generate(prompts, mixed, use_tqdm=False)
    expected = letter_engine(seed=5).generate(prompts, plain, use_tqdm=False)
    for one, other, params in zip(outputs, expected, mixed, strict=True):
        assert params is AUTO or same(one.outputs[0], other.outputs[0])


def test_samples_keep_to_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "ENOUGH", 2)
    engine = following(share=0.2)
    run(engine, ["ca"] * 8, NUMBER)
    assert engine.stats()["calibration_tokens"] == 0  # of these no target is asked
    served, cheap = 0, replace(SHORT, max_attempts=1)  # a quarter of the cost of samples
    for _ in range(12):
        served += sum(output.drafted_tokens for output in run(engine, ["ca"] * 8, cheap))
    sampled = engine.stats()["calibration_tokens"]
    under_way = 2 * streaming.SAMPLES * AUTO.max_tokens
    assert 0.1 * (served + sampled) < sampled <= 0.2 * (served + sampled) + under_way


def test_samples_take_one_row_where_none_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "ENOUGH", 3)
    engine = following(max_rows=4)
    run(engine, ["ab", "ca", "bb"])
    while engine.samples_prompts:
        engine.step()
    unfinished = {str(number) for number in range(8)}
    for name in unfinished:
        engine.add_request(name, "ab", replace(AUTO, max_tokens=12, ignore_eos=True))
    most = {True: 0, False: 0}  # samples at once, by whether requests take all rows
    while unfinished or engine.samples_prompts:
        full = len(unfinished) >= 4
        unfinished -= {output.request_id for output in engine.step() if output.finished}
        stats = engine.stats()
        samples = stats["requests_running"] + stats["requests_waiting"] - len(unfinished)
        most[full] = max(most[full], int(samples) if full == (len(unfinished) >= 4) else 0)
    assert most[True] == 1
    assert most[False] > 1
    assert engine.stats()["calibration_samples"] > 3 * streaming.SAMPLES


@pytest.mark.parametrize("targets", ["pooled", "prompt", "best"])
def test_drift_is_followed(monkeypatch: pytest.MonkeyPatch, targets: str) -> None:
    monkeypatch.setattr(streaming, "WINDOW", 8)
    engine = following(reward=grouped, targets=targets)
    run(engine, ["aa", "ca", "cc"] * 3, SHORT)
    assert engine.target_of("ca") > -1.5
    for _ in range(4):
        run(engine, ["ab", "ca", "ba"] * 2, SHORT)
    of_ca, of_ab = engine.target_of("ca"), engine.target_of("ab")
    if targets == "pooled":
        assert of_ca == of_ab
    else:  # a prompt that is sampled has its own
        assert of_ca > -1.5 > -3.5 > of_ab
    for _ in range(4):
        run(engine, ["ab", "ba"] * 2, SHORT)
    assert engine.target_of("ab") < -3.5
    assert engine.target_of("cc") < -3.5  # nothing is left of its samples


def test_a_prompt_without_rewards_harms_only_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = following(reward=Gate())
    outputs = run(engine, ["cc", "ab", "cb", "ba"])
    assert [output.error is None for output in outputs] == [False, True, False, True]
    assert [len(output.outputs) for output in outputs] == [1] * 4
    lonely = following(reward=Gate())
    (output,) = run(lonely, "cc")
    assert "no prompt could be sampled" in output.error
    assert output.outputs[0].finish_reason == "error"
    assert lonely.stats()["pages_used"] == 0
    (output,) = run(lonely, "ab")
    assert output.error is None
    monkeypatch.setattr(streaming, "ENOUGH", 1)
    lonely = following(reward=Gate())
    first, second = run(lonely, ["cc", "ab"])  # the second waits for the first's samples at first
    assert first.error is not None
    assert second.error is None
    with pytest.raises(ValueError, match="pages"):
        following(num_pages=2).add_request("long", "ab", replace(AUTO, max_tokens=200))


def test_who_waits_can_leave_and_what_is_left_over_goes() -> None:
    engine = following()
    for name in ("leaves", "stays"):
        engine.add_request(name, "ab", replace(AUTO, n=2))
    with pytest.raises(ValueError, match="requests wait for their target"):
        engine.calibration = None
    left = engine.abort("leaves")
    assert left is not None
    assert left.finished
    assert [one.finish_reason for one in left.outputs] == ["abort"] * 2
    while engine.has_unfinished():
        outputs = engine.step()
    assert [one.request_id for one in outputs] == ["stays"]
    engine.add_request("third", "ab", AUTO)
    engine.abort("third")  # its samples go on where rounds do
    assert not engine.has_unfinished()
    assert engine.samples_prompts
    engine.reset_prefix_cache()
    assert not engine.samples_prompts
    assert engine.stats()["pages_used"] == 0
    engine.calibrate(["ab"], params=AUTO, use_tqdm=False)
    assert not engine.calibrates_on_requests


def test_what_is_refused() -> None:
    engine = letter_engine()
    for options, message in (
        ({"share": 0.0}, "share must be in"),
        ({"quantile": 1.0}, "quantile must be in"),
        ({"targets": "mean"}, "targets must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.calibrate_on_requests(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a reward model"):
        Engine(letter_model(), num_pages=40).calibrate_on_requests()
    engine.calibrate_on_requests()
    for params in (replace(AUTO, calibrate_prefixes=True), replace(AUTO, budget=4.0)):
        for ask in (engine.check_request, lambda *given: engine.add_request("x", *given)):
            with pytest.raises(NotCalibratedError, match=r"needs Engine\.calibrate first"):
                ask("ab", params)
    assert not engine.has_unfinished()
    assert not engine.samples_prompts


def test_samples_end_while_no_request_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = following(reward=Gate())
    rounds: list[int] = []

    def broken() -> Any:
        rounds.append(1)
        raise RuntimeError("broken")

    async def main() -> None:
        running = AsyncEngine(engine)
        with monkeypatch.context() as faulty:
            faulty.setattr(engine.loop, "step", broken)
            stream = running.submit("ab", AUTO)
            await stream.admitted()
            stream.abort()  # rounds of samples alone fail, and are not run for ever
            for _ in range(2000):
                await running.refresh()
                if rounds and not engine.samples_prompts:
                    break
                await asyncio.sleep(0.005)
            assert 0 < len(rounds) < 20
        assert running.healthy
        stream = running.submit("ab", AUTO)
        await stream.admitted()
        stream.abort()
        for _ in range(2000):
            await running.refresh()
            if running.stats()["calibration_samples"]:
                break
            await asyncio.sleep(0.005)
        stats = running.stats()
        assert (stats["calibration_samples"], stats["pages_used"]) == (streaming.SAMPLES, 0)
        outputs = [output async for output in running.generate("ab", AUTO)]
        assert outputs[-1].outputs[0].finish_reason is not None
        await running.drain()

    asyncio.run(main())
