"""What a reward model reads twice for one prompt it is run on once, and gets one reward."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.reward_walk import text_prompt
from helpers.tiny_rewards import plain_reward, reward_model
from helpers.tiny_tokenizers import bpe_tokenizer, encoder_tokenizer

from stars_fast.rewards import ScoreJob, Scorer, load_scorer

LM = bpe_tokenizer(400)
PROMPT, OTHER = text_prompt(LM, "A terrible kettle"), text_prompt(LM, "The film")
YES, NO = LM(" good value", add_special_tokens=False), LM(" it leaks", add_special_tokens=False)


def causal(tokenizer: Any) -> tuple[Scorer, Any]:
    model = reward_model("llama", tokenizer)
    scorer = load_scorer(model, lm_tokenizer=LM, reward_tokenizer=tokenizer, template="plain")
    return scorer, model


def scorers() -> dict[str, Scorer]:
    words = encoder_tokenizer()
    return {
        "shared ids": causal(bpe_tokenizer(400))[0],
        "other ids": causal(bpe_tokenizer(340))[0],
        "encoder": load_scorer(
            reward_model("bert", words), lm_tokenizer=LM, reward_tokenizer=words, template="plain"
        ),
        "function": load_scorer(
            lambda prompts, responses: [float(len(r)) for r in responses], lm_tokenizer=LM
        ),
    }


def job(request: int, branch: int, encoded: Any) -> ScoreJob:
    ids = encoded["input_ids"]
    return ScoreJob(request, branch, ids, LM.decode(ids))


@pytest.mark.parametrize("kind", scorers())
def test_equal_inputs_are_scored_once(kind: str) -> None:
    scorer = scorers()[kind]
    scorer.start(0, PROMPT, 20)
    scorer.start(1, PROMPT, 20)
    first = scorer.score([job(0, 0, YES), job(0, 1, YES), job(1, 2, YES), job(1, 3, NO)])
    assert first[0] == first[1] == first[2] != first[3]
    before = scorer.stats()
    # In another batch, for a request that has come since.
    scorer.start(2, PROMPT, 20)
    scorer.start(3, OTHER, 20)
    again = scorer.score([job(2, 4, NO), job(0, 5, YES)])
    assert again == [first[3], first[0]]
    assert scorer.stats()["rm_tokens"] == before["rm_tokens"]
    assert scorer.stats()["rm_calls"] == before["rm_calls"]
    # The same response to another prompt is another input.
    (other,) = scorer.score([job(3, 6, YES)])
    assert other != first[0] or kind == "function"
    calls = scorer.stats()["rm_calls"]
    assert calls > before["rm_calls"]
    # Nothing is known of a prompt once its requests are over.
    for request in range(4):
        scorer.finish(request)
    scorer.start(4, PROMPT, 20)
    assert scorer.score([job(4, 7, YES)]) == [pytest.approx(first[0], abs=1e-5)]
    assert scorer.stats()["rm_calls"] > calls


@pytest.mark.parametrize("size", [400, 340])
@pytest.mark.parametrize("round_of_equal", [0, 1])
def test_a_candidate_whose_equal_was_run_can_be_accepted(size: int, round_of_equal: int) -> None:
    tokenizer = bpe_tokenizer(size)
    scorer, model = causal(tokenizer)
    scorer.start(0, PROMPT, 40)
    if round_of_equal == 0:
        scorer.score([job(0, 0, YES), job(0, 1, YES)])
    else:
        scorer.score([job(0, 0, YES)])
        scorer.prune(0)
        scorer.score([job(0, 1, YES)])
    scorer.keep(0, 1)
    scorer.prune(0)
    scorer.accept(0, 1)
    ids = YES["input_ids"] + NO["input_ids"]
    (reward,) = scorer.score([ScoreJob(0, 2, ids, LM.decode(ids))])
    whole = tokenizer(PROMPT.text + LM.decode(ids))["input_ids"]
    assert reward == pytest.approx(plain_reward(model, whole), abs=1e-4)


def test_an_error_is_not_remembered() -> None:
    failing = True

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        if failing:
            raise RuntimeError("not now")
        return [1.0] * len(responses)

    scorer = load_scorer(reward, lm_tokenizer=LM)
    scorer.start(0, PROMPT, 20)
    assert all(isinstance(r, Exception) for r in scorer.score([job(0, 0, YES), job(0, 1, YES)]))
    failing = False
    assert scorer.score([job(0, 2, YES)]) == [1.0]
