"""Penalties, biases, tokens that are not drawn: on every method, in any batch, in both forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from helpers.bpe_engine import bpe_engine
from helpers.tiny_lm import small_model
from helpers.tiny_tokenizers import bpe_tokenizer

from stars_fast import Engine, RequestOutput, StarsParams
from stars_fast.rewards import Persona
from stars_fast.text.words import word_tokens

PROMPTS = ["The film was slow at first, but", "A terrible kettle", "Not bad at all. " * 3]
BASE = StarsParams(
    segment_length=5,
    max_tokens=24,
    max_attempts=4,
    target_reward=1.0,
    beta=0.4,
    temperature=1.0,
    top_k=30,
    candidates=1,
)
METHODS: dict[str, StarsParams] = {
    "stars": BASE,
    "gibbs": BASE.with_method("stars", acceptance="gibbs", candidates=4),
    "vanilla": BASE.with_method("vanilla"),
    "best_of_n": BASE.with_method("best_of_n", candidates=3),
    "rejection": BASE.with_method("rejection"),
    "cards": BASE.with_method("cards", entropy_threshold=5.0, min_segment_length=1),
    "args": BASE.with_method("args", candidates=3),
    "speculative_rejection": BASE.with_method("speculative_rejection", candidates=3),
    "smc": BASE.with_method("smc", candidates=4, beta=0.1, ess_threshold=1.0),
    "mara": BASE.with_method("mara"),
    "persona_judge": BASE.with_method("persona_judge"),
}
every_method = pytest.mark.parametrize("method", METHODS)
EVERYTHING: dict[str, Any] = {
    "repetition_penalty": 1.4,
    "presence_penalty": 0.6,
    "frequency_penalty": 0.4,
    "logit_bias": {30: 3.0, 40: -100.0, 50: 2.0},
    "min_tokens": 12,
    "top_logprobs": 4,
}


def engine_for(method: str, model: Any = None, **options: Any) -> Engine:
    if method == "persona_judge":
        return bpe_engine(Persona(template="Be kind. {prompt}"), model=model, **options)
    return bpe_engine(model=model, **options)


def run(
    params: StarsParams,
    prompts: Any = PROMPTS,
    *,
    method: str = "",
    model: Any = None,
    **options: Any,
) -> list[RequestOutput]:
    engine = engine_for(method, model, **options)
    each = [dataclasses.replace(params, seed=70 + i) for i in range(len(prompts))]
    outputs = engine.generate(prompts, each, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * len(prompts)
    return outputs


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [response.token_ids for output in outputs for response in output.outputs]


class TestUnknownTokens:
    """The model has 112 logits more than the tokenizer has tokens."""

    PARAMS: ClassVar[dict[str, Any]] = {"temperature": 2.0, "top_k": 0, "ignore_eos": True}

    def model(self) -> Any:
        """The most likely tokens are those that the tokenizer lacks."""
        model = small_model(512)
        with torch.no_grad():
            model.lm_head.weight[400:] *= 3
        return model

    @pytest.fixture(autouse=True)
    def _restored(self) -> Any:
        weight = small_model(512).lm_head.weight.detach().clone()
        yield
        with torch.no_grad():
            small_model(512).lm_head.weight.copy_(weight)

    @every_method
    @pytest.mark.parametrize("temperature", [0.0, 2.0])
    def test_are_never_drawn(self, method: str, temperature: float) -> None:
        given = self.PARAMS | {"temperature": temperature}
        params = dataclasses.replace(METHODS[method], **given)
        found = tokens(run(params, method=method, model=self.model()))
        assert max(map(max, found)) < 400

    def test_would_be_drawn_without_a_tokenizer(self) -> None:
        engine = Engine(self.model(), num_pages=100)
        params = METHODS["vanilla"]
        outputs = engine.generate(
            [[5, 6, 7]], dataclasses.replace(params, **self.PARAMS), use_tqdm=False
        )
        assert max(tokens(outputs)[0]) >= 400

    @pytest.mark.parametrize("adjusted", [False, True])
    def test_logprobs_are_of_the_whole_distribution(self, adjusted: bool) -> None:
        changes = {**self.PARAMS, **(EVERYTHING if adjusted else {})}
        model = self.model()
        (output,) = run(
            dataclasses.replace(METHODS["vanilla"], **changes), PROMPTS[:1], model=model
        )
        response = output.outputs[0]
        ids = torch.tensor([[*output.prompt_token_ids, *response.token_ids]])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)
        behind = len(output.prompt_token_ids) - 1
        want = [float(log_p[behind + i, t]) for i, t in enumerate(response.token_ids)]
        assert response.logprobs == pytest.approx(want, abs=1e-4)

    def test_holes_between_known_ones(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ids that a tokenizer skips are no tokens either, greedy draws included."""
        tokenizer = bpe_tokenizer()
        missing = set(range(100, 350, 2))
        vocab = {word: i for word, i in tokenizer.get_vocab().items() if i not in missing}
        monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: vocab)
        for temperature in (0.0, 2.0):
            for changes in ({}, EVERYTHING):
                params = dataclasses.replace(
                    METHODS["vanilla"], **{**self.PARAMS, "temperature": temperature, **changes}
                )
                found = tokens(run(params, model=self.model()))
                assert not missing & {token for ids in found for token in ids}
                assert max(map(max, found)) < 400

    def test_nothing_changes_where_the_sizes_agree(self) -> None:
        drafter = bpe_engine().loop.drafter
        assert drafter._known is None
        assert engine_for("", self.model()).loop.drafter._known is not None


