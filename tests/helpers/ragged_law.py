"""A world in which noise that is used twice shows: segments of unequal length on a biased coin.

"b" ends a segment, "a" costs reward wherever it stands. What made a long attempt be rejected, its
noise would draw again behind a shorter segment that was accepted in its place.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from helpers import letter_law
from helpers.letter_law import EOS, Tokens, World, letter_engine
from helpers.tiny_lm import LETTERS, coin_model, letter_tokenizer

from stars_fast import Engine, StarsParams

A, B = 0, 1
PROMPT_IDS = [A, B]


def reward_of(response: str) -> float:
    """Minus the number of letters that cost."""
    return -1.0 * response.count(LETTERS[A])


def coin(after_a: float, after_b: float) -> World:
    """The world of `coin_model`."""

    def probs(tokens: Tokens, _temperature: float) -> list[float]:
        chance = after_a if (*PROMPT_IDS, *tokens)[-1] == A else after_b
        return [chance, 1 - chance, 0.0, 0.0]

    return World(probs, reward_of, ends=B)


CHANCE = 0.6
RAGGED = coin(CHANCE, CHANCE)
EVEN = dataclasses.replace(RAGGED, ends=None)

#: Segments end as `RAGGED` says, responses have five letters.
SETTINGS: dict[str, Any] = {
    "segment_end": "clause",
    "min_segment_length": 1,
    "segment_length": 5,
    "max_tokens": 5,
    "temperature": 1.0,
    "top_k": 0,
}


def ragged_engine(after_a: float = CHANCE, after_b: float = CHANCE) -> Engine:
    """The coin, "b" being read as a comma, so that ``segment_end="clause"`` ends there."""
    letters = tuple("," if letter == LETTERS[B] else letter for letter in LETTERS)

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        return [reward_of(response) for response in responses]

    return letter_engine(reward, coin_model(after_a, after_b), tokenizer=letter_tokenizer(letters))


def count(engine: Engine, params: StarsParams, requests: int) -> Counter[Tokens]:
    """How often each response came."""
    counts = letter_law.count(engine, params, requests, PROMPT_IDS)
    assert not any(EOS in response for response in counts)
    return counts
