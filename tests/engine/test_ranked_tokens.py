"""Methods that go through the most likely tokens: the engine against loops of plain passes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.bpe_engine import bpe_engine, responses_of
from helpers.outputs import same
from helpers.tiny_lm import small_model
from helpers.tiny_tokenizers import bpe_tokenizer

from stars_fast import CompletionOutput, StarsParams, _core

PROMPTS = ["The film was slow at first, but", "A terrible kettle", "Not bad at all. " * 4]
ARGS = StarsParams(method="args", candidates=6, reward_weight=0.8, temperature=0.0, max_tokens=20)
MARA = StarsParams(method="mara", max_attempts=4, max_tokens=20)


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    """Also a logit of "accept": about half of all are above 0."""
    return [((len(r) * 7919 + sum(map(ord, r[-6:]))) % 100) / 25 - 2 for r in responses]


def run(params: StarsParams, rewards: Any = reward, **options: Any) -> list[CompletionOutput]:
    seeds = [50 + i for i in range(len(PROMPTS))]
    return responses_of(bpe_engine(rewards, **options), PROMPTS, params, seeds)


def uniform(seed: int, position: int, attempt: int, purpose: int) -> float:
    """The uniform of one decision, from the generator's words; segment i is token i."""
    key = [seed & 0xFFFFFFFF, seed >> 32]
    (words,) = _core.philox4x32(
        np.array([[0, position, attempt, position << 3 | purpose]]), np.array([key])
    )
    bits = (int(words[0]) << 32 | int(words[1])) >> 12
    return (bits + 0.5) * 2.0**-52


@torch.inference_mode()
def likely(prompt: str, response: list[int], count: int) -> list[tuple[int, float]]:
    """The most likely next tokens with their log-probabilities."""
    ids = bpe_tokenizer()(prompt)["input_ids"] + response
    logits = small_model()(torch.tensor([ids]), use_cache=False).logits[0, -1]
    values, tokens = logits.log_softmax(-1).topk(count)
    return list(zip(tokens.tolist(), values.tolist(), strict=True))


def reward_of(prompt: str, response: list[int]) -> float:
    text = bpe_tokenizer().decode(response, skip_special_tokens=True)
    return reward([prompt], [text])[0]


def args_written_out(prompt: str, seed: int, params: StarsParams) -> list[int]:
    """ARGS (arXiv 2402.01694): the next token by log p + w r, greedy or by a Gumbel draw."""
    response: list[int] = []
    while len(response) < params.max_tokens:
        keys = []
        for rank, (token, log_p) in enumerate(likely(prompt, response, params.num_candidates)):
            key = log_p + params.reward_weight * reward_of(prompt, [*response, token])
            if params.temperature > 0:
                noise = -math.log(-math.log(uniform(seed, len(response), rank, 2)))
                key = key / params.temperature + noise
            keys.append((key, -rank, token))
        response.append(max(keys)[2])
        if response[-1] == small_model().config.eos_token_id:
            break
    return response


def mara_written_out(
    prompt: str, seed: int, params: StarsParams
) -> tuple[list[int], list[tuple[int, str]]]:
    """MARA (arXiv 2505.19743): tokens in order, the best of the rejected if none is accepted.

    Returns the tokens, and (attempts, how it ended) of each.
    """
    response: list[int] = []
    steps = []
    while len(response) < params.max_tokens:
        seen = []
        for rank, (token, _) in enumerate(likely(prompt, response, params.max_attempts)):
            logit = reward_of(prompt, [*response, token])
            accept = 1 / (1 + math.exp(-logit))
            seen.append((logit, -rank, token))
            hard = params.acceptance == "hard"
            if accept >= 0.5 if hard else uniform(seed, len(response), rank, 1) < accept:
                steps.append((rank + 1, "test"))
                break
        else:
            steps.append((params.max_attempts, "fallback"))
            token = max(seen)[2]
        response.append(token)
        if token == small_model().config.eos_token_id:
            break
    return response, steps


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("weight", [0.0, 0.8])
def test_args_is_the_loop_written_out(weight: float, temperature: float) -> None:
    params = dataclasses.replace(ARGS, reward_weight=weight, temperature=temperature)
    outputs = run(params)
    for i, output in enumerate(outputs):
        assert output.token_ids == args_written_out(PROMPTS[i], 50 + i, params)
        assert {(s.attempts, s.accepted) for s in output.segments} == {(6, "choice")}
        assert output.reward == reward_of(PROMPTS[i], output.token_ids)