@every_method
def test_biases_decide(method: str) -> None:
    """By so much that nothing else is left; what is biased away never comes."""
    params = dataclasses.replace(METHODS[method], ignore_eos=True)
    likely = tokens(run(params, method=method))
    away = {token for ids in likely for token in ids}
    changed = dataclasses.replace(params, logit_bias=dict.fromkeys(away, -100.0))
    assert not away & {t for ids in tokens(run(changed, method=method)) for t in ids}
    if method not in ("args", "mara"):  # whose candidates are the next likely ones, too
        changed = dataclasses.replace(params, logit_bias={77: 100.0}, max_tokens=6)
        assert tokens(run(changed, method=method)) == [[77] * 6] * 3


@every_method
def test_min_tokens(method: str) -> None:
    """Ends that would come at once do not before the minimum, and then come."""
    ends = {"logit_bias": {1: 60.0, 9: 60.0}, "stop_token_ids": [9], "candidates": 2}
    if "candidates" not in METHODS[method].own_parameters():
        del ends["candidates"]
    params = dataclasses.replace(METHODS[method], **ends)
    for least in (0, 7, 24):
        found = tokens(run(dataclasses.replace(params, min_tokens=least), method=method))
        for ids in found:
            assert not {1, 9} & set(ids[:least])
            if method not in ("args", "mara"):
                assert len(ids) == min(24, least + 1)


@every_method
def test_no_token_comes_twice(method: str) -> None:
    """Thirty tokens that nothing else comes up to, and a penalty that no drawn one survives.

    Within a segment, over its border, and in paths that go on as copies of others; a prompt counts.
    """
    params = dataclasses.replace(
        METHODS[method],
        logit_bias=dict.fromkeys(range(100, 130), 60.0),
        repetition_penalty=2.0,
        ignore_eos=True,
        top_k=0,
    )
    prompts = [[5, 100, 6], [5, 101, 102], [104, 105]]
    if method == "persona_judge":
        prompts = PROMPTS  # it reads the text
    outputs = run(params, prompts, method=method)
    for output in outputs:
        (response,) = output.outputs
        assert set(response.token_ids) <= set(range(100, 130))
        assert len(set(response.token_ids)) == len(response.token_ids) == 24
        assert not set(response.token_ids) & set(output.prompt_token_ids)


