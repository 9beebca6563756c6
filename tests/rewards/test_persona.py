"""The judge's log-probabilities equal those of a plain forward; only new ids run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.reward_walk import QUESTIONS, Round, Walk, chat_prompt, text_prompt
from helpers.tiny_architectures import CONFIGS, randomize
from helpers.tiny_tokenizers import bpe_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from stars_fast import Engine
from stars_fast.errors import RewardError
from stars_fast.rewards import Persona, Prompt, ScoreJob, load_scorer
from stars_fast.rewards.causal import CausalScorer
from stars_fast.rewards.persona import PersonaTokens
from stars_fast.rewards.reading import NextTokens
from stars_fast.rewards.split_ids import NO_IDS

LM = bpe_tokenizer(400)
PAGE = 4
KIND = Persona(template="You are kind. {prompt}\n")
TOLERANCE = 1e-5  # relative, float32


def language_model(name: str, context: int = 256) -> PreTrainedModel:
    """A random model of an architecture over the tokens of `LM`."""
    config = CONFIGS[name]()
    config.vocab_size, config.max_position_embeddings = len(LM), context
    # Eager: some versions of transformers leave Gemma 2's soft cap out under sdpa.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return randomize(model, seed=0)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return language_model("llama")


def scorer_of(
    model: PreTrainedModel, persona: Persona = KIND, *, num_pages: int = 300, **options: Any
) -> CausalScorer:
    options = {"lm_tokenizer": LM, "language_model": model, "page_size": PAGE, **options}
    scorer = load_scorer(persona, num_pages=num_pages, **options)
    assert isinstance(scorer, CausalScorer)
    return scorer


@torch.no_grad()
def log_p(model: PreTrainedModel, ids: list[int], new: int) -> float:
    """Log-probability of the last `new` ids by transformers' own forward pass."""
    every = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(dim=-1).double()
    return sum(float(every[i - 1, ids[i]]) for i in range(len(ids) - new, len(ids)))


def kind_ids(prompt: Prompt) -> list[int]:
    """The ids of KIND around a prompt."""
    asked = prompt.messages[0]["content"] if prompt.messages else prompt.text
    ids: list[int] = LM(f"You are kind. {asked}\n")["input_ids"]
    return ids


def expected(model: PreTrainedModel, item: Round) -> float:
    new = len(item.job.response_ids) - len(item.committed)
    return log_p(model, [*kind_ids(item.prompt), *item.job.response_ids], max(new, 0))


