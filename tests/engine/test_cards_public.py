"""``rules="public"``: the published loop of CARDS, where it differs from the paper's."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.bpe_engine import bpe_engine, responses_of, text_reward
from helpers.tiny_lm import small_model
from helpers.tiny_tokenizers import bpe_tokenizer

from stars_fast import CompletionOutput, StarsParams, _core, ops

PROMPTS = ["The film was slow at first, but", "A terrible kettle", "Not bad at all. " * 4]
PARAMS = StarsParams(
    method="cards",
    rules="public",
    segment_length=12,
    min_segment_length=2,
    entropy_threshold=5.84,  # the model is uncertain, by ln 400 = 5.99 at most
    max_tokens=21,
    max_attempts=3,
    target_reward=0.9,
    beta=0.3,
    candidates=1,
    temperature=1.0,
    top_k=30,
)


@pytest.fixture
def model() -> Any:
    """The small model with an end-of-sequence token that is drawn often."""
    chosen = small_model()
    before = chosen.generation_config.eos_token_id
    chosen.generation_config.eos_token_id = list(range(20, 400, 7))
    yield chosen
    chosen.generation_config.eos_token_id = before


def run(model: Any, params: StarsParams = PARAMS, **options: Any) -> list[CompletionOutput]:
    seeds = [50 + i for i in range(len(PROMPTS))]
    return responses_of(bpe_engine(model=model, **options), PROMPTS, params, seeds)


@torch.inference_mode()
def draw(ids: list[int], seed: int, position: int, attempt: int, segment: int) -> tuple[int, float]:
    """A token and the entropy of its distribution."""
    token, _, _, entropy, _ = ops.sample(
        small_model()(torch.tensor([ids]), use_cache=False).logits[:, -1],
        torch.tensor([PARAMS.temperature]),
        torch.tensor([PARAMS.top_k], dtype=torch.int32),
        torch.ones(1),
        torch.zeros(1),
        torch.tensor([seed]),
        torch.tensor([position]),
        torch.tensor([attempt]),
        torch.tensor([segment]),
    )
    return int(token), float(entropy)


def written_out(prompt: str, seed: int) -> tuple[list[int], list[tuple[int, int, str]]]:
    """The loop of the published code: tokens, and (length, attempts, how it ended) of segments."""
    p, tokenizer = PARAMS, bpe_tokenizer()
    schedule = _core.Schedule(
        target_reward=0.9, alpha=p.alpha, beta=p.beta, max_tokens=p.max_tokens, hard=False
    )
    prompt_ids = tokenizer(prompt)["input_ids"]
    first = text_reward([prompt], [""])[0]
    response: list[int] = []
    segments = []
    while len(response) < p.max_tokens:  # and a segment may end past it
        seen: list[tuple[float, list[int]]] = []
        while True:
            drawn: list[int] = []
            while len(drawn) < p.segment_length:
                position = len(response) + len(drawn)
                token, entropy = draw(
                    prompt_ids + response + drawn, seed, position, len(seen), len(segments)
                )
                if len(drawn) >= p.min_segment_length and entropy >= p.entropy_threshold:
                    break
                drawn.append(token)
            text = tokenizer.decode(response + drawn, skip_special_tokens=True)
            r = text_reward([prompt], [text])[0]
            seen.append((r, drawn))
            if len(seen) > p.max_attempts:
                how = "fallback"
                drawn = max(seen, key=lambda pair: pair[0])[1]
                break
            tau = schedule.threshold(first, len(response) + len(drawn))
            if schedule.accepts(
                r, tau, _core.accept_uniform(seed, len(response), len(seen) - 1, len(segments))
            ):
                how = "test"
                break
        segments.append((len(drawn), len(seen), how))
        response += drawn
    return response, segments


def test_same_as_the_loop_written_out(model: Any) -> None:
    ended = set()
    for i, output in enumerate(run(model)):
        tokens, segments = written_out(PROMPTS[i], 50 + i)
        assert output.token_ids == tokens
        assert [(s.end - s.start, s.attempts, s.accepted) for s in output.segments] == segments
        assert output.finish_reason == "length"
        assert set(output.token_ids) & set(model.generation_config.eos_token_id)
        ended |= {(attempts, how) for _, attempts, how in segments}
    assert {(1, "test"), (PARAMS.max_attempts + 1, "fallback")} <= ended
    assert max(attempts for attempts, how in ended if how == "test") <= PARAMS.max_attempts


def test_some_end_past_the_budget(model: Any) -> None:
    lengths = {len(output.token_ids) for output in run(model)}
    assert max(lengths) > PARAMS.max_tokens
    paper = run(model, dataclasses.replace(PARAMS, rules="paper"))
    assert {output.finish_reason for output in paper} == {"stop"}


@pytest.mark.parametrize("candidates", [3, "auto"])
def test_any_number_of_candidates_and_few_pages(model: Any, candidates: Any) -> None:
    want = [output.segments for output in run(model)]
    params = dataclasses.replace(PARAMS, candidates=candidates)
    assert [output.segments for output in run(model, params)] == want
    assert [output.segments for output in run(model, params, num_pages=14)] == want


def test_the_last_attempt_is_kept_for_its_reward_alone(model: Any) -> None:
    """A hard threshold that nothing reaches: R + 1 attempts, and the best of all of them."""
    params = dataclasses.replace(PARAMS, acceptance="hard", target_reward=2.0, alpha=1.0)
    outputs = run(model, dataclasses.replace(params, trace=True))
    last_was_best = False
    for segment in (s for output in outputs for s in output.segments):
        assert (segment.attempts, segment.accepted) == (PARAMS.max_attempts + 1, "fallback")
        others = [attempt.reward for attempt in segment.rejected]
        assert len(others) == PARAMS.max_attempts
        assert segment.reward == max([*others, segment.reward])
        numbers = {attempt.number for attempt in segment.rejected}
        last_was_best |= PARAMS.max_attempts not in numbers
    assert last_was_best


def test_a_stop_token_of_ones_own_still_ends(model: Any) -> None:
    drawn = run(model)[0].token_ids
    params = dataclasses.replace(PARAMS, stop_token_ids=[drawn[2]])
    output = run(model, params)[0]
    assert output.finish_reason == "stop"
    assert output.token_ids == drawn[:3]


def test_one_greedy_attempt_is_tested(model: Any) -> None:
    """It is the only one, not the one more that is made without a test."""
    for target, ended in ((-9.0, "test"), (9.0, "fallback")):
        greedy = dataclasses.replace(
            PARAMS, temperature=0.0, acceptance="hard", alpha=1.0, target_reward=target
        )
        for output in run(model, greedy):
            assert {(s.attempts, s.accepted) for s in output.segments} == {(1, ended)}
            assert all(s.threshold == target for s in output.segments)