@pytest.mark.parametrize("method", ["stars", "vanilla", "smc", "args"])
def test_penalties_of_the_response_leave_the_prompt_alone(method: str) -> None:
    """Two tokens take turns, for a use costs more than they differ; the prompt has many of one."""
    params = dataclasses.replace(
        METHODS[method],
        logit_bias={77: 60.0, 78: 60.0},
        temperature=0.01,
        ignore_eos=True,
        frequency_penalty=2.0,
        **({"segment_length": 1} if method != "args" else {"candidates": 1}),
    )
    for ids in tokens(run(params, [[77] * 9, [78] * 9], method=method)):
        assert all(abs(ids[:n].count(77) - ids[:n].count(78)) <= 1 for n in range(len(ids) + 1))
    # A presence is counted once: both come, and then the likelier one stays.
    present = dataclasses.replace(params, frequency_penalty=0.0, presence_penalty=2.0)
    for ids in tokens(run(present, [[77] * 9, [78] * 9], method=method)):
        assert set(ids) == {77, 78}


@pytest.mark.parametrize("method", ["stars", "cards", "smc", "args", "best_of_n"])
def test_same_tokens_in_any_batch(method: str) -> None:
    params = dataclasses.replace(METHODS[method], **EVERYTHING)
    want = run(params)
    assert tokens(want) != tokens(run(METHODS[method]))
    for number, prompt in enumerate(PROMPTS):
        alone = engine_for(method).generate(
            [prompt], dataclasses.replace(params, seed=70 + number), use_tqdm=False
        )
        assert tokens(alone) == tokens(want[number : number + 1])
    # Beside rows that have no adjustments, or others.
    mixed = engine_for(method)
    each = [
        dataclasses.replace(params, seed=70),
        dataclasses.replace(METHODS["vanilla"], seed=70),
        dataclasses.replace(METHODS["stars"], seed=5, frequency_penalty=2.0, logit_bias={3: 1.0}),
    ]
    outputs = mixed.generate([PROMPTS[0]] * 3, each, use_tqdm=False)
    assert tokens(outputs[:1]) == tokens(want[:1])
    plain = engine_for(method).generate(PROMPTS[0], each[1], use_tqdm=False)
    assert tokens(outputs[1:2]) == tokens(plain)
    # With few rows and pages: waiting, preempted, recomputed.
    scarce = run(params, num_pages=30, max_rows=4)
    assert tokens(scarce) == tokens(want)


@pytest.mark.parametrize("candidates", [2, 4, "auto"])
@pytest.mark.parametrize("method", ["stars", "cards", "rejection"])
def test_any_number_of_candidates(method: str, candidates: Any) -> None:
    """The state forks with the rows: an attempt's own tokens count for it alone."""
    params = dataclasses.replace(METHODS[method], **EVERYTHING)
    want = run(params)
    got = run(dataclasses.replace(params, candidates=candidates))
    assert tokens(got) == tokens(want)
    if method != "rejection":
        assert any(s.attempts > 1 for output in want for s in output.outputs[0].segments)


def test_overlapped_rounds() -> None:
    params = dataclasses.replace(METHODS["stars"], **EVERYTHING)
    assert tokens(run(params, overlap_scoring=True)) == tokens(run(params))


def test_triton_form() -> None:
    """A captured step, in the interpreter or a CUDA graph, with buckets that are outgrown."""
    changes = EVERYTHING | {"max_tokens": 6, "min_tokens": 3}
    each = [
        dataclasses.replace(METHODS["stars"], seed=1, candidates=2, segment_length=3, **changes),
        METHODS["vanilla"].with_method("vanilla", seed=2, max_tokens=4),
    ]
    found = {}
    for backend in ("pytorch", "triton"):
        engine = bpe_engine(model=small_model(512, layers=1), backend=backend, num_pages=100)
        found[backend] = engine.generate(PROMPTS[:2], each, use_tqdm=False)
    assert tokens(found["triton"]) == tokens(found["pytorch"])
    assert max(map(max, tokens(found["triton"]))) < 400
    for got, want in zip(found["triton"], found["pytorch"], strict=True):
        a, b = got.outputs[0], want.outputs[0]
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        assert [list(top) for top in a.top_logprobs] == [list(top) for top in b.top_logprobs]


