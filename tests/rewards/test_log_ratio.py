"""Log-ratios of two language models equal those of plain forwards; only new ids run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.reward_readings import whole_text
from helpers.reward_walk import QUESTIONS, Round, Walk, chat_prompt, text_prompt
from helpers.tiny_architectures import CONFIGS, randomize
from helpers.tiny_tokenizers import bpe_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from stars_fast import Engine, LogRatio, StarsParams
from stars_fast.errors import ModelLoadError, RewardError
from stars_fast.rewards import Prompt, ScoreJob, load_scorer
from stars_fast.rewards.log_ratio import LogRatioScorer
from stars_fast.rewards.split_ids import common_length

LM = bpe_tokenizer(400)
OTHER = bpe_tokenizer(340, chat="chatml")
TOLERANCE = 1e-4
BETA = 0.5


def language_model(name: str, seed: int, vocab_size: int = len(LM)) -> PreTrainedModel:
    """A random model of an architecture."""
    config = CONFIGS[name]()
    config.vocab_size, config.max_position_embeddings = vocab_size, 256
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return randomize(model, seed=seed)


@pytest.fixture(scope="module")
def both() -> tuple[PreTrainedModel, PreTrainedModel]:
    return language_model("llama", 1), language_model("gpt2", 2)


def scorer_of(ratio: LogRatio, **options: Any) -> LogRatioScorer:
    options = {"lm_tokenizer": LM, "reward_tokenizer": LM, "num_pages": 300, **options}
    scorer = load_scorer(ratio, page_size=4, **options)
    assert isinstance(scorer, LogRatioScorer)
    return scorer


@torch.no_grad()
def log_p(model: PreTrainedModel, ids: list[int], new: int) -> float:
    """Log-probability of the last `new` ids by transformers' own forward pass."""
    every = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(dim=-1).double()
    return sum(float(every[i - 1, ids[i]]) for i in range(len(ids) - new, len(ids)))


def log_ratio(models: tuple[PreTrainedModel, ...], ids: list[int], new: int) -> float:
    policy, reference = models
    return BETA * (log_p(policy, ids, new) - log_p(reference, ids, new))


def walk_of(scorer: LogRatioScorer) -> Walk:
    walk = Walk(scorer, LM)
    for request, question in enumerate((QUESTIONS[0], QUESTIONS[1], QUESTIONS[0])):
        make = chat_prompt if request == 1 else text_prompt
        walk.start(request, make(LM, question), budget=30)
    walk.run(rounds=10, limit=12)
    return walk


@pytest.mark.parametrize(
    ("over", "num_pages"), [("response", 300), ("segment", 300), ("response", 24)]
)
def test_the_language_models_own_tokens(
    both: tuple[PreTrainedModel, ...], over: Any, num_pages: int
) -> None:
    policy, reference = both
    scorer = scorer_of(
        LogRatio(policy, beta=BETA, over=over), language_model=reference, num_pages=num_pages
    )
    assert not scorer.needs_text
    walk = walk_of(scorer)
    assert walk.forks > 0
    assert any(item.committed for item in walk.rounds)

    def expected(item: Round) -> float:
        response = item.job.response_ids
        new = len(response) if over == "response" else max(len(response) - len(item.committed), 0)
        return log_ratio(both, [*item.prompt.token_ids, *response], new)

    walk.check(expected, TOLERANCE)
    stats = scorer.stats()
    assert stats["rm_jobs"] == len(walk.rounds)
    assert sum(scorer.take_tokens().values()) == stats["rm_tokens"]
    if num_pages == 300:  # the prompt of each request and the new tokens, at most, in two models
        prompts = {item.job.request: len(item.prompt.token_ids) - 1 for item in walk.rounds}
        jobs = [item for item in walk.rounds if item.job.response_ids]
        new = sum(len(item.job.response_ids) - len(item.committed) for item in jobs)
        assert new < stats["rm_tokens"] <= 2 * (sum(prompts.values()) + new)
    else:
        assert stats["rm_evictions"] > 0
    for request in walk.prompts:
        scorer.finish(request)
    assert scorer.stats()["rm_pages_used"] == 0