def test_args_without_reward_is_greedy() -> None:
    greedy = ARGS.with_method("vanilla")
    outputs = run(dataclasses.replace(ARGS, reward_weight=0.0))
    assert [o.token_ids for o in outputs] == [o.token_ids for o in run(greedy)]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_args_in_however_many_rounds(temperature: float) -> None:
    params = dataclasses.replace(ARGS, temperature=temperature, trace=True, max_tokens=12)
    want = run(params)
    for options in ({"max_rows": 2}, {"num_pages": 11, "overlap_scoring": True}):
        assert [o.segments for o in run(params, **options)] == [o.segments for o in want]


@pytest.mark.parametrize("acceptance", ["soft", "hard"])
def test_mara_is_the_loop_written_out(acceptance: Any) -> None:
    params = dataclasses.replace(MARA, acceptance=acceptance)
    ended = set()
    for i, output in enumerate(run(params)):
        tokens, steps = mara_written_out(PROMPTS[i], 50 + i, params)
        assert output.token_ids == tokens
        assert [(s.attempts, s.accepted) for s in output.segments] == steps
        logit = reward_of(PROMPTS[i], output.token_ids)
        assert output.reward == pytest.approx(-math.log1p(math.exp(-logit)))
        ended |= set(steps)
    assert {(1, "test"), (2, "test"), (4, "fallback")} <= ended


@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("acceptance", ["soft", "hard"])
def test_mara_with_any_number_of_candidates(acceptance: Any, candidates: int) -> None:
    params = dataclasses.replace(MARA, acceptance=acceptance)
    want = [o.segments for o in run(params)]
    fixed = dataclasses.replace(params, candidates=candidates)
    assert [o.segments for o in run(fixed, max_rows=2, num_pages=11)] == want


@pytest.mark.parametrize(("logit", "attempts"), [(0.0, 1), (-1e-6, 4), (800.0, 1), (-800.0, 4)])
def test_mara_accepts_from_one_half_on(logit: float, attempts: int) -> None:
    params = dataclasses.replace(MARA, acceptance="hard", max_tokens=3)
    outputs = run(params, lambda prompts, responses: [logit] * len(prompts))
    assert {s.attempts for output in outputs for s in output.segments} == {attempts}
    # Of equal logits the first is kept, and so the most likely token.
    greedy = run(params.with_method("vanilla", temperature=0.0))
    assert [o.token_ids for o in outputs] == [o.token_ids for o in greedy]


def test_more_than_the_vocabulary_is_refused() -> None:
    for params, name in ((ARGS, "candidates"), (MARA, "max_attempts")):
        changed = dataclasses.replace(params, **{name: 401})
        match = rf"{name} must be at most the tokens that can be drawn, 400, .*401"
        with pytest.raises(ValueError, match=match):
            bpe_engine(reward).add_request("a", PROMPTS[0], changed)
        # The end of the sequence is none of them before there are so many tokens.
        held = dataclasses.replace(params, min_tokens=2, ignore_eos=False, **{name: 400})
        with pytest.raises(ValueError, match=rf"{name} must .*, 399, .*400"):
            bpe_engine(reward).add_request("a", PROMPTS[0], held)


def test_seed_does_not_matter_where_nothing_is_drawn() -> None:
    for params in (ARGS, dataclasses.replace(MARA, acceptance="hard")):
        one = bpe_engine(reward)
        each = [dataclasses.replace(params, seed=seed) for seed in (1, 2)]
        first, second = one.generate([PROMPTS[0]] * 2, each, use_tqdm=False)
        assert first.outputs[0].segments == second.outputs[0].segments


@pytest.mark.parametrize("params", [ARGS, MARA], ids=["args", "mara"])
def test_on_the_kernels(params: StarsParams) -> None:
    number = "candidates" if params.method == "args" else "max_attempts"
    short = dataclasses.replace(params, max_tokens=2, seed=2, **{number: 2})
    want, got = (
        bpe_engine(reward, **options).generate(PROMPTS[1], short, use_tqdm=False)[0]
        for options in ({}, {"backend": "triton", "max_rows": 2})
    )
    assert got.error is None
    assert same(got.outputs[0], want.outputs[0])
