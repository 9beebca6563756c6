"""Segments that end by entropy: the engine against the loop written out, one token at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.backends import device_of
from helpers.bpe_engine import bpe_engine, responses_of, text_reward
from helpers.tiny_lm import small_model
from helpers.tiny_tokenizers import bpe_tokenizer

from stars_fast import StarsParams, _core, ops

PROMPTS = ["The film was slow at first, but", "A terrible kettle", "Not bad at all. " * 4]
PARAMS = StarsParams(
    method="cards",
    segment_length=12,
    min_segment_length=2,
    entropy_threshold=5.84,  # the model is uncertain, by ln 400 = 5.99 at most
    max_tokens=40,
    max_attempts=5,
    target_reward=0.5,
    beta=0.6,
    candidates=1,
    temperature=1.0,
    top_k=30,
    ignore_eos=True,
)


def run(params: StarsParams = PARAMS, prompts: list[str] = PROMPTS, **options: Any) -> list[Any]:
    seeds = [50 + i for i in range(len(prompts))]
    return responses_of(bpe_engine(**options), prompts, params, seeds)


@torch.inference_mode()
def written_out(prompt: str, seed: int) -> tuple[list[int], list[tuple[int, int]]]:
    """The same loop without cache or rounds: tokens, and (length, attempts) of each segment."""
    p, tokenizer = PARAMS, bpe_tokenizer()
    schedule = _core.Schedule(
        target_reward=0.5, alpha=p.alpha, beta=p.beta, max_tokens=p.max_tokens, hard=False
    )
    prompt_ids = tokenizer(prompt)["input_ids"]
    prompt_reward = text_reward([prompt], [""])[0]
    response: list[int] = []
    segments = []
    while len(response) < p.max_tokens:
        longest = min(p.segment_length, p.max_tokens - len(response))
        best: tuple[float, list[int]] = (-9e9, [])
        for attempt in range(p.max_attempts):
            drawn: list[int] = []
            while len(drawn) < longest:
                ids = torch.tensor([prompt_ids + response + drawn])
                logits = small_model()(ids, use_cache=False).logits[:, -1]
                one = {name: torch.tensor([getattr(p, name)]) for name in ("temperature", "top_p")}
                token, _, _, entropy, _ = ops.sample(
                    logits,
                    one["temperature"],
                    torch.tensor([p.top_k], dtype=torch.int32),
                    one["top_p"],
                    torch.zeros(1),
                    torch.tensor([seed]),
                    torch.tensor([len(response) + len(drawn)]),
                    torch.tensor([attempt]),
                    torch.tensor([len(segments)]),
                )
                if len(drawn) >= p.min_segment_length and float(entropy) >= p.entropy_threshold:
                    break
                drawn.append(int(token))
            text = tokenizer.decode(response + drawn, skip_special_tokens=True)
            r = text_reward([prompt], [text])[0]
            best = max(best, (r, drawn), key=lambda pair: pair[0])
            tau = schedule.threshold(prompt_reward, len(response) + len(drawn))
            if schedule.accepts(
                r, tau, _core.accept_uniform(seed, len(response), attempt, len(segments))
            ):
                best = (r, drawn)
                break
        segments.append((len(best[1]), attempt + 1))
        response += best[1]
    return response, segments


def test_same_as_the_loop_written_out() -> None:
    lengths = set()
    for i, output in enumerate(run()):
        tokens, segments = written_out(PROMPTS[i], _core_seed(50 + i))
        assert output.token_ids == tokens
        assert [(s.end - s.start, s.attempts) for s in output.segments] == segments
        lengths |= {length for length, _ in segments}
    # Ended by entropy at several lengths, at the shortest, and not at all.
    assert {PARAMS.min_segment_length, PARAMS.segment_length} < lengths


def _core_seed(seed: int) -> int:
    from stars_fast.seeds import derive_seed

    return derive_seed(seed, 0)


@pytest.mark.parametrize("candidates", [4, "auto"])
def test_any_number_of_candidates(candidates: Any) -> None:
    want = [output.token_ids for output in run()]
    got = run(dataclasses.replace(PARAMS, candidates=candidates))
    assert [output.token_ids for output in got] == want


def test_beside_segments_of_fixed_length() -> None:
    both = bpe_engine()
    fixed = PARAMS.with_method("stars")
    each = [dataclasses.replace(p, seed=50) for p in (PARAMS, fixed)]
    ragged, even = both.generate([PROMPTS[0]] * 2, each, use_tqdm=False)
    assert ragged.outputs[0].token_ids == run()[0].token_ids
    assert {s.end - s.start for s in even.outputs[0].segments} == {12, 4}


def test_no_entropy_is_high_enough() -> None:
    never = run(dataclasses.replace(PARAMS, entropy_threshold=100.0))
    fixed = run(PARAMS.with_method("stars"))
    assert [output.token_ids for output in never] == [output.token_ids for output in fixed]


def test_on_the_kernels() -> None:
    short = dataclasses.replace(PARAMS, max_tokens=6, segment_length=3, max_attempts=2)
    model = small_model(layers=1)  # little work for the interpreter
    want = run(short, PROMPTS[:2], model=model)
    model.to(device_of("triton"))
    got = run(short, PROMPTS[:2], model=model, backend="triton")
    assert [output.segments for output in got] == [output.segments for output in want]
    # Entropy has ended some.
    assert {s.end - s.start for output in got for s in output.segments} > {3}