@pytest.mark.parametrize("template", [None, "Q: {prompt}\nA:{response}"])
def test_texts_are_tokenised_again(template: str | None) -> None:
    """Where the tokenizer is another one, or the text is: by its chat template or the user's."""
    tokenizer = OTHER if template is None else LM
    both = (language_model("llama", 1, 340 if template is None else 400), language_model("gpt2", 2))
    scorer = scorer_of(LogRatio(*both, beta=BETA), reward_tokenizer=tokenizer, template=template)
    assert scorer.needs_text
    walk = walk_of(scorer)
    if template is None:
        open_ids = whole_text(OTHER, None)
        end = len(OTHER("<|im_end|>\n", add_special_tokens=False)["input_ids"])

    def expected(item: Round) -> float:
        text = item.job.response_text
        if not text.strip():
            return 0.0
        if template is None:
            ids = open_ids(item.prompt, [], text)[:-end]
            empty = open_ids(item.prompt, [], "")[:-end]
        else:
            asked = item.prompt.messages[0]["content"] if item.prompt.messages else item.prompt.text
            ids = tokenizer(f"Q: {asked}\nA:{text}")["input_ids"]
            empty = tokenizer(f"Q: {asked}\nA:")["input_ids"]
        start = common_length(np.array(ids), np.array(empty))
        return log_ratio(both, ids, len(ids) - start)

    walk.check(expected, TOLERANCE)


def test_a_response_that_changes_the_last_tokens_of_its_prompt() -> None:
    both = (language_model("llama", 1), language_model("gpt2", 2))
    scorer = scorer_of(LogRatio(*both, beta=BETA), template="plain")
    prompt = text_prompt(LM, "The film was slow at firs")
    scorer.start(0, prompt, 20)
    for branch, text in enumerate(("", "a", "t, but", "t, but the")):  # the third merges
        ids = LM(prompt.text + text)["input_ids"]
        kept = common_length(np.array(ids), np.array(prompt.token_ids))
        assert (kept < len(prompt.token_ids) - 1) == (branch > 1)
        (value,) = scorer.score([ScoreJob(0, branch, [100] * branch, text)])
        assert value == pytest.approx(log_ratio(both, ids, len(ids) - kept), abs=TOLERANCE)
        if branch > 1:
            scorer.accept(0, branch)


def test_a_model_against_itself_is_worth_nothing(both: tuple[PreTrainedModel, ...]) -> None:
    engine = Engine(both[0], LogRatio(both[0]), tokenizer=LM, reward_tokenizer=LM, num_pages=60)
    assert engine.score([QUESTIONS[0]], [" Rinse it"]) == [0.0]


def test_directories_in_an_engine(tmp_path: Path, both: tuple[PreTrainedModel, ...]) -> None:
    for name, model in zip(("policy", "lm"), both, strict=True):
        model.save_pretrained(tmp_path / name)
        LM.save_pretrained(tmp_path / name)
    ratio = LogRatio.of(f"{tmp_path / 'policy'},beta={BETA}")
    engine = Engine(tmp_path / "lm", ratio, num_pages=200, page_size=4)
    params = StarsParams(segment_length=4, max_tokens=12, beta=1.0, seed=3)
    target = engine.calibrate([QUESTIONS[0]], params=params).target_reward
    assert math.isfinite(target)
    prompts = [text_prompt(LM, question).token_ids for question in QUESTIONS]
    params = replace(params, target_reward=target)
    whole = engine.generate(prompts, params)
    for output, prompt in zip(whole, prompts, strict=True):
        (completion,) = output.outputs
        want = log_ratio(both, [*prompt, *completion.token_ids], len(completion.token_ids))
        assert completion.reward == pytest.approx(want, abs=TOLERANCE)
    # What else is in the batch changes nothing.
    (alone,) = engine.generate(prompts[1:2], params)
    assert alone.outputs[0].token_ids == whole[1].outputs[0].token_ids
    # Everyone draws the same names, whatever the reward.
    bare = Engine(tmp_path / "lm", num_pages=200, page_size=4)
    vanilla = StarsParams(method="vanilla", max_tokens=12, seed=3)
    tokens = [e.generate(prompts, vanilla)[0].outputs[0].token_ids for e in (engine, bare)]
    assert tokens[0] == tokens[1]