def test_top_logprobs_are_of_the_raw_distribution() -> None:
    params = dataclasses.replace(METHODS["smc"], **EVERYTHING)
    (output,) = run(params, PROMPTS[:1])
    response = output.outputs[0]
    ids = torch.tensor([[*output.prompt_token_ids, *response.token_ids]])
    with torch.no_grad():
        log_p = small_model()(input_ids=ids).logits[0].log_softmax(-1)
    values, names = log_p[len(output.prompt_token_ids) - 1 : -1].topk(4)
    assert [list(top) for top in response.top_logprobs] == names.tolist()
    for top, want in zip(response.top_logprobs, values.tolist(), strict=True):
        assert list(top.values()) == pytest.approx(want, abs=1e-4)
    for top, token, logprob in zip(
        response.top_logprobs, response.token_ids, response.logprobs, strict=True
    ):
        assert top.get(token, logprob) == logprob
    assert run(BASE, PROMPTS[:1])[0].outputs[0].top_logprobs == []


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 1.7, "min_tokens": 10},
        {"repetition_penalty": 1.2, "logit_bias": {30: 2.0, 31: -3.0}},
    ],
)
def test_greedy_is_transformers_generate(changes: dict[str, Any]) -> None:
    model = small_model()
    params = dataclasses.replace(METHODS["vanilla"], temperature=0.0, **changes)
    bias = {(t,): b for t, b in changes.get("logit_bias", {}).items()}
    outputs = run(params)
    for output in outputs:
        ids = torch.tensor([output.prompt_token_ids])
        want = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            pad_token_id=0,
            repetition_penalty=changes["repetition_penalty"],
            min_new_tokens=changes.get("min_tokens"),
            sequence_bias=bias or None,
        )
        assert output.outputs[0].token_ids == want[0, ids.shape[1] :].tolist()


class TestBadWords:
    """Each of the words is one that the model says without them."""

    def words(self, tokens: list[list[int]], length: int) -> list[str]:
        """Texts of tokens in a row that a tokenizer reads as these."""
        tokenizer = bpe_tokenizer()
        found = []
        for ids in tokens:
            for at in range(1, len(ids) - length):
                part = ids[at : at + length]
                text = tokenizer.decode(part)
                if text.strip() and tuple(part) in word_tokens(tokenizer, [text]):
                    found.append(text)
        return list(dict.fromkeys(found))[:3]

    @pytest.mark.parametrize("backend", ["pytorch", "triton"])
    @pytest.mark.parametrize("length", [1, 2])
    def test_greedy_is_transformers_generate(self, length: int, backend: str) -> None:
        model = small_model(400, layers=1)
        greedy = dataclasses.replace(
            METHODS["vanilla"], temperature=0.0, segment_length=32, max_tokens=10, ignore_eos=True
        )
        free = tokens(run(greedy, PROMPTS[:2], model=model))
        words = self.words(free, length)
        assert words
        params = dataclasses.replace(greedy, bad_words=words)
        outputs = run(params, PROMPTS[:2], model=model, backend=backend, num_pages=100)
        ids_of_words = [list(ids) for ids in word_tokens(bpe_tokenizer(), words)]
        for output, before in zip(outputs, free, strict=True):
            ids = output.prompt_token_ids
            # Words that the prompt begins are the response's to end, as in vLLM.
            assert not any(word[:-1] and word[:-1] == ids[1 - len(word) :] for word in ids_of_words)
            want = model.generate(
                torch.tensor([ids]), attention_mask=torch.ones((1, len(ids)), dtype=torch.long),
                do_sample=False, max_new_tokens=10, pad_token_id=0, bad_words_ids=ids_of_words,
                eos_token_id=None,
            )  # fmt: skip
            assert output.outputs[0].token_ids == want[0, len(ids) :].tolist()
            assert output.outputs[0].token_ids != before or not any(
                has(before, word) for word in ids_of_words
            )

    @every_method
    def test_are_not_in_a_response(self, method: str) -> None:
        """Nor across segments, on any method; a neighbour that has none draws as ever."""
        params = dataclasses.replace(METHODS[method], max_tokens=16, ignore_eos=True)
        if "segment_length" in params.own_parameters():
            params = dataclasses.replace(params, segment_length=3)
        free = tokens(run(params, method=method))
        words = self.words(free, 2)
        ids_of_words = word_tokens(bpe_tokenizer(), words)
        assert any(has(ids, word) for ids in free for word in ids_of_words)
        some = dataclasses.replace(params, bad_words=words)
        engine = engine_for(method)
        each = [dataclasses.replace(p, seed=70 + i) for i, p in enumerate((some, some, params))]
        found = tokens(engine.generate(PROMPTS, each, use_tqdm=False))
        assert not any(has(ids, word) for ids in found[:2] for word in ids_of_words)
        assert found[2] == free[2]


