"""Penalties, biases, tokens that are not drawn: on every method, in any batch, in both forms."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from helpers.bpe_engine import bpe_engine
from helpers.tiny_lm import small_model
from helpers.tiny_tokenizers import bpe_tokenizer

from stars_fast import Engine, RequestOutput, StarsParams
from stars_fast.rewards import Persona

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
        drafter = bpe_engine()._loop._drafter
        assert drafter._known is None
        assert engine_for("", self.model())._loop._drafter._known is not None


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
def test_penalties_count_drawn_tokens_within_and_across_segments(method: str) -> None:
    """Two tokens that nothing else comes up to take turns: each use costs more than they differ."""
    pair = {77: 60.0, 78: 60.0}
    params = dataclasses.replace(
        METHODS[method], logit_bias=pair, temperature=0.01, ignore_eos=True, top_k=0
    )
    if method in ("args", "mara"):
        params = dataclasses.replace(
            params, **({"candidates": 1} if method == "args" else {"max_attempts": 1})
        )
    for ids in tokens(run(dataclasses.replace(params, frequency_penalty=2.0), method=method)):
        assert all(abs(ids[:n].count(77) - ids[:n].count(78)) <= 1 for n in range(len(ids) + 1))
    # A presence is counted once: the second time it is the likelier one that stays.
    for ids in tokens(run(dataclasses.replace(params, presence_penalty=2.0), method=method)):
        assert {77, 78} <= set(ids)
    # The repetition penalty sees the prompt, too.
    prompts = [[5, 77, 6], [5, 78, 6]]
    penalised = dataclasses.replace(params, repetition_penalty=2.0)
    if method == "persona_judge":
        return  # reads its own prompt
    assert [ids[0] for ids in tokens(run(penalised, prompts, method=method))] == [78, 77]


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_bias": {400: 1.0}}, r"logit_bias must be of tokens in \[0, 400\), got 400"),
        ({"min_tokens": 30}, "min_tokens must be at most max_tokens, 24, got 30"),
    ],
)
def test_what_the_model_cannot_do_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
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
