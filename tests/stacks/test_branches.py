"""What `StarsScheduler` keeps and asks for, without vLLM: branches, and a request's fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from stars_fast import StarsParams
from stars_fast.vllm.branches import best_base, outdated
from stars_fast.vllm.extra_args import SAMPLING, request_params

PROMPT = [1, 2, 3]


@dataclass
class Branch:
    """A branch whose steps have all come back, unless it is said how far it is computed."""

    prefix: int
    tokens: list[int]
    computed: int = field(default=-1)

    def __post_init__(self) -> None:
        if self.computed < 0:
            self.computed = len(self.tokens) - 1


def test_a_segment_begins_on_the_branch_that_holds_most() -> None:
    rejected, accepted = Branch(3, [*PROMPT, 7, 8]), Branch(3, [*PROMPT, 5, 6])
    both = [rejected, accepted]
    assert best_base(both, [*PROMPT, 5, 6]) == (accepted, 4)
    assert best_base(both, PROMPT) == (rejected, 2)  # any will do
    assert best_base(both, [*PROMPT, 9, 9]) == (rejected, 3)  # its prompt, and no more
    assert best_base(both, [1, 9, 3]) == (None, 0)
    assert best_base([], PROMPT) == (None, 0)


@pytest.mark.parametrize(("computed", "held"), [(0, 0), (1, 1), (2, 2), (3, 2)])
def test_what_is_not_computed_is_not_held(computed: int, held: int) -> None:
    """A prompt that is computed in parts, a child that waits or was preempted."""
    assert best_base([Branch(3, PROMPT, computed)], PROMPT)[1] == held


def test_branches_are_kept_while_a_segment_may_begin_with_them() -> None:
    first, second = Branch(3, [*PROMPT, 7, 8]), Branch(3, [*PROMPT, 5, 6])
    later = Branch(5, [*PROMPT, 5, 6, 4])
    assert outdated([first, second], [PROMPT]) == []  # rejected; one may be the fallback
    assert outdated([first, second, later], [[*PROMPT, 5, 6]]) == [first]
    assert outdated([first, second, later], [[*PROMPT, 5, 6, 4]]) == [first, second]
    # Responses side by side, such as those of Best-of-N.
    assert outdated([first, second], [[*PROMPT, 5, 6], [*PROMPT, 7, 8]]) == []


DEFAULTS: dict[str, Any] = dict.fromkeys(SAMPLING, 0) | {
    "temperature": 1.0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "max_tokens": 16,
    "seed": None,
    "stop": [],
    "stop_token_ids": [],
    "bad_words": None,
    "logit_bias": None,
    "ignore_eos": False,
    "logprobs": None,
    "n": 1,
    "watermarking": None,
    "_eos_token_id": None,
}


def params_of(given: object, **sampling: Any) -> StarsParams:
    base = StarsParams(target_reward=2.0, segment_length=9, temperature=0.3)
    return request_params(base, given, DEFAULTS | sampling, DEFAULTS)


def test_how_tokens_are_drawn_is_said_where_vllm_has_it() -> None:
    asked = {"top_k": -1, "seed": 5, "max_tokens": 40, "stop": ["x"], "_eos_token_id": 3, "n": 2}
    found = params_of('{"beta": 0.2}', watermarking=False, **asked)
    assert (found.beta, found.segment_length, found.target_reward) == (0.2, 9, 2.0)
    assert (found.temperature, found.top_k, found.seed, found.max_tokens) == (1.0, 0, 5, 40)
    assert found.stop == ("x",)
    assert params_of({"method": "vanilla"}).method == "vanilla"


@pytest.mark.parametrize(
    ("given", "sampling", "message"),
    [
        ({"beta": -1}, {}, "beta must be above 0 with soft acceptance, got -1"),
        ({"segment_size": 3}, {}, "unknown field 'segment_size' in stars; the fields are method"),
        ({"seed": 1}, {}, "seed must be given in the sampling parameters, not in stars, got 1"),
        ({"target_reward": "auto"}, {}, "target_reward must be a number in stars, got 'auto'"),
        ({}, {"logprobs": 2}, "logprobs must be None with stars, got 2"),
        ({}, {"min_tokens": 17}, "min_tokens must be"),
        ("{", {}, "stars must be an object or its JSON text"),
        (3, {}, "stars must be an object, got 3"),
    ],
)
def test_fields_that_are_refused(given: Any, sampling: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        params_of(given, **sampling)
