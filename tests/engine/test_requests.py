"""The engine's requests: stops, steps, aborts, chats, calibration, traces, statistics."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from helpers.outputs import same
from helpers.tiny_architectures import tiny_lm
from helpers.tiny_lm import LETTERS, letter_model, letter_tokenizer, small_model
from helpers.tiny_tokenizers import bpe_tokenizer

from stars_fast import Engine, RequestOutput, StarsParams

PARAMS = StarsParams(
    segment_length=4,
    max_tokens=12,
    max_attempts=3,
    target_reward=0.5,
    temperature=1.0,
    top_k=0,
    seed=3,
    ignore_eos=True,
)
VANILLA = PARAMS.with_method("vanilla")


def letters_alike(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(r.count("a") - r.count("b")) / 2 for r in responses]


@pytest.fixture
def engine() -> Engine:
    return Engine(
        letter_model(), letters_alike, tokenizer=letter_tokenizer(), num_pages=400, page_size=4
    )


def text_of(token_ids: list[int]) -> str:
    """Text as the engine writes it: end-of-sequence is a special token and no part of it."""
    return "".join(LETTERS[token] for token in token_ids).replace("$", "")


def only(engine: Engine, params: StarsParams, prompt: Any = "ab") -> Any:
    (output,) = engine.generate(prompt, params, use_tqdm=False)
    assert output.error is None
    return output.outputs[0]


class TestStops:
    def test_budget(self, engine: Engine) -> None:
        output = only(engine, VANILLA)
        assert len(output.token_ids) == 12
        assert output.finish_reason == "length"

    def test_eos_ends_and_is_no_text(self, engine: Engine) -> None:
        for seed in range(20):
            params = dataclasses.replace(VANILLA, ignore_eos=False, seed=seed, max_tokens=40)
            output = only(engine, params)
            if output.finish_reason == "stop":
                break
        assert output.token_ids[-1] == LETTERS.index("$")
        assert LETTERS.index("$") not in output.token_ids[:-1]
        assert output.text == text_of(output.token_ids[:-1])

    def test_stop_token(self, engine: Engine) -> None:
        free = only(engine, VANILLA)
        stop = free.token_ids[5]
        output = only(engine, dataclasses.replace(VANILLA, stop_token_ids=[stop]))
        at = free.token_ids.index(stop)
        assert output.token_ids == free.token_ids[: at + 1]
        assert output.text == text_of(free.token_ids[:at])
        assert output.finish_reason == "stop"

    def test_stop_text_across_a_segment_border(self, engine: Engine) -> None:
        free = only(engine, VANILLA)
        stop = free.text[3:6]  # segments have 4 tokens
        output = only(engine, dataclasses.replace(VANILLA, stop=stop))
        at = free.text.index(stop)
        assert output.text == free.text[:at]
        assert output.token_ids == free.token_ids[: len(output.token_ids)]
        assert text_of(output.token_ids) == free.text[: at + len(stop)]
        assert output.token_ids[-1] != LETTERS.index("$")
        assert output.finish_reason == "stop"

    def test_earliest_of_several_stop_texts(self, engine: Engine) -> None:
        free = only(engine, VANILLA)
        stops = [free.text[6:9], free.text[1:3]]
        output = only(engine, dataclasses.replace(VANILLA, stop=stops))
        assert output.text == free.text[: min(free.text.index(s) for s in stops)]

    def test_stop_text_in_scored_segments(self, engine: Engine) -> None:
        free = only(engine, PARAMS)
        stop = free.text[5:7]
        output = only(engine, dataclasses.replace(PARAMS, stop=[stop]))
        assert stop not in output.text
        assert output.finish_reason in ("stop", "length")
        assert output.segments[-1].end == len(output.token_ids)

    def test_the_reward_is_that_of_the_text_without_its_stop_token(self, engine: Engine) -> None:
        stop = LETTERS.index("a")  # each of which counts for the reward
        one = dataclasses.replace(PARAMS, stop_token_ids=[stop], max_attempts=1)
        for seed in range(4):
            output = only(engine, dataclasses.replace(one, seed=seed))
            assert output.finish_reason == "stop"
            assert output.token_ids[-1] == stop
            assert [output.reward] == engine.score("ab", [output.text])


class TestSegments:
    def test_they_cover_the_response(self, engine: Engine) -> None:
        output = only(engine, PARAMS)
        assert [s.start for s in output.segments] == [0, 4, 8]
        assert [s.end for s in output.segments] == [4, 8, 12]
        for segment in output.segments:
            text = text_of(output.token_ids[: segment.end])
            assert segment.reward == letters_alike([""], [text])[0]
            start = 0.5 * letters_alike([""], [""])[0] + 0.5 * 0.5
            tau = min(0.5, start + (0.5 - start) * segment.end / 12)
            assert segment.threshold == pytest.approx(tau)
            assert 1 <= segment.attempts <= 3
        assert output.reward == output.segments[-1].reward

    @pytest.mark.parametrize("candidates", [1, 3])
    def test_trace_holds_every_other_attempt(self, engine: Engine, candidates: int) -> None:
        params = dataclasses.replace(
            PARAMS, trace=True, candidates=candidates, target_reward=30.0, acceptance="hard"
        )
        output = only(engine, params)
        for segment in output.segments:
            assert segment.accepted == "fallback"
            assert segment.attempts == 3
            assert len(segment.rejected) == 2
            before = output.token_ids[: segment.start]
            for attempt in segment.rejected:
                text = text_of([*before, *attempt.token_ids])
                assert attempt.reward == letters_alike([""], [text])[0]
                assert segment.reward is not None
                assert attempt.reward <= segment.reward
        assert not only(engine, PARAMS).segments[0].rejected

    def test_greedy_makes_one_attempt(self, engine: Engine) -> None:
        params = dataclasses.replace(PARAMS, temperature=0.0, target_reward=9.0, acceptance="hard")
        output = only(engine, params)
        assert [s.attempts for s in output.segments] == [1, 1, 1]
        vanilla = only(engine, dataclasses.replace(VANILLA, temperature=0.0))
        assert output.token_ids == vanilla.token_ids


def test_greedy_vanilla_equals_generate() -> None:
    model = small_model()
    prompts = ["The film", "A terrible kettle: it leaks", "Not bad"]
    tokenizer = bpe_tokenizer()
    engine = Engine(model, tokenizer=tokenizer, num_pages=200)
    params = StarsParams(method="vanilla", temperature=0.0, max_tokens=30)
    for prompt, output in zip(
        prompts, engine.generate(prompts, params, use_tqdm=False), strict=True
    ):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        reference = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False
        )
        assert output.outputs[0].token_ids == reference[0, ids.shape[1] :].tolist()


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    model = small_model()
    engine = Engine(model, tokenizer=bpe_tokenizer(), num_pages=200)
    params = StarsParams(method="vanilla", temperature=0.7, top_k=5, max_tokens=20, seed=1)
    (output,) = engine.generate("The film", params, use_tqdm=False)
    ids = torch.tensor([output.prompt_token_ids + output.outputs[0].token_ids])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids).logits[0], -1)
    start = len(output.prompt_token_ids)
    expected = [float(logprobs[start + i - 1, t]) for i, t in enumerate(ids[0, start:].tolist())]
    np.testing.assert_allclose(output.outputs[0].logprobs, expected, atol=1e-4)


class TestSteps:
    def drain(self, engine: Engine) -> dict[str, list[RequestOutput]]:
        seen: dict[str, list[RequestOutput]] = {}
        while engine.has_unfinished():
            for output in engine.step():
                seen.setdefault(output.request_id, []).append(output)
        return seen

    def test_each_accepted_segment_is_reported(self, engine: Engine) -> None:
        engine.add_request("one", "ab", PARAMS)
        engine.add_request("two", [0, 1, 2], dataclasses.replace(PARAMS, max_tokens=5))
        seen = self.drain(engine)
        assert [len(o.outputs[0].segments) for o in seen["one"]] == [1, 2, 3]
        assert [o.finished for o in seen["one"]] == [False, False, True]
        assert [o.outputs[0].token_ids for o in seen["two"]][-1][:4] == (
            seen["two"][0].outputs[0].token_ids
        )
        assert seen["one"][0].outputs[0].token_ids == seen["one"][-1].outputs[0].token_ids[:4]
        assert engine.stats()["pages_used"] == 0

    def test_requests_join_and_leave_between_rounds(self, engine: Engine) -> None:
        expected = only(engine, dataclasses.replace(PARAMS, seed=7))
        engine.add_request("early", "ba", PARAMS)
        engine.step()
        engine.add_request("late", "ab", dataclasses.replace(PARAMS, seed=7))
        assert same(self.drain(engine)["late"][-1].outputs[0], expected)

    def test_abort(self, engine: Engine) -> None:
        engine.add_request("gone", "ab", dataclasses.replace(VANILLA, n=2))
        engine.add_request("stays", "ab", PARAMS)
        engine.step()
        output = engine.abort("gone")
        assert output is not None
        assert [o.finish_reason for o in output.outputs] == ["abort", "abort"]
        assert [len(o.token_ids) for o in output.outputs] == [4, 4]
        assert engine.abort("gone") is None
        assert set(self.drain(engine)) == {"stays"}
        assert engine.stats()["pages_used"] == 0

    def test_id_in_use(self, engine: Engine) -> None:
        engine.add_request("one", "ab", PARAMS)
        with pytest.raises(ValueError, match="request_id 'one' is in use"):
            engine.add_request("one", "ab", PARAMS)
        with pytest.raises(ValueError, match="unfinished"):
            engine.generate("ab", PARAMS, use_tqdm=False)

    def test_a_failing_round_can_be_run_again(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = only(engine, PARAMS)
        engine.add_request("one", "ab", PARAMS)
        engine.step()

        def fail(*args: Any) -> None:
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(engine.loop.drafter, "draft", fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                engine.step()
        assert self.drain(engine)["one"][-1].outputs[0] == expected


def test_best_of_n_picks_the_best_of_the_vanilla_samples(engine: Engine) -> None:
    vanilla = dataclasses.replace(VANILLA, n=6)
    best = PARAMS.with_method("best_of_n", candidates=6)
    (samples,) = engine.generate("ab", vanilla, use_tqdm=False)
    rewards = letters_alike([""] * 6, [o.text for o in samples.outputs])
    chosen = only(engine, best)
    assert len(set(rewards)) > 1
    assert chosen.token_ids == samples.outputs[rewards.index(max(rewards))].token_ids
    assert chosen.reward == max(rewards)


def test_best_of_n_is_reported_once(engine: Engine) -> None:
    engine.add_request("one", "ab", PARAMS.with_method("best_of_n", n=2))
    seen = []
    while engine.has_unfinished():
        seen += engine.step()
    assert len(seen) == 1
    assert len(seen[0].outputs) == 2
    for output in seen[0].outputs:
        assert output.reward == letters_alike([""], [output.text])[0]


def test_chat_prompt_goes_through_the_template() -> None:
    tokenizer = bpe_tokenizer(chat="llama3")
    engine = Engine(small_model(), tokenizer=tokenizer, num_pages=200)
    messages = [{"role": "user", "content": "Not bad at all?"}]
    (output,) = engine.generate([messages], VANILLA, use_tqdm=False)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert output.prompt == text
    assert output.prompt_token_ids == tokenizer(text, add_special_tokens=False).input_ids
    assert engine.generate(messages, VANILLA, use_tqdm=False) == [
        dataclasses.replace(output, request_id="generate-0")
    ]


class TestCalibration:
    def test_quantile_of_vanilla_rewards(self, engine: Engine) -> None:
        found = engine.calibrate(["ab", "ba"], 0.75, 6, VANILLA, use_tqdm=False)
        assert len(found.rewards) == 12
        assert found.target_reward == pytest.approx(np.quantile(found.rewards, 0.75))
        assert engine.calibration == found

    def test_auto_calibrates_once_and_none_follows(self, engine: Engine) -> None:
        with pytest.raises(ValueError, match="calibrate first"):
            engine.add_request("x", "ab", dataclasses.replace(PARAMS, target_reward="auto"))
        output = only(engine, dataclasses.replace(PARAMS, target_reward="auto"))
        calibration = engine.calibration
        assert calibration is not None
        assert max(s.threshold for s in output.segments) <= calibration.target_reward
        assert same(only(engine, dataclasses.replace(PARAMS, target_reward=None)), output)
        assert engine.calibration is calibration

    def test_calibrating_does_not_shift_the_seeds_that_follow(self) -> None:
        def tokens(calibrate: bool) -> list[int]:
            one = Engine(letter_model(), letters_alike, tokenizer=letter_tokenizer(), num_pages=99)
            if calibrate:
                one.calibrate("ab", params=VANILLA, use_tqdm=False)
            ids: list[int] = only(one, dataclasses.replace(PARAMS, seed=None)).token_ids
            return ids

        assert tokens(True) == tokens(False)


def test_score(engine: Engine) -> None:
    assert engine.score(["ab", "c"], ["aab", ""]) == [0.5, 0.0]
    with pytest.raises(ValueError, match="2 prompts but 1 responses"):
        engine.score(["ab", "c"], ["a"])


def test_stats_count_what_happened(engine: Engine) -> None:
    output = only(engine, dataclasses.replace(PARAMS, candidates=1))
    stats = engine.stats()
    attempts = sum(s.attempts for s in output.segments)
    assert stats["attempts"] == attempts == stats["rounds"]
    assert stats["drafted_tokens"] == 4 * attempts
    assert stats["accepted_tokens"] == 12
    assert stats["segments"] == 3
    assert stats["fallbacks"] == sum(s.accepted == "fallback" for s in output.segments)
    # The page size divides the segment length.
    assert stats["page_copies"] == stats["copied_bytes"] == 0
    assert stats["seconds_draft"] > 0


def test_segments_that_end_inside_a_page_are_copied(engine: Engine) -> None:
    only(engine, dataclasses.replace(PARAMS, segment_length=3, candidates=2))
    stats = engine.stats()
    assert stats["page_copies"] > 0
    # A token of `letter_model`: 2 layers, keys and values, 1 head of 8, float32.
    tokens, rest = divmod(stats["copied_bytes"], 2 * 2 * 8 * 4)
    assert rest == 0
    assert stats["page_copies"] <= tokens < 4 * stats["page_copies"]


@pytest.mark.parametrize("backend", ["pytorch", "triton"])
def test_a_row_that_has_ended_goes_no_further_than_the_context(backend: Any) -> None:
    """Beside a longer one; learned position embeddings have no row for what lies behind."""
    context = 12  # and one layer of one head: the interpreter is slow
    model = tiny_lm(
        "gpt2", max_position_embeddings=context, num_hidden_layers=1, num_attention_heads=1
    ).to("cuda" if torch.cuda.is_available() else "cpu")
    engine = Engine(model, backend=backend, num_pages=60, page_size=8, max_rows=4)
    params = StarsParams(method="vanilla", ignore_eos=True, seed=0, top_k=0)
    each = [
        dataclasses.replace(params, max_tokens=2, segment_length=2),
        dataclasses.replace(params, max_tokens=5, segment_length=5),
    ]
    prompts = [[5] * (context - 2), [6, 7]]
    outputs = engine.generate(prompts, each, use_tqdm=False)
    assert [output.error for output in outputs] == [None, None]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [2, 5]


def test_what_rows_cost_leaves_out_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler learns the cost of rows: a round is not dearer for the prompts it scores."""
    now = 0.0

    def slow_on_prompts(prompts: list[str], responses: list[str]) -> list[float]:
        nonlocal now
        now += sum(1.0 if response else 100.0 for response in responses)
        return [1.0] * len(responses)

    engine = Engine(
        letter_model(), slow_on_prompts, tokenizer=letter_tokenizer(), num_pages=400, page_size=4
    )
    monkeypatch.setattr("stars_fast.engine.round.time.perf_counter", lambda: now)
    commit, seconds = engine.loop._commit, []
    monkeypatch.setattr(
        engine.loop, "_commit", lambda done: seconds.append(done.seconds["score"]) or commit(done)
    )
    only(engine, dataclasses.replace(PARAMS, candidates=1))
    assert now == 100.0 + len(seconds)
    assert set(seconds) == {1.0}