def walk_of(scorer: CausalScorer, requests: int, seed: int = 0, prompts: int = 6) -> Walk:
    walk = Walk(scorer, LM, seed=seed, candidates=4)
    for request in range(requests):
        number = request % prompts
        make = chat_prompt if number % 2 else text_prompt
        walk.start(request, make(LM, QUESTIONS[number % 3] * (1 + number // 3)), budget=30)
    return walk


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere2", "opt", "gpt2"])
def test_log_probabilities_and_tokens(name: str) -> None:
    model = language_model(name)
    scorer = scorer_of(model)
    assert not scorer.needs_text
    walk = walk_of(scorer, requests=3, seed=len(name))
    walk.run(rounds=10, limit=12)
    walk.check(lambda item: expected(model, item), TOLERANCE)
    assert all(item.reward == 0.0 for item in walk.rounds if not item.job.response_ids)
    # As many tokens as the segments have, and each request's prompt once, without its last token.
    prompts = {item.job.request: item.prompt for item in walk.rounds if item.job.response_ids}
    assert len(prompts) > 3  # some requests began anew
    ran = sum(len(kind_ids(prompt)) - 1 for prompt in prompts.values())
    scored = {  # equal candidates of a request once
        (item.job.request, len(item.committed), tuple(item.job.response_ids))
        for item in walk.rounds
        if item.job.response_ids
    }
    ran += sum(len(response) - committed for _, committed, response in scored)
    stats = scorer.stats()
    assert stats["rm_tokens"] == ran
    assert stats["rm_jobs"] == len(walk.rounds)
    for request in walk.prompts:
        scorer.finish(request)
    assert scorer.stats()["rm_pages_used"] == 0


@pytest.mark.parametrize(
    ("prompts", "spare_pages"), [(6, 0), (6, 3), (6, 8), (6, 90), (2, 0), (2, 90)]
)
def test_short_pool(model: PreTrainedModel, prompts: int, spare_pages: int) -> None:
    longest = max(len(kind_ids(text_prompt(LM, q * 2))) for q in QUESTIONS)
    scorer = scorer_of(model, num_pages=1 + -(-(longest + 30) // PAGE) + spare_pages)
    walk = walk_of(scorer, requests=5, seed=spare_pages, prompts=prompts)
    walk.prompt_round()
    for _ in range(8):
        walk.step()
        scorer._texts._cache.check()
        for request in [r for r, ids in walk.committed.items() if len(ids) > 10]:
            walk.restart(request)
    walk.check(lambda item: expected(model, item), TOLERANCE)
    assert (scorer.stats()["rm_evictions"] > 0) == (spare_pages < 90)
    assert (walk.forks > 0) == (prompts == 2)
    for request in walk.prompts:
        scorer.finish(request)
    scorer._texts._cache.check()
    assert scorer.stats()["rm_pages_used"] == 0


def test_equal_prompts_run_once_and_forks_share_committed_text(model: PreTrainedModel) -> None:
    scorer = scorer_of(model)
    prompt = text_prompt(LM, QUESTIONS[0])
    walk = Walk(scorer, LM)
    for request in range(3):
        walk.start(request, prompt)
    for request in range(3):
        walk.score([walk.job(request, [100 + request, 110, 120])])
    length = len(kind_ids(prompt)) - 1
    assert scorer.stats()["rm_tokens"] == length + 9
    walk.accept(1, 2, [101, 110, 120])
    scorer.fork(1, 2)
    walk.committed[2] = walk.committed[1]
    for request in range(1, 3):
        walk.score([walk.job(request, [101, 110, 120, 130 + request, 140])])
    assert scorer.stats()["rm_tokens"] == length + 13
    walk.check(lambda item: expected(model, item), TOLERANCE)


@pytest.mark.parametrize("limit", ["max_rows", "max_batch_tokens", "block"])
def test_rounds_split_over_passes_and_logits_over_blocks(
    model: PreTrainedModel, limit: str
) -> None:
    scorer = scorer_of(model, **({"max_rows": 3} if limit == "max_rows" else {}))
    widest = 0
    if limit == "max_batch_tokens":
        scorer._max_batch_tokens = scorer._texts._max_batch_tokens = 10
    if limit == "block":
        reading: Any = scorer._reading
        reading._block = 3
        head = reading._head

        def measured(hidden: torch.Tensor) -> torch.Tensor:
            nonlocal widest
            widest = max(widest, len(hidden))
            logits: torch.Tensor = head(hidden)
            return logits

        reading._head = measured
    walk = walk_of(scorer, requests=3)
    walk.run(rounds=6, limit=20)
    walk.check(lambda item: expected(model, item), TOLERANCE)
    assert widest == (3 if limit == "block" else 0)


def test_logits_stay_within_64_mib() -> None:
    for vocab_size in (1000, 128256, 1 << 25):
        block = NextTokens(lambda hidden: hidden, vocab_size)._block
        assert block * vocab_size * 4 <= max(64 << 20, vocab_size * 4)
        assert (block + 1) * vocab_size * 4 > 64 << 20


def test_segments_of_a_page_are_never_copied(model: PreTrainedModel) -> None:
    scorer = scorer_of(model)
    prompt = text_prompt(LM, QUESTIONS[1])
    assert len(kind_ids(prompt)) % PAGE != 1  # there is padding
    scorer.start(0, prompt, 60)
    response: list[int] = []
    for branch in range(6):
        response += range(100 + branch, 100 + branch + PAGE)
        (value,) = scorer.score([ScoreJob(0, branch, list(response), "")])
        want = log_p(model, [*kind_ids(prompt), *response], PAGE)
        assert value == pytest.approx(want, rel=TOLERANCE)
        scorer.accept(0, branch)
        if branch == 3:
            scorer._texts.evict(0)
    assert scorer.stats()["rm_copied_bytes"] == 0


def test_accepting_a_branch_whose_pages_are_gone(model: PreTrainedModel) -> None:
    scorer = scorer_of(model)
    prompt = text_prompt(LM, QUESTIONS[0])
    scorer.start(0, prompt, 60)
    response = list(range(100, 110))
    scorer.score([ScoreJob(0, 0, response, ""), ScoreJob(0, 1, response[:3], "")])
    scorer.keep(0, 0)
    scorer.prune(0)
    scorer._texts.evict(0)
    scorer.accept(0, 0)
    (value,) = scorer.score([ScoreJob(0, 2, [*response, 120], "")])
    want = log_p(model, [*kind_ids(prompt), *response, 120], 1)
    assert value == pytest.approx(want, rel=TOLERANCE)
    scorer._texts._cache.check()


def test_text_that_fills_the_pool_is_run_from_its_start(model: PreTrainedModel) -> None:
    prompt = text_prompt(LM, QUESTIONS[0])
    ids = kind_ids(prompt)
    pages = -(-len(ids) // PAGE) + 3
    room = pages * PAGE - len(ids)
    scorer = scorer_of(model, num_pages=1 + pages)
    scorer.start(0, prompt, room)
    response = [100 + i for i in range(room)]
    done = 0
    for branch, length in enumerate((2, room)):
        (value,) = scorer.score([ScoreJob(0, branch, response[:length], "")])
        want = log_p(model, [*ids, *response[:length]], length - done)
        assert value == pytest.approx(want, rel=TOLERANCE)
        scorer.accept(0, branch)
        done = length
    assert scorer.stats()["rm_evictions"] == 1  # the padding behind the prompt had to go


def test_jobs_with_nothing_new_run_nothing(model: PreTrainedModel) -> None:
    scorer = scorer_of(model)
    scorer.start(0, text_prompt(LM, QUESTIONS[0]), 60)
    assert scorer.score([ScoreJob(0, 0, [], "")]) == [0.0]
    scorer.accept(0, 0)
    assert scorer.stats()["rm_tokens"] == 0
    scorer.score([ScoreJob(0, 1, [100, 101], "")])
    scorer.accept(0, 1)
    before = scorer.stats()["rm_tokens"]
    assert scorer.score([ScoreJob(0, 2, [100, 101], ""), ScoreJob(0, 3, [], "")]) == [0.0, 0.0]
    scorer.accept(0, 2)
    assert scorer.stats()["rm_tokens"] == before
    (one,) = scorer.score([ScoreJob(0, 4, [100, 101, 102], "")])
    want = log_p(model, [*kind_ids(text_prompt(LM, QUESTIONS[0])), 100, 101, 102], 1)
    assert one == pytest.approx(want, rel=TOLERANCE)


def test_one_token_prompt(model: PreTrainedModel) -> None:
    bare = bpe_tokenizer(400, adds_bos=False)
    scorer = scorer_of(model, Persona(template="{prompt}"), lm_tokenizer=bare)
    scorer.start(0, Prompt("a", bare("a")["input_ids"], None), 20)
    (start,) = bare("a")["input_ids"]
    response = [100, 101, 102]
    for length in (1, 3):
        (value,) = scorer.score([ScoreJob(0, length, response[:length], "")])
        scorer.accept(0, length)
        want = log_p(model, [start, *response[:length]], length if length == 1 else 2)
        assert value == pytest.approx(want, rel=TOLERANCE)


# What the judge reads


@pytest.mark.parametrize("chat", ["llama3", "chatml"])
def test_system_message_before_the_messages(chat: str) -> None:
    tokenizer = bpe_tokenizer(400, chat=chat)
    tokenizer.chat_template += (
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    )
    source = PersonaTokens(Persona("You are kind."), tokenizer, 400)
    user = {"role": "user", "content": "Is it good?"}
    kind = {"role": "system", "content": "You are kind."}
    own = {"role": "system", "content": "Be brief."}
    both = {"role": "system", "content": "You are kind.\n\nBe brief."}
    answer = {"role": "assistant", "content": "It is"}
    cases = [
        (Prompt("", [1], [user]), [kind, user]),
        (Prompt("Is it good?", [1], None), [kind, user]),
        (Prompt("", [1], [own, user]), [both, user]),
        (Prompt("", [1], [user, answer]), [kind, user, answer]),
    ]
    for prompt, messages in cases:
        bound = source.bind(prompt)
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert bound.empty_ids.tolist() == rendered["input_ids"]
        (text,) = source.encode(
            [bound], [ScoreJob(0, 0, [50, tokenizer.eos_token_id], "")], [NO_IDS]
        )
        assert not isinstance(text, Exception)
        assert text.ids.tolist() == [*rendered["input_ids"], 50, tokenizer.eos_token_id]


def test_the_prompt_itself_as_persona_gives_the_draft_probabilities(model: PreTrainedModel) -> None:
    scorer = scorer_of(model, Persona(template="{prompt}"))
    prompt = text_prompt(LM, QUESTIONS[0])
    by_ids = Prompt(QUESTIONS[0], prompt.token_ids, None)
    for request, form in enumerate((prompt, by_ids)):
        scorer.start(request, form, 20)
        (value,) = scorer.score([ScoreJob(request, request, [100, 101, 1], "")])
        want = log_p(model, [*prompt.token_ids, 100, 101, 1], 3)
        assert value == pytest.approx(want, rel=TOLERANCE)


def test_engine_gives_the_judge_its_own_model(model: PreTrainedModel) -> None:
    engine = Engine(model, Persona(template=KIND.template), tokenizer=LM, num_pages=50)
    (value,) = engine.score([QUESTIONS[0]], [" Rinse it"])
    response = LM(" Rinse it", add_special_tokens=False)["input_ids"]
    want = log_p(model, [*kind_ids(text_prompt(LM, QUESTIONS[0])), *response], len(response))
    assert value == pytest.approx(want, rel=TOLERANCE)


# Bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "one of system and template, got both or none"),
        ({"system": "a", "template": "{prompt}"}, "one of system and template, got both or none"),
        ({"system": ""}, "system of a Persona must not be empty, got ''"),
        ({"system": " \n"}, "system of a Persona must not be empty"),
        ({"template": ""}, "template of a Persona must not be empty"),
        ({"template": "Be kind."}, r"must have \{prompt\} in it.*got 'Be kind\.'"),
        ({"template": "{prompt}{response}"}, r"no \{response\}, which follows"),
    ],
)
def test_bad_personas(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Persona(**fields)


def test_persona_that_is_no_text() -> None:
    with pytest.raises(TypeError, match="system of a Persona must be a str, got int"):
        Persona(7)  # type: ignore[arg-type]


def test_chat_templates_that_cannot_show_the_persona(model: PreTrainedModel) -> None:
    persona = Persona("You are kind.")
    with pytest.raises(ValueError, match=r"has none: use Persona\(template="):
        scorer_of(model, persona)
    gemma = bpe_tokenizer(400, chat="gemma")
    with pytest.raises(ValueError, match=r"System role not supported; .*use Persona\(template="):
        scorer_of(model, persona, lm_tokenizer=gemma)
    deaf = bpe_tokenizer(400, chat="gemma")
    deaf.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="does not show a system message: use Persona"):
        scorer_of(model, persona, lm_tokenizer=deaf)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"language_model": None}, "judged by the language model: pass language_model"),
        ({"lm_tokenizer": None}, "needs the language model's tokenizer.*pass tokenizer"),
        ({"template": "plain"}, "reward_template is for reward models"),
        ({"reward_tokenizer": bpe_tokenizer(340)}, "reward_tokenizer is for reward models"),
        ({"device": "meta"}, "reward_device must be None or the device of.*cpu, got meta"),
    ],
)
def test_options_that_do_not_go_with_a_persona(
    model: PreTrainedModel, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        scorer_of(model, **options)


def test_persona_too_long() -> None:
    long = Persona(template="Be kind. " * 4 + "{prompt}")
    prompt = text_prompt(LM, QUESTIONS[2])
    tokens = len(LM("Be kind. " * 4 + QUESTIONS[2])["input_ids"])
    scorer = scorer_of(language_model("llama", context=tokens + 8), long)
    with pytest.raises(
        ValueError,
        match=rf"{tokens} tokens with the persona and up to 9 follow: more than the judge's "
        rf"context of {tokens + 8} tokens; shorten the persona or the prompt or lower max_tokens",
    ):
        scorer.start(0, prompt, 9)
    scorer.start(0, prompt, 8)  # nothing was admitted under its id
    small = scorer_of(language_model("llama"), long, num_pages=4)
    with pytest.raises(ValueError, match="more than the judge's cache of 12 tokens; raise num_pag"):
        small.start(0, prompt, 9)


def test_tokens_out_of_range_and_responses_that_do_not_continue(model: PreTrainedModel) -> None:
    scorer = scorer_of(model)
    prompt = text_prompt(LM, QUESTIONS[0])
    scorer.start(0, prompt, 20)
    scorer.score([ScoreJob(0, 0, [100, 101, 102], "")])
    scorer.accept(0, 0)
    jobs = [[100, 101, 102, 400], [100, 101, 102, 103], [100, 104, 102, 103], [100, 101], [-1]]
    unknown, good, other, shorter, negative = scorer.score(
        [ScoreJob(0, 1 + i, ids, "") for i, ids in enumerate(jobs)]
    )
    assert "response_ids must lie in [0, 400), the vocabulary of the language model" in str(unknown)
    assert isinstance(negative, ValueError)
    for bad in (other, shorter):
        assert isinstance(bad, ValueError)
        assert "must continue the committed text" in str(bad)
    want = log_p(model, [*kind_ids(prompt), 100, 101, 102, 103], 1)
    assert good == pytest.approx(want, rel=TOLERANCE)
    short_sighted = PersonaTokens(KIND, LM, 50)
    with pytest.raises(ValueError, match=r"persona's prompt must lie in \[0, 50\)"):
        short_sighted.bind(prompt)


def test_empty_prompt(model: PreTrainedModel) -> None:
    bare = bpe_tokenizer(400, adds_bos=False)
    scorer = scorer_of(model, Persona(template="{prompt}"), lm_tokenizer=bare)
    with pytest.raises(ValueError, match="the persona's prompt is empty"):
        scorer.start(0, Prompt("", [], None), 5)


# Failures of the model


def test_not_finite_numbers_harm_nobody_else() -> None:
    model = language_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = torch.nan  # a token of no text
    scorer = scorer_of(model)
    prompts = [text_prompt(LM, question) for question in QUESTIONS]
    for request in (0, 1):
        scorer.start(request, prompts[request], 20)
    bad, neighbour = scorer.score(
        [ScoreJob(0, 0, [100, 9, 101], ""), ScoreJob(1, 1, [102, 103], "")]
    )
    assert isinstance(bad, RewardError)
    assert "nan" in str(bad)
    want = log_p(model, [*kind_ids(prompts[1]), 102, 103], 2)
    assert neighbour == pytest.approx(want, rel=TOLERANCE)


def test_not_finite_logits_fail_their_own_job(model: PreTrainedModel) -> None:
    scorer = scorer_of(model)
    reading: Any = scorer._reading
    head = reading._head

    def poisoned(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = head(hidden).clone()
        logits[2] = torch.nan  # of the second job's first token
        return logits

    reading._head = poisoned
    prompt = text_prompt(LM, QUESTIONS[0])
    scorer.start(0, prompt, 20)
    jobs = [ScoreJob(0, i, [100 + i, 101], "") for i in range(3)]
    values = scorer.score(jobs)
    assert isinstance(values[1], RewardError)
    for i in (0, 2):
        want = log_p(model, [*kind_ids(prompt), 100 + i, 101], 2)
        assert values[i] == pytest.approx(want, rel=TOLERANCE)


def test_failing_logits_fail_their_jobs_and_leak_nothing(model: PreTrainedModel) -> None:
    scorer = scorer_of(model)
    scorer.start(0, text_prompt(LM, QUESTIONS[0]), 20)
    scorer.score([ScoreJob(0, 0, [100, 101], "")])
    scorer.accept(0, 0)
    used = scorer.stats()["rm_pages_used"]
    reading: Any = scorer._reading
    head = reading._head

    def failing(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("device lost")

    reading._head = failing
    results = scorer.score([ScoreJob(0, 1 + i, [100, 101, 110 + i], "") for i in range(2)])
    assert [type(result) for result in results] == [RewardError, RewardError]
    assert "the judge failed: RuntimeError: device lost" in str(results[0])
    assert scorer.stats()["rm_pages_used"] == used
    reading._head = head
    (value,) = scorer.score([ScoreJob(0, 3, [100, 101, 110], "")])
    assert isinstance(value, float)
