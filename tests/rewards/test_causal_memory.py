"""A short pool changes what is computed again, never a reward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.reward_walk import QUESTIONS, Round, Walk, chat_prompt, text_prompt
from helpers.tiny_rewards import plain_reward, reward_model
from helpers.tiny_tokenizers import bpe_tokenizer
from transformers import PreTrainedModel

from stars_fast.errors import RewardError
from stars_fast.models.paged import PagedModel
from stars_fast.rewards import Prompt, ScoreJob, load_scorer
from stars_fast.rewards.causal import CausalScorer
from stars_fast.rewards.reading import LastToken
from stars_fast.rewards.text import make_template
from stars_fast.rewards.tokens import SharedTokens

LM = bpe_tokenizer(400)
PAGE = 4


def plain_scorer(model: PreTrainedModel, num_pages: int, **options: Any) -> CausalScorer:
    """A scorer of prompt + response ids, its cache within reach of the test."""
    return CausalScorer(
        PagedModel(model, num_pages=num_pages, page_size=PAGE),
        LastToken(lambda hidden: model.score(hidden)[:, 0], LM.pad_token_id),
        SharedTokens(LM, make_template("plain", LM, pairs=False), len(LM)),
        num_pages=num_pages,
        page_size=PAGE,
        **options,
    )


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return reward_model("llama", LM)


def reference(model: PreTrainedModel, item: Round) -> float:
    return plain_reward(model, [*item.prompt.token_ids, *item.job.response_ids])


def walk_of(scorer: CausalScorer, requests: int, seed: int = 0, prompts: int = 6) -> Walk:
    walk = Walk(scorer, LM, seed=seed, candidates=4)
    for request in range(requests):
        number = request % prompts
        walk.start(request, text_prompt(LM, QUESTIONS[number % 3] * (1 + number // 3)), budget=30)
    return walk


@pytest.mark.parametrize("spare_pages", [0, 3, 8, 20, 60])
@pytest.mark.parametrize("prompts", [6, 2])
def test_short_pool(model: PreTrainedModel, prompts: int, spare_pages: int) -> None:
    longest = max(len(text_prompt(LM, q * 2).token_ids) for q in QUESTIONS)
    limits = {"max_batch_tokens": 10} if spare_pages == 3 else {}
    scorer = plain_scorer(model, 1 + -(-(longest + 30) // PAGE) + spare_pages, **limits)
    walk = walk_of(scorer, requests=5, seed=spare_pages, prompts=prompts)
    if prompts == 6:
        walk.prompt_round()
    for _ in range(8):
        walk.step()
        scorer._texts._cache.check()
        for request in [r for r, ids in walk.committed.items() if len(ids) > 10]:
            walk.restart(request)
    walk.check(lambda item: reference(model, item))
    if prompts == 6 or spare_pages in (0, 60):
        assert (scorer.stats()["rm_evictions"] > 0) == (spare_pages < 60)
    assert (walk.forks > 0) == (prompts == 2)
    for request in walk.prompts:
        scorer.finish(request)
    scorer._texts._cache.check()
    assert scorer.stats()["rm_pages_used"] == 0


class TestEqualPrompts:
    """What requests have in common is run once."""

    def rewards(self, model: PreTrainedModel, scorer: CausalScorer, jobs: list[ScoreJob]) -> int:
        """Score the jobs, all of one prompt, and compare; the tokens that were run."""
        before = scorer.stats()["rm_tokens"]
        for job, reward in zip(jobs, scorer.score(jobs), strict=True):
            want = plain_reward(model, [*self.prompt.token_ids, *job.response_ids])
            assert reward == pytest.approx(want, abs=1e-4)
        scorer._texts._cache.check()
        for job in jobs:
            cached = scorer._texts._cache.tokens(job.request)
            assert cached == scorer._texts._requests[job.request].committed[: len(cached)].tolist()
        return scorer.stats()["rm_tokens"] - before

    @property
    def prompt(self) -> Prompt:
        return text_prompt(LM, QUESTIONS[1])

    @pytest.mark.parametrize("limits", [{}, {"max_rows": 1}, {"max_batch_tokens": 10}])
    def test_prompt_runs_once(self, model: PreTrainedModel, limits: dict[str, int]) -> None:
        scorer = plain_scorer(model, 300, **limits)
        length = len(self.prompt.token_ids)
        assert length > 20
        for request in range(5):
            scorer.start(request, self.prompt, 20)
        jobs = [ScoreJob(i % 4, i, [100 + i], "") for i in range(8)]
        assert self.rewards(model, scorer, jobs) == length + 8
        for request in range(4):
            scorer.accept(request, request)
        # One that comes later takes the prompt from what another holds beside its response.
        assert self.rewards(model, scorer, [ScoreJob(4, 9, [90, 91], "")]) == 2
        # The prompt once, and a page for each token of a response.
        scorer.accept(4, 9)
        assert scorer.stats()["rm_pages_used"] == -(-length // PAGE) + 5

    def test_reward_of_the_prompt_reads_the_pages_of_another(self, model: PreTrainedModel) -> None:
        scorer = plain_scorer(model, 300)
        for request in range(3):
            scorer.start(request, self.prompt, 20)
        self.rewards(model, scorer, [ScoreJob(0, 0, [100, 101], "")])
        scorer.accept(0, 0)
        assert self.rewards(model, scorer, [ScoreJob(1, 1, [], "")]) == 1
        scorer.finish(0)
        scorer.finish(1)  # and whoever came first has gone
        assert (
            self.rewards(model, scorer, [ScoreJob(2, 2, [100], "")])
            == len(self.prompt.token_ids) + 1
        )

    def test_what_was_dropped_comes_back_from_the_others(self, model: PreTrainedModel) -> None:
        scorer = plain_scorer(model, 300)
        length = len(self.prompt.token_ids)
        for request in range(3):
            scorer.start(request, self.prompt, 20)
        texts = {request: [100 + request] * 6 for request in range(3)}
        self.rewards(model, scorer, [ScoreJob(r, r, ids, "") for r, ids in texts.items()])
        for request in texts:
            scorer.accept(request, request)
        jobs = [ScoreJob(r, 10 + r, [*ids, 49], "") for r, ids in texts.items()]
        scorer._texts.evict(1)
        assert self.rewards(model, scorer, jobs) == 6 + 3
        jobs = [ScoreJob(r, 13 + r, [*ids, 50], "") for r, ids in texts.items()]
        for request in texts:
            scorer._texts.evict(request)
        assert self.rewards(model, scorer, jobs) == length + 3 * 6 + 3
        # What follows starts on a page of its own, though the first one's padding was not for all.
        assert (length + 6) % PAGE
        for job in jobs:
            scorer.accept(job.request, job.branch)
        copied = scorer.stats()["rm_copied_bytes"]
        jobs = [ScoreJob(r, 20 + r, [*ids, 50, 51], "") for r, ids in texts.items()]
        assert self.rewards(model, scorer, jobs) == 3
        assert scorer.stats()["rm_copied_bytes"] == copied

    def test_fork(self, model: PreTrainedModel) -> None:
        scorer = plain_scorer(model, 300)
        for request in range(2):
            scorer.start(request, self.prompt, 20)
        jobs = [ScoreJob(0, 0, [100] * 6, ""), ScoreJob(1, 1, [101] * 7, "")]
        self.rewards(model, scorer, jobs)
        scorer.accept(0, 0)
        scorer.keep(1, 1)
        scorer.fork(0, 1)
        used = scorer.stats()["rm_pages_used"]
        assert used == -(-len(self.prompt.token_ids) // PAGE) + 2
        jobs = [ScoreJob(0, 2, [100] * 6 + [102], ""), ScoreJob(1, 3, [100] * 6 + [103], "")]
        assert self.rewards(model, scorer, jobs) == 2
        scorer.accept(1, 3)
        scorer.prune(0)
        assert scorer.stats()["rm_pages_used"] == used + 1  # its own copy of the last page
        # From a request whose pages were dropped: committed all the same, and run again once.
        scorer._texts.evict(1)
        scorer.fork(1, 0)
        jobs = [ScoreJob(r, 4 + r, [100] * 6 + [103, 104 + r], "") for r in range(2)]
        assert self.rewards(model, scorer, jobs) == len(self.prompt.token_ids) + 7 + 2


@pytest.mark.parametrize("limits", [{"max_rows": 1}, {"max_rows": 3}, {"max_batch_tokens": 10}])
def test_rounds_split_over_passes(model: PreTrainedModel, limits: dict[str, int]) -> None:
    scorer = plain_scorer(model, 300, **limits)
    widest = 0
    extend = scorer.model.extend_all

    def measured(batch: Any, input_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        nonlocal widest
        widest = max(widest, batch.num_rows)
        assert batch.num_rows * batch.max_new <= limits.get("max_batch_tokens", 1 << 30)
        return extend(batch, input_ids, *rest)

    scorer.model.extend_all = measured  # type: ignore[method-assign]
    walk = walk_of(scorer, requests=3)
    walk.run(rounds=8, limit=20)
    walk.check(lambda item: reference(model, item))
    assert widest == limits.get("max_rows", widest)


def test_committed_text_is_restored_once_for_all_candidates(model: PreTrainedModel) -> None:
    scorer = plain_scorer(model, 300)
    prompt = text_prompt(LM, QUESTIONS[0])
    scorer.start(0, prompt, 60)
    committed = list(range(100, 120))
    scorer.score([ScoreJob(0, 0, committed, "")])
    scorer.accept(0, 0)
    scorer._texts.evict(0)
    before = scorer.stats()["rm_tokens"]
    jobs = [ScoreJob(0, 1 + i, [*committed, 200 + i], "") for i in range(6)]
    rewards = scorer.score(jobs)
    assert scorer.stats()["rm_tokens"] - before == len(prompt.token_ids) + len(committed) + 6
    for job, reward in zip(jobs, rewards, strict=True):
        want = plain_reward(model, [*prompt.token_ids, *job.response_ids])
        assert reward == pytest.approx(want, abs=1e-4)


def test_restored_prompts_run_within_the_limit_and_rows_together(model: PreTrainedModel) -> None:
    scorer = plain_scorer(model, 300, max_batch_tokens=30)
    passes = []
    extend = scorer.model.extend_all

    def recorded(batch: Any, input_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        passes.append((batch.num_rows, batch.max_new))
        return extend(batch, input_ids, *rest)

    scorer.model.extend_all = recorded  # type: ignore[method-assign]
    prompts = [text_prompt(LM, question) for question in QUESTIONS]
    lengths = [len(prompt.token_ids) for prompt in prompts]
    assert min(lengths) < 15 < 30 < max(lengths)
    for request, prompt in enumerate(prompts):
        scorer.start(request, prompt, 20)
    jobs = [ScoreJob(i % 3, i, [100 + i], "") for i in range(9)]
    for job, reward in zip(jobs, scorer.score(jobs), strict=True):
        want = plain_reward(model, [*prompts[job.request].token_ids, *job.response_ids])
        assert reward == pytest.approx(want, abs=1e-4)
    assert all(rows * width <= 30 for rows, width in passes)
    assert passes[-1] == (9, 1)  # the prompts cached, every candidate in one pass


def test_accepting_a_branch_whose_pages_are_gone(model: PreTrainedModel) -> None:
    scorer = plain_scorer(model, 300)
    prompt = text_prompt(LM, QUESTIONS[0])
    scorer.start(0, prompt, 60)
    response = list(range(100, 110))
    scorer.score([ScoreJob(0, 0, response, ""), ScoreJob(0, 1, response[:3], "")])
    scorer.keep(0, 0)
    scorer.prune(0)
    scorer._texts.evict(0)
    scorer.accept(0, 0)
    (reward,) = scorer.score([ScoreJob(0, 2, [*response, 120], "")])
    assert reward == pytest.approx(
        plain_reward(model, [*prompt.token_ids, *response, 120]), abs=1e-4
    )
    scorer._texts._cache.check()


def test_losers_free_their_pages_and_one_kept_branch_holds_its_own(model: PreTrainedModel) -> None:
    scorer = plain_scorer(model, 300)
    prompt = text_prompt(LM, QUESTIONS[0])
    scorer.start(0, prompt, 60)
    scorer.score([ScoreJob(0, 0, [], "")])
    prompt_pages = -(-len(prompt.token_ids) // PAGE)
    assert scorer.stats()["rm_pages_used"] == prompt_pages
    for branch in (1, 5):
        jobs = [ScoreJob(0, branch + i, [100 + branch + i] * 5, "") for i in range(4)]
        scorer.score(jobs)
        rows = scorer.stats()["rm_pages_used"]
        scorer.keep(0, branch + 2)
        assert rows - scorer.stats()["rm_pages_used"] == (0 if branch == 1 else 2)
        scorer.prune(0)
        assert scorer.stats()["rm_pages_used"] == prompt_pages + 2  # 5 tokens
    tokens = scorer.stats()["rm_tokens"]
    scorer.accept(0, 7)
    scorer.score([ScoreJob(0, 9, [107] * 5 + [120], "")])
    assert scorer.stats()["rm_tokens"] == tokens + 1


def test_segments_of_a_page_are_never_copied(model: PreTrainedModel) -> None:
    scorer = plain_scorer(model, 300)
    copied = []
    scorer.model.copy_pages = lambda *copies: copied.append(copies)  # type: ignore[method-assign]
    prompt = text_prompt(LM, QUESTIONS[0])
    assert len(prompt.token_ids) % PAGE
    scorer.start(0, prompt, 60)
    response: list[int] = []
    for branch in range(6):
        segment = list(range(100 + branch, 100 + branch + PAGE))
        scorer.score([ScoreJob(0, branch, response + segment, "")])
        scorer.accept(0, branch)
        response += segment
        if branch == 3:
            scorer._texts.evict(0)
    assert not copied


def test_scored_candidates_give_way_before_committed_text(model: PreTrainedModel) -> None:
    prompt = text_prompt(LM, QUESTIONS[0])
    pages = -(-len(prompt.token_ids) // PAGE)
    scorer = plain_scorer(model, 1 + pages + 3)
    scorer.start(0, prompt, PAGE)
    scorer.score([ScoreJob(0, 0, [], "")])
    tokens = scorer.stats()["rm_tokens"]
    jobs = [ScoreJob(0, 1 + i, [100 + i] * PAGE, "") for i in range(8)]
    rewards = scorer.score(jobs)
    for job, reward in zip(jobs, rewards, strict=True):
        want = plain_reward(model, [*prompt.token_ids, *job.response_ids])
        assert reward == pytest.approx(want, abs=1e-4)
    assert scorer.stats()["rm_evictions"] == 0
    assert scorer.stats()["rm_tokens"] == tokens + 8 * PAGE


@pytest.mark.parametrize("losing_pages", [False, True])
def test_cached_text_is_a_prefix_of_the_committed_one(losing_pages: bool) -> None:
    # With another tokenizer a new segment may change the last tokens of the text before it.
    letters, tokenizer = bpe_tokenizer(280), bpe_tokenizer(400)
    model = reward_model("llama", tokenizer)
    scorer = load_scorer(
        model, lm_tokenizer=letters, reward_tokenizer=tokenizer, num_pages=300, page_size=PAGE
    )
    assert isinstance(scorer, CausalScorer)
    walk = Walk(scorer, letters, seed=2)
    walk.start(0, text_prompt(letters, QUESTIONS[0]))
    walk.prompt_round()
    retracted = 0
    for _ in range(20):
        before = scorer._texts._requests[0].committed.tolist()
        walk.score([walk.job(0, [*walk.committed[0], 20])])
        scorer.prune(0)
        job = walk.job(0, walk.committed[0] + walk.draw())
        walk.score([job])
        if losing_pages:
            scorer._texts.busy = frozenset({0})
            assert scorer._texts._free(scorer._texts.busy)
        walk.accept(0, job.branch, job.response_ids)
        committed = scorer._texts._requests[0].committed.tolist()
        cached = scorer._texts._cache.tokens(0)
        assert cached == committed[: len(cached)]
        retracted += committed[: len(before)] != before
    assert retracted


def test_request_larger_than_the_pool_is_refused(model: PreTrainedModel) -> None:
    scorer = plain_scorer(model, 11)  # 40 tokens
    prompt = text_prompt(LM, QUESTIONS[2])
    room = 40 - len(prompt.token_ids)
    with pytest.raises(ValueError, match="cache of 40 tokens; raise num_pages"):
        scorer.start(0, prompt, room + 1)
    scorer.start(0, prompt, room)
    response = [100 + i for i in range(room)]
    (reward,) = scorer.score([ScoreJob(0, 0, response, "")])
    assert reward == pytest.approx(plain_reward(model, [*prompt.token_ids, *response]), abs=1e-4)


def test_not_finite_rewards_harm_nobody_else(model: PreTrainedModel) -> None:
    poisoned = reward_model("llama", LM)
    with torch.no_grad():
        poisoned.get_input_embeddings().weight[399] = torch.nan
    scorer = plain_scorer(poisoned, 40)
    prompts = [text_prompt(LM, question) for question in QUESTIONS]
    for request in (0, 1):
        scorer.start(request, prompts[request], 20)
    bad, neighbour = scorer.score([ScoreJob(0, 0, [100, 399], ""), ScoreJob(1, 1, [102], "")])
    assert isinstance(bad, RewardError)
    assert "nan" in str(bad)
    assert neighbour == pytest.approx(plain_reward(model, [*prompts[1].token_ids, 102]), abs=1e-4)
    # The pages that held NaN are used again.
    scorer.finish(0)
    scorer.start(2, prompts[2], 20)
    (later,) = scorer.score([ScoreJob(2, 3, [103, 104, 105], "")])
    assert later == pytest.approx(
        plain_reward(model, [*prompts[2].token_ids, 103, 104, 105]), abs=1e-4
    )


def test_failing_pass_fails_its_jobs_and_leaks_nothing(model: PreTrainedModel) -> None:
    scorer = plain_scorer(model, 60)
    scorer.start(0, text_prompt(LM, QUESTIONS[0]), 20)
    scorer.score([ScoreJob(0, 0, [], "")])
    used = scorer.stats()["rm_pages_used"]
    extend = scorer.model.extend_all

    def failing(*_: object) -> torch.Tensor:
        raise RuntimeError("device lost")

    scorer.model.extend_all = failing  # type: ignore[method-assign]
    results = scorer.score([ScoreJob(0, 1, [100], ""), ScoreJob(0, 2, [101], "")])
    assert [type(result) for result in results] == [RewardError, RewardError]
    assert "device lost" in str(results[0])
    assert scorer.stats()["rm_pages_used"] == used
    scorer.model.extend_all = extend  # type: ignore[method-assign]
    (reward,) = scorer.score([ScoreJob(0, 3, [100], "")])
    assert isinstance(reward, float)


def test_prompt_cache_serves_a_second_tokenizer_under_shortage() -> None:
    tokenizer = bpe_tokenizer(340, chat="chatml")
    model = reward_model("qwen2", tokenizer)
    scorer = load_scorer(
        model, lm_tokenizer=LM, reward_tokenizer=tokenizer, num_pages=40, page_size=PAGE
    )
    walk = Walk(scorer, LM, seed=5, candidates=4)
    for request, question in enumerate(QUESTIONS):
        walk.start(request, chat_prompt(LM, question), budget=20)
    walk.run(rounds=8, limit=12)

    def expected(item: Round) -> float:
        assert item.prompt.messages
        answer = {"role": "assistant", "content": item.job.response_text}
        encoded = tokenizer.apply_chat_template([*item.prompt.messages, answer])
        return plain_reward(model, encoded["input_ids"])

    walk.check(expected)
    assert scorer.stats()["rm_evictions"] > 0
