"""Persona-judge: tokens accepted by the same model under another prompt."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from helpers.letter_law import (
    PROMPT,
    Law,
    Tokens,
    count,
    first_to_pass,
    law_of,
    letter_engine,
    model_law,
    next_probs,
    p_value,
)

from stars_fast import Engine, Persona, StarsParams

PERSONA = Persona(template="c{prompt}ca")
JUDGE = "cabca"
REQUESTS = 2000
PARAMS = StarsParams(
    method="persona_judge", max_attempts=3, max_tokens=3, temperature=1.0, top_k=0, candidates=1
)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return letter_engine(PERSONA)


def closed_form(params: StarsParams, judge: str = JUDGE) -> Law:
    """A token is drawn at the temperature and judged by raw probabilities, and by their ratio."""

    def step(done: Tokens) -> Law:
        drawn = next_probs(done, params.temperature)
        ratio = [q / p for q, p in zip(next_probs(done, 1.0, judge), next_probs(done), strict=True)]
        hard = params.acceptance == "hard"
        rows = [
            ((*done, t), drawn[t], ratio[t], float(ratio[t] >= 1) if hard else min(1.0, ratio[t]))
            for t in range(len(drawn))
        ]
        return first_to_pass(rows, params.max_attempts)

    return law_of(step, params.max_tokens)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"candidates": 2, "temperature": 0.7, "max_attempts": 2},
        {"acceptance": "hard", "max_attempts": 2},
    ],
    ids=str,
)
def test_matches_closed_form(engine: Engine, changes: dict[str, Any]) -> None:
    params = dataclasses.replace(PARAMS, **changes)
    counts = count(engine, params, REQUESTS)
    assert p_value(counts, closed_form(params)) > 1e-3
    single = dataclasses.replace(params, max_attempts=1)
    other = dataclasses.replace(params, acceptance="soft" if changes.get("acceptance") else "hard")
    planted = {
        "attempts": closed_form(single),
        "acceptance": closed_form(other),
        "judge": closed_form(params, judge="ca"),
        "draft": model_law(3, params.temperature),
    }
    found = {name: p_value(counts, law) for name, law in planted.items()}
    assert all(p < 1e-6 for p in found.values()), found


def test_reward_is_the_logarithm_of_the_ratio(engine: Engine) -> None:
    params = dataclasses.replace(PARAMS, seed=5, max_tokens=12, trace=True, ignore_eos=True)
    (output,) = engine.generate(PROMPT, params, use_tqdm=False)
    response = output.outputs[0]
    rejected = 0
    for segment in response.segments:
        done = tuple(response.token_ids[: segment.start])
        judge, draft = next_probs(done, 1.0, JUDGE), next_probs(done)
        seen = [(response.token_ids[segment.start], segment.reward)]
        seen += [(attempt.token_ids[0], attempt.reward) for attempt in segment.rejected]
        rejected += len(segment.rejected)
        for token, reward in seen:
            assert reward == pytest.approx(math.log(judge[token] / draft[token]), abs=1e-4)
    assert rejected > 0
    stats = engine.stats()
    assert stats["pages_used"] == stats["rm_pages_used"] == 0


def test_same_tokens_without_room() -> None:
    long = dataclasses.replace(PARAMS, max_tokens=24, ignore_eos=True)
    each = [dataclasses.replace(long, seed=i) for i in range(4)]

    def run(**options: Any) -> list[list[int]]:
        outputs = letter_engine(PERSONA, **options).generate([PROMPT] * 4, each, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    assert run(num_pages=9, page_size=8, max_rows=3, reward_num_pages=12) == run()


@pytest.mark.parametrize("method", ["stars", "best_of_n", "rejection", "args", "smc", "mara"])
def test_goes_with_no_other_method(engine: Engine, method: Any) -> None:
    with pytest.raises(ValueError, match=f"persona_judge.*go together.*'{method}'"):
        engine.add_request("a", PROMPT, PARAMS.with_method(method))
    assert not engine.has_unfinished()


def test_goes_with_no_other_reward_model(engine: Engine) -> None:
    with pytest.raises(ValueError, match="Persona.*go together"):
        letter_engine().add_request("a", PROMPT, PARAMS)
    (output,) = letter_engine().generate(PROMPT, PARAMS, use_tqdm=False)
    assert "Persona" in (output.error or "")
    # But plain samples need none, whatever there is.
    (output,) = engine.generate(PROMPT, PARAMS.with_method("vanilla"), use_tqdm=False)
    assert output.error is None


def test_refuses_to_judge_beside_a_draft() -> None:
    with pytest.raises(ValueError, match="overlap_scoring must be False with a Persona"):
        letter_engine(PERSONA, overlap_scoring=True)


def test_calibrate_says_that_it_needs_rewards(engine: Engine) -> None:
    with pytest.raises(ValueError, match="persona_judge"):
        engine.calibrate(PROMPT, params=PARAMS, use_tqdm=False)