def has(ids: list[int], word: Sequence[int]) -> bool:
    """Whether tokens have some in a row."""
    return any(ids[at : at + len(word)] == list(word) for at in range(len(ids)))


def test_a_stop_text_before_min_tokens_is_text() -> None:
    vanilla = dataclasses.replace(METHODS["vanilla"], ignore_eos=True)
    (output,) = run(vanilla, PROMPTS[:1])
    response = output.outputs[0]
    tokenizer = bpe_tokenizer()
    stop = tokenizer.decode(response.token_ids[2:4])
    (cut,) = run(dataclasses.replace(vanilla, stop=[stop]), PROMPTS[:1])
    assert cut.outputs[0].finish_reason == "stop"
    assert len(cut.outputs[0].token_ids) <= 4
    for method in ("vanilla", "stars"):
        params = dataclasses.replace(METHODS[method], ignore_eos=True, segment_length=3)
        (free,) = run(params, PROMPTS[:1])
        at = free.outputs[0].token_ids
        again = [n for n in range(5, len(at)) if stop in tokenizer.decode(at[4:n])]
        (held,) = run(dataclasses.replace(params, stop=[stop], min_tokens=4), PROMPTS[:1])
        want = at[: again[0]] if again else at
        if method == "vanilla":
            assert held.outputs[0].token_ids == want
        assert len(held.outputs[0].token_ids) > 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_bias": {400: 1.0}}, r"logit_bias must be of tokens in \[0, 400\), got 400"),
        ({"bad_words": "x"}, "bad_words must be a sequence of texts, got 'x'"),
        ({"bad_words": [" "]}, "bad_words must be texts that are not empty, got ' '"),
        ({"min_tokens": 30}, "min_tokens must be at most max_tokens, 24, got 30"),
    ],
)
def test_what_the_model_cannot_do_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        bpe_engine().add_request("a", "b", dataclasses.replace(BASE, **changes))


def test_nothing_is_made_where_nothing_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without penalties no operator of theirs runs, and once they are over none does again."""
    from stars_fast import ops

    called: list[str] = []
    for name in ("adjust_logits", "token_logprobs", "top_tokens"):
        operator = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, _n=name, _o=operator: called.append(_n) or _o(*a))
    run(BASE)
    assert called == []
    (output,) = run(dataclasses.replace(BASE.with_method("vanilla"), min_tokens=5), PROMPTS[:1])
    # In the first of its segments of five.
    assert called == ["adjust_logits", "token_logprobs"] * min(5, len(output.outputs[0].token_ids))
