"""A request's tokens depend on the request alone."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_lm import small_model
from helpers.tiny_rewards import reward_model
from helpers.tiny_tokenizers import bpe_tokenizer

from stars_fast import Engine, StarsParams

PROMPTS = [
    "The film was slow at first, but",
    "A terrible kettle",
    "The film was slow at first, but the ending",
    "Not bad at all. " * 4,
]
PARAMS = StarsParams(
    segment_length=8,
    max_tokens=40,
    max_attempts=5,
    target_reward=3.0,
    beta=0.6,
    alpha=0.8,
    candidates=1,
    temperature=1.0,
    top_k=30,
    top_p=0.95,
    ignore_eos=True,
)


def engine(**options: Any) -> Engine:
    tokenizer = bpe_tokenizer()
    settings = {"num_pages": 600, "page_size": 8, "max_rows": 64}
    return Engine(
        small_model(),
        reward_model("llama", tokenizer),
        tokenizer=tokenizer,
        reward_template="plain",
        reward_tokenizer=tokenizer,
        **(settings | options),
    )


def run(prompts: list[str], params: StarsParams, **options: Any) -> list[list[int]]:
    each = [dataclasses.replace(params, seed=50 + PROMPTS.index(p)) for p in prompts]
    outputs = engine(**options).generate(prompts, each, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * len(prompts)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    tokens = run(PROMPTS, PARAMS)
    assert len({tuple(t) for t in tokens}) == len(PROMPTS)
    return tokens


def test_segments_are_rejected_and_fall_back() -> None:
    outputs = engine().generate(PROMPTS, dataclasses.replace(PARAMS, seed=1), use_tqdm=False)
    segments = [s for output in outputs for s in output.outputs[0].segments]
    assert {s.accepted for s in segments} == {"test", "fallback"}
    assert {1, 2, PARAMS.max_attempts} <= {s.attempts for s in segments}


@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_any_page_size(expected: list[list[int]], page_size: int) -> None:
    assert run(PROMPTS, PARAMS, page_size=page_size, num_pages=2000 // page_size) == expected


@pytest.mark.parametrize("candidates", [3, 8, "auto"])
def test_any_number_of_candidates(expected: list[list[int]], candidates: Any) -> None:
    assert run(PROMPTS, dataclasses.replace(PARAMS, candidates=candidates)) == expected


def test_alone(expected: list[list[int]]) -> None:
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert run([prompt], PARAMS) == [tokens]


def test_other_order_and_few_rows(expected: list[list[int]]) -> None:
    assert run(PROMPTS[::-1], PARAMS, max_rows=2) == expected[::-1]


@pytest.mark.parametrize("candidates", [1, 8])
def test_with_preemption(expected: list[list[int]], candidates: int) -> None:
    small = engine(num_pages=26, page_size=8)
    each = [dataclasses.replace(PARAMS, seed=50 + i, candidates=candidates) for i in range(4)]
    outputs = small.generate(PROMPTS, each, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == expected
    assert small.stats()["preemptions"] > 0
    assert small.stats()["pages_used"] == 0


def test_chunked_prefill(expected: list[list[int]]) -> None:
    assert run(PROMPTS, PARAMS, max_prefill_tokens=5) == expected


def test_before_and_after_a_prefix_hit(expected: list[list[int]]) -> None:
    one = engine(page_size=4)
    each = [dataclasses.replace(PARAMS, seed=50 + i) for i in range(4)]
    first = [o.outputs[0].token_ids for o in one.generate(PROMPTS, each, use_tqdm=False)]
    hits = one.stats()["cached_prompt_tokens"]
    again = [o.outputs[0].token_ids for o in one.generate(PROMPTS, each, use_tqdm=False)]
    assert one.stats()["cached_prompt_tokens"] > hits
    assert first == again == expected
    assert run(PROMPTS, PARAMS, prefix_caching=False) == expected


def test_in_the_next_process(expected: list[list[int]], tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    script = (
        f"import sys; sys.path.insert(0, {str(tests)!r})\n"
        "from engine.test_same_tokens import run, PROMPTS, PARAMS\n"
        "print(run(PROMPTS, PARAMS))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,  # in the checkout, its source folder would hide the installed package
    )
    assert done.stdout.strip() == str(expected)


def test_seed_none_follows_from_the_engine() -> None:
    def tokens(seed: int) -> list[list[int]]:
        outputs = engine(seed=seed).generate(PROMPTS, PARAMS, use_tqdm=False)
        return [o.outputs[0].token_ids for o in outputs]

    assert tokens(1) == tokens(1) != tokens(2)


def test_n_responses_differ_and_the_first_is_the_single_one() -> None:
    def responses(n: int) -> list[list[int]]:
        params = dataclasses.replace(PARAMS, n=n, seed=9)
        (output,) = engine().generate(PROMPTS[0], params, use_tqdm=False)
        return [o.token_ids for o in output.outputs]

    three = responses(3)
    assert len({tuple(t) for t in three}) == 3
    assert responses(1) == three[:1]
