"""What a method decides by may depend on the number of the attempt, equal attempts included."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.letter_law import PROMPT, letter_engine

from stars_fast import StarsParams
from stars_fast.methods import METHODS


def test_equal_attempts_have_merits_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = replace(METHODS["stars"], merit=lambda params, reward, drawn: reward + drawn.attempt)
    monkeypatch.setitem(METHODS, "stars", kind)
    engine = letter_engine(lambda prompts, responses: [0.0] * len(prompts))
    params = StarsParams(
        target_reward=2.5,
        alpha=1.0,
        acceptance="hard",
        segment_length=1,
        max_tokens=6,
        top_k=1,  # every draw is the most likely token
        ignore_eos=True,
    )
    (output,) = engine.generate([PROMPT], params, use_tqdm=False)
    assert output.error is None
    assert [(s.attempts, s.accepted) for s in output.outputs[0].segments] == [(4, "test")] * 6