def test_failures_stay_with_their_jobs(both: tuple[PreTrainedModel, ...]) -> None:
    scorer = scorer_of(LogRatio(*both))
    reading: Any = scorer._reference._reading
    head = reading._head

    def poisoned(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = head(hidden).clone()
        logits[2] = torch.nan  # of the second job's first token
        return logits

    reading._head = poisoned
    prompt = text_prompt(LM, QUESTIONS[0])
    scorer.start(0, prompt, 20)
    values = scorer.score([ScoreJob(0, i, [100 + i, 101], "") for i in range(3)])
    assert [isinstance(value, float) for value in values] == [True, False, True]
    assert isinstance(values[1], RewardError)
    small = Prompt("a", [399] * 260, None)
    with pytest.raises(ValueError, match="260 tokens for the policy of LogRatio .*256 tokens"):
        scorer.start(1, small, 0)
    scorer.finish(1)
    assert scorer.score([ScoreJob(0, 9, [], "")]) == [0.0]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LogRatio(3), TypeError, "policy of a LogRatio must be a directory.*got int"),  # type: ignore[arg-type]
        (lambda: LogRatio(""), ValueError, "policy of a LogRatio must not be empty"),
        (lambda: LogRatio("a", beta=0), ValueError, "finite and not 0, got 0"),
        (lambda: LogRatio("a", beta=math.nan), ValueError, "finite and not 0, got nan"),
        (lambda: LogRatio("a", beta="1"), TypeError, "beta of a LogRatio must be a number"),  # type: ignore[arg-type]
        (lambda: LogRatio("a", over="all"), ValueError, "one of response, segment, got 'all'"),  # type: ignore[arg-type]
        (lambda: LogRatio.of("a,b,c"), ValueError, "must be POLICY"),
        (lambda: LogRatio.of(",b"), ValueError, "must be POLICY"),
        (lambda: LogRatio.of("a,beta=x"), ValueError, "beta must be a number, got 'x'"),
        (lambda: LogRatio.of("a,beta=1,beta=2"), ValueError, "beta is given twice"),
    ],
)
def test_bad_log_ratios(make: Callable[[], LogRatio], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_log_ratios_as_text() -> None:
    assert LogRatio.of("a") == LogRatio("a")
    assert LogRatio.of("a,b,over=segment,beta=-0.1") == LogRatio("a", "b", -0.1, "segment")


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {}, "without a reference is against the language model, which is not here"),
        ({"reference": 1}, {"head": "label=a"}, "reward_head is for reward models with a head"),
        (
            {"reference": 1, "over": "segment"},
            {"template": "plain"},
            "over='segment' of a LogRatio needs.*as reward_template is given",
        ),
        (
            {"reference": 1},
            {"template": "{prompt}{response}!"},
            r"must be None, 'chat', 'plain' or text that ends with \{response\}",
        ),
        (
            {"reference": 1},
            {"template": lambda prompt, response: prompt + response},
            "must be None, 'chat', 'plain'",
        ),
    ],
)
def test_what_does_not_go_together(
    both: tuple[PreTrainedModel, ...],
    fields: dict[str, Any],
    options: dict[str, Any],
    message: str,
) -> None:
    if fields.get("reference"):
        fields = {**fields, "reference": both[1]}
    with pytest.raises(ValueError, match=message):
        scorer_of(LogRatio(both[0], **fields), **options)


def test_two_tokenizers(tmp_path: Path, both: tuple[PreTrainedModel, ...]) -> None:
    both[0].save_pretrained(tmp_path / "policy")
    with pytest.raises(ModelLoadError, match="policy of LogRatio has no tokenizer"):
        scorer_of(LogRatio(tmp_path / "policy", both[1]), reward_tokenizer=None)
    OTHER.save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match=r"must have the same tokens.*\(340 and 400 tokens\)"):
        scorer_of(LogRatio(tmp_path / "policy"), language_model=both[1], reward_tokenizer=None)
    with pytest.raises(ModelLoadError, match="the reference of LogRatio: .*nowhere"):
        scorer_of(LogRatio(both[0], str(tmp_path / "nowhere")))
