"""Guidance: the law against plain forwards, on every method, in any batch, with any other row."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bpe_engine import bpe_engine
from helpers.letter_law import LETTER, PROMPT, Tokens, count, letter_engine, p_value, stars_law
from helpers.outputs import rounds_are_whole
from helpers.tiny_architectures import tiny_lm
from helpers.tiny_lm import LETTERS, letter_model, small_model
from helpers.tiny_tokenizers import bpe_tokenizer
from transformers import LlamaForCausalLM, PreTrainedModel

from stars_fast import Engine, StarsParams
from stars_fast.models import pool
from stars_fast.models.guidance import GuidedModel
from stars_fast.models.pool import page_bytes
from stars_fast.outputs import CompletionOutput

PROMPTS = ["The film was slow at first, but", "A terrible kettle", "Not bad at all. " * 3]
WEIGHTS = [0.8, 0.0, -0.6]
TOLERANCE = 1e-4
BASE = StarsParams(
    segment_length=4,
    max_tokens=14,
    max_attempts=3,
    target_reward=0.6,
    beta=0.3,
    temperature=1.0,
    top_k=0,
    candidates=1,
    ignore_eos=True,
)
METHODS: dict[str, StarsParams] = {
    "stars": BASE,
    "gibbs": BASE.with_method("stars", acceptance="gibbs", candidates=3),
    "cards": BASE.with_method("cards", entropy_threshold=4.5, min_segment_length=1),
    "args": BASE.with_method("args", candidates=3),
    "smc": BASE.with_method("smc", candidates=3, ess_threshold=1.0),
    "best_of_n": BASE.with_method("best_of_n", candidates=2),
}


@cache
def guide() -> PreTrainedModel:
    """Of another family, and with more logits than there are tokens."""
    return tiny_lm("gpt2", vocab_size=416, max_position_embeddings=128)


@cache
def reference() -> PreTrainedModel:
    return tiny_lm("gemma2", vocab_size=400, max_position_embeddings=512, seed=5)


def engine(referred: str | None = "own", **options: Any) -> Engine:
    away = reference() if referred == "own" else referred
    return bpe_engine(guide=guide(), guide_reference=away, **options)


def run(one: Engine, params: StarsParams, order: tuple[int, ...] = (0, 1, 2)) -> list[Any]:
    """The prompts, each with its seed and, unless the weight is 0, its weight."""
    each = [
        dataclasses.replace(
            params, seed=30 + i, guide_weight=WEIGHTS[i] if params.guide_weight else 0.0
        )
        for i in order
    ]
    outputs = one.generate([PROMPTS[i] for i in order], each, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * len(order)
    assert one.stats()["pages_used"] == 0
    return outputs


@torch.no_grad()
def log_p(ids: list[int], weight: float, *, referred: str | None) -> torch.Tensor:
    """What follows each of the ids, by transformers' own forward passes."""

    def forward(model: PreTrainedModel) -> torch.Tensor:
        return model(input_ids=torch.tensor([ids])).logits[0, :, :400].double().log_softmax(-1)

    lm = forward(small_model())
    away = {None: lm, "uniform": torch.zeros(())}.get(referred)
    change = forward(guide()) - (forward(reference()) if away is None else away)
    return (lm + weight * change).log_softmax(-1)


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def check(outputs: list[Any], *, referred: str | None = "own", greedy: bool = False) -> None:
    for output, weight in zip(outputs, WEIGHTS, strict=True):
        response: CompletionOutput = output.outputs[0]
        before = len(output.prompt_token_ids)
        ids = [*output.prompt_token_ids, *response.token_ids]
        want = log_p(ids[:-1], weight, referred=referred)[before - 1 :]
        own = want.gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]
        assert response.logprobs == pytest.approx(own.tolist(), abs=TOLERANCE)
        for at, top in enumerate(response.top_logprobs):
            best = want[at].topk(2)
            assert [*top] == best.indices.tolist()
            assert [*top.values()] == pytest.approx(best.values.tolist(), abs=TOLERANCE)
        if greedy:
            assert response.token_ids == want.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("method", "referred"),
    [*((method, "own") for method in METHODS), ("stars", None), ("args", "uniform")],
)
def test_log_probabilities_are_those_of_plain_forwards(method: str, referred: str | None) -> None:
    params = dataclasses.replace(METHODS[method], guide_weight=1.0, top_logprobs=2)
    check(run(engine(referred), params), referred=referred)


