"""Incremental rewards equal transformers' own forward pass on the whole text; only new ids run."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.reward_readings import Reading, response_ids, whole_text
from helpers.reward_walk import QUESTIONS, Round, Walk, chat_prompt, text_prompt
from helpers.tiny_rewards import plain_reward, reward_model
from helpers.tiny_tokenizers import bpe_tokenizer

from stars_fast.rewards import Prompt, ScoreJob, load_scorer
from stars_fast.rewards.split_ids import common_length

HUMAN = "###Human: {prompt} ###Assistant:{response}"
LM = bpe_tokenizer(400)

# Family, chat template of its tokenizer, reward_template.
KINDS = [
    ("llama", "llama3", None),
    ("qwen2", "chatml", None),
    ("mistral", "mistral", None),
    ("gemma2", "gemma", None),
    ("opt", None, HUMAN),
    ("gpt2", None, HUMAN),
    ("gpt_neox", None, None),
]
NAMES = [f"{family}-{chat or ('human' if text else 'plain')}" for family, chat, text in KINDS]


def new_tokens(walk: Walk, reading: Reading) -> int:
    """Ids that must run: prompts once each, else what differs from the committed text."""
    total = 0
    prompts: set[str] = set()
    requests: set[int] = set()
    scored: set[tuple[int, tuple[int, ...]]] = set()
    for item in walk.rounds:
        ids = reading(item.prompt, item.job.response_ids, item.job.response_text)
        empty = reading(item.prompt, [], "")
        stem = common_length(np.array(empty), np.array(reading(item.prompt, [300], "a")))
        tail = len(empty) - stem
        is_prompt = not item.job.response_ids
        again = (item.job.request, tuple(ids)) in scored
        scored.add((item.job.request, tuple(ids)))
        if is_prompt and item.prompt.text in prompts:
            continue
        if item.job.request not in requests:
            total += stem
            requests.add(item.job.request)
        if is_prompt:
            prompts.add(item.prompt.text)
            total += tail
            continue
        if again:
            continue
        before = reading(item.prompt, item.committed, walk.text(item.committed))
        before = before[: len(before) - tail]
        shared = common_length(np.array(ids), np.array(before))
        total += len(ids) - min(shared, len(ids) - 1)
    return total


@pytest.mark.parametrize(("family", "chat", "template"), KINDS, ids=NAMES)
@pytest.mark.parametrize("tokenizer", ["shared", "other"])
def test_rewards_and_tokens(
    family: str, chat: str | None, template: str | None, tokenizer: str
) -> None:
    reward_tokenizer = bpe_tokenizer(400 if tokenizer == "shared" else 340, chat=chat)
    model = reward_model(family, reward_tokenizer)
    scorer = load_scorer(
        model,
        lm_tokenizer=LM,
        reward_tokenizer=reward_tokenizer,
        template=template,
        num_pages=400,
        page_size=4,
    )
    reading = (response_ids if tokenizer == "shared" else whole_text)(reward_tokenizer, template)
    walk = Walk(scorer, LM, seed=len(family))
    walk.start(0, text_prompt(LM, QUESTIONS[0]))
    walk.start(1, chat_prompt(LM, QUESTIONS[1]))
    walk.run(rounds=16, limit=12)

    def expected(item: Round) -> float:
        return plain_reward(
            model, reading(item.prompt, item.job.response_ids, item.job.response_text)
        )

    walk.check(expected)
    assert len({item.job.request for item in walk.rounds}) > 2  # some requests began anew
    assert scorer.stats()["rm_tokens"] == new_tokens(walk, reading)
    for request in walk.prompts:
        scorer.finish(request)
    assert scorer.stats()["rm_pages_used"] == 0


@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_page_size_does_not_matter(page_size: int) -> None:
    tokenizer = bpe_tokenizer(340, chat="llama3")
    model = reward_model("llama", tokenizer)
    scorer = load_scorer(
        model,
        lm_tokenizer=LM,
        reward_tokenizer=tokenizer,
        num_pages=1600 // page_size,
        page_size=page_size,
    )
    walk = Walk(scorer, LM, seed=7)
    walk.start(0, chat_prompt(LM, QUESTIONS[0], system="Be brief."))
    walk.run(rounds=10)
    reading = whole_text(tokenizer, None)
    walk.check(lambda item: plain_reward(model, reading(item.prompt, [], item.job.response_text)))


def test_reward_is_read_before_padding_tokens() -> None:
    # Many reward models pad with EOS: transformers reads the last token that is not EOS.
    tokenizer = bpe_tokenizer(400, pad="</s>")
    model = reward_model("llama", tokenizer)
    scorer = load_scorer(model, lm_tokenizer=LM, reward_tokenizer=tokenizer, num_pages=100)
    prompt = text_prompt(LM, QUESTIONS[0])
    scorer.start(0, prompt, 20)
    response = [*LM("Rinse it", add_special_tokens=False)["input_ids"], LM.eos_token_id]
    longer = [*response, LM.eos_token_id]
    for branch, ids in enumerate((response, longer, [*longer, *response])):
        (reward,) = scorer.score([ScoreJob(0, branch, ids, "")])
        assert reward == pytest.approx(plain_reward(model, [*prompt.token_ids, *ids]), abs=1e-4)
        scorer.accept(0, branch)


def test_closing_tokens_of_the_response_give_way_to_the_template() -> None:
    tokenizer = bpe_tokenizer(400, chat="llama3")
    model = reward_model("llama", tokenizer)
    scorer = load_scorer(model, lm_tokenizer=LM, reward_tokenizer=tokenizer, num_pages=100)
    prompt = text_prompt(LM, QUESTIONS[0])
    scorer.start(0, prompt, 20)
    response = LM("Rinse it", add_special_tokens=False)["input_ids"]
    closing = [LM.convert_tokens_to_ids("<|eot_id|>"), LM.eos_token_id]
    first, second = scorer.score(
        [ScoreJob(0, 0, response, "Rinse it"), ScoreJob(0, 1, [*response, *closing], "Rinse it")]
    )
    assert first == pytest.approx(second, abs=1e-5)
    whole = whole_text(tokenizer, None)(prompt, response, "Rinse it")
    assert first == pytest.approx(plain_reward(model, whole), abs=1e-4)


def test_prompt_reward_is_computed_once_per_prompt() -> None:
    tokenizer = bpe_tokenizer(400)
    scorer = load_scorer(
        reward_model("llama", tokenizer), lm_tokenizer=LM, reward_tokenizer=tokenizer, num_pages=100
    )
    prompt = text_prompt(LM, QUESTIONS[0])
    for request in range(4):
        scorer.start(request, prompt, 20)
    rewards = scorer.score([ScoreJob(request, 0, [], "") for request in range(3)])
    (later,) = scorer.score([ScoreJob(3, 0, [], "")])
    assert {*rewards, later} == {rewards[0]}
    assert scorer.stats()["rm_tokens"] == len(prompt.token_ids)


def test_unknown_ids_and_long_texts_fail_alone() -> None:
    tokenizer = bpe_tokenizer(400)
    model = reward_model("llama", tokenizer, max_position_embeddings=32)
    scorer = load_scorer(model, lm_tokenizer=LM, reward_tokenizer=tokenizer, num_pages=100)
    prompt = text_prompt(LM, "It costs")
    with pytest.raises(ValueError, match="context of 32 tokens"):
        scorer.start(0, prompt, 32)
    with pytest.raises(ValueError, match=r"prompt_token_ids must lie in \[0, 400\)"):
        scorer.start(0, Prompt("", [400], None), 1)
    scorer.start(0, prompt, 10)
    jobs = [
        ScoreJob(0, 0, [20, 400], ""),
        ScoreJob(0, 1, [20, 21], ""),
        ScoreJob(0, 2, [20] * 40, ""),
        ScoreJob(0, 3, [-1], ""),
    ]
    unknown, good, long, negative = scorer.score(jobs)
    assert isinstance(unknown, ValueError)
    assert "response_ids must lie in [0, 400)" in str(unknown)
    assert isinstance(negative, ValueError)
    assert isinstance(long, ValueError)
    assert "context of 32 tokens" in str(long)
    assert good == pytest.approx(plain_reward(model, [*prompt.token_ids, 20, 21]), abs=1e-4)


def test_empty_prompt_is_refused() -> None:
    tokenizer = bpe_tokenizer(400)
    scorer = load_scorer(
        reward_model("llama", tokenizer), lm_tokenizer=LM, reward_tokenizer=tokenizer, num_pages=100
    )
    with pytest.raises(ValueError, match="prompt is empty"):
        scorer.start(0, Prompt("", [], None), 10)