@pytest.mark.parametrize("backend", ["pytorch", "auto"])
def test_greedy_tokens_are_those_of_plain_forwards(backend: Any) -> None:
    params = BASE.with_method("vanilla", temperature=0.0, guide_weight=1.0, top_k=0)
    check(run(engine(backend=backend), params), greedy=True)


def test_a_weight_of_zero_is_no_guide(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, beside guided rows and without; the guide's steps are not run for it."""
    rounds_are_whole(monkeypatch)
    params = dataclasses.replace(BASE, guide_weight=1.0)
    beside = run(engine(), params)[1].outputs[0]
    one = engine()
    assert isinstance(one.loop.model, GuidedModel)
    for model in one.loop.model.beside:
        model.decode_step = None  # type: ignore[assignment, method-assign]
    alone = run(one, BASE)
    plain = run(bpe_engine(), BASE)
    assert alone[1].outputs[0].token_ids == beside.token_ids
    for found, wanted in zip([*alone, alone[1]], [*plain, plain[1]], strict=True):
        assert found.outputs[0].token_ids == wanted.outputs[0].token_ids
        assert found.outputs[0].logprobs == wanted.outputs[0].logprobs
    assert beside.logprobs == plain[1].outputs[0].logprobs


GUIDED = dataclasses.replace(BASE, guide_weight=1.0, max_tokens=20)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    outputs = run(engine(), GUIDED)
    check(outputs)
    kinds = {s.accepted for output in outputs for s in output.outputs[0].segments}
    assert kinds == {"test", "fallback"}
    return tokens(outputs)


@pytest.mark.parametrize(
    ("candidates", "options"),
    [
        (4, {"page_size": 3, "num_pages": 900}),
        (4, {"max_rows": 2}),
        (4, {"max_prefill_tokens": 5, "prefix_caching": False}),
        (1, {"num_pages": 12}),
        (4, {"num_pages": 12}),
        (1, {"overlap_scoring": True}),
    ],
    ids=str,
)
def test_same_tokens_whatever_the_pages(
    expected: list[list[int]], options: dict[str, Any], candidates: int
) -> None:
    one = engine(**options)
    assert tokens(run(one, dataclasses.replace(GUIDED, candidates=candidates))) == expected
    if options.get("num_pages") == 12:
        assert one.stats()["preemptions"] > 0


def test_same_tokens_in_any_batch(expected: list[list[int]]) -> None:
    one = engine(page_size=4)
    run(one, BASE)  # unguided: its pages of the prompts are the next ones'
    assert tokens(run(one, GUIDED, (2, 0, 1))) == [expected[i] for i in (2, 0, 1)]
    assert one.stats()["cached_prompt_tokens"] > 0
    for i in range(3):
        assert tokens(run(one, GUIDED, (i,))) == [expected[i]]


@cache
def other_letters(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(letter_model().config).eval()


@cache
def guided_letters(done: Tokens, temperature: float) -> list[float]:
    before = torch.tensor([[*(LETTERS.index(c) for c in PROMPT), *done]])
    with torch.no_grad():
        lm, up, down = (
            model(before).logits[0, -1].double().log_softmax(-1)
            for model in (letter_model(), other_letters(7), other_letters(8))
        )
    found: list[float] = ((lm + 1.3 * (up - down)) / temperature).softmax(-1).tolist()
    return found


def test_the_law_of_stars_over_guided_tokens() -> None:
    params = StarsParams(
        segment_length=2,
        max_tokens=4,
        max_attempts=3,
        target_reward=1.0,
        beta=0.6,
        temperature=0.9,
        top_k=0,
        guide_weight=1.3,
    )
    one = letter_engine(guide=other_letters(7), guide_reference=other_letters(8))
    law = stars_law(params, dataclasses.replace(LETTER, probs=guided_letters))
    counts = count(one, params, 1500)
    assert p_value(counts, law) > 1e-3
    assert p_value(counts, stars_law(params)) < 1e-6


def test_on_the_kernels() -> None:
    """Requests of other weights in one batch, on the Triton backend."""
    pytest.importorskip("triton", reason="Triton is for Linux only")
    params = StarsParams(method="vanilla", max_tokens=2, top_k=0, seed=4, ignore_eos=True)
    each = [dataclasses.replace(params, guide_weight=w) for w in (0.0, 2.0)]
    found = []
    for backend in ("pytorch", "triton"):
        one = letter_engine(None, guide=other_letters(7), num_pages=40, max_rows=4, backend=backend)
        found.append(tokens(one.generate([PROMPT] * 2, each, use_tqdm=False)))
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


def test_penalties_follow_and_calibration_is_guided() -> None:
    """The bias is added to guided logits; unaligned samples for a target are guided, too."""
    params = dataclasses.replace(
        METHODS["stars"], temperature=0.0, guide_weight=1.0, logit_bias={77: 100.0}
    )
    response = run(engine(), params.with_method("vanilla"))[0].outputs[0]
    assert set(response.token_ids) == {77}
    one = engine()
    drawn = [
        one.calibrate(PROMPTS, params=dataclasses.replace(BASE, guide_weight=w)).target_reward
        for w in (3.0, 0.0)
    ]
    assert drawn[0] != drawn[1] == bpe_engine().calibrate(PROMPTS, params=BASE).target_reward


def test_ids_that_the_guide_has_no_embedding_for_harm_nobody() -> None:
    """In a prompt, beside one as any other; and they are not drawn."""
    one = engine(model=small_model(512))
    prompts = [[5, 500, 6, 500], [7, 8, 9]]
    params = dataclasses.replace(BASE.with_method("vanilla"), guide_weight=0.7, seed=3)
    outputs = one.generate(prompts, params, use_tqdm=False)
    assert [output.error for output in outputs] == [None, None]
    assert max(map(max, tokens(outputs))) < 400
    alone = one.generate(prompts[1:], dataclasses.replace(params, seed=3), use_tqdm=False)
    assert tokens(alone) == tokens(outputs)[1:]


def test_all_share_the_memory_of_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    models = (small_model(), guide(), reference())
    budget = 100 * sum(page_bytes(model, 8) for model in models)
    monkeypatch.setattr(pool, "_memory_budget", lambda *_: budget)
    model = engine(num_pages=None).loop.model
    assert isinstance(model, GuidedModel)
    assert [one.num_pages for one in (model.lm, *model.beside)] == [100] * 3


class TestRefused:
    def test_a_weight_without_a_guide(self) -> None:
        with pytest.raises(ValueError, match=r"guide_weight must be 0 .*, got 0.5: pass Engine"):
            bpe_engine().check_request(PROMPTS[0], dataclasses.replace(BASE, guide_weight=0.5))

    @pytest.mark.parametrize("weight", [math.nan, math.inf])
    def test_no_number(self, weight: float) -> None:
        with pytest.raises(ValueError, match="guide_weight must be finite"):
            StarsParams(guide_weight=weight)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"guide_reference": "x"}, "guide_reference must be None without a guide, got 'x'"),
            ({"guide": "x", "tensor_parallel": True}, "guide must be None with tensor_parallel"),
            ({"guide": "/no/model"}, "guide: model directory '/no/model'"),
        ],
    )
    def test_options(self, options: dict[str, Any], match: str) -> None:
        with pytest.raises(Exception, match=match):
            bpe_engine(**options)

    def test_other_tokens(self, tmp_path: Path) -> None:
        tiny_lm("llama", vocab_size=400).save_pretrained(tmp_path)
        bpe_tokenizer(340, chat="chatml").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=rf"guide must have .*{tmp_path}.*language model's to"):
            bpe_engine(guide=str(tmp_path))
        with pytest.raises(ValueError, match=r"guide_reference must have .* got 300 embeddings"):
            bpe_engine(guide=guide(), guide_reference=tiny_lm("llama", vocab_size=300))
        with pytest.raises(ValueError, match=r"guide must have .*400 embeddings, got 416"):
            Engine(small_model(), guide=guide())

    def test_a_prompt_longer_than_the_guide_s_context(self) -> None:
        one = engine()
        assert one.max_length == 128
        with pytest.raises(ValueError, match="128"):
            one.check_request([5] * 120, BASE)
