"""A draft model beside the language model: the laws of the methods, and the same tokens anyhow."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from helpers.bpe_engine import bpe_engine
from helpers.letter_law import (
    LETTER,
    PROMPT,
    Law,
    Tokens,
    count,
    law_of,
    letter_engine,
    p_value,
    responses_of,
    reward_of,
    segments,
    text,
)
from helpers.tiny_architectures import tiny_lm
from helpers.tiny_lm import LETTERS, letter_model, small_model
from transformers import LlamaForCausalLM, PreTrainedModel

from stars_fast import Engine, StarsParams

REQUESTS = 900
LETTERS_BASE = StarsParams(
    method="rsd", segment_length=2, max_tokens=4, target_reward=0.3, temperature=0.9, top_k=0
)


@cache
def draft_letters(seed: int) -> LlamaForCausalLM:
    config = letter_model().config
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


@cache
def draft_probs(done: Tokens, temperature: float = 1.0, seed: int = 7) -> list[float]:
    before = torch.tensor([[*(LETTERS.index(c) for c in PROMPT), *done]])
    with torch.no_grad():
        logits = draft_letters(seed)(before).logits[0, -1].double()
    found: list[float] = (logits / temperature).softmax(-1).tolist()
    return found


DRAFT = dataclasses.replace(LETTER, probs=draft_probs)


def both(done: Tokens, params: StarsParams) -> list[tuple[Tokens, float, float, float]]:
    """Each response with a next segment: its reward, p and p_draft of the segment."""
    length = min(params.segment_length, params.max_tokens - len(done))
    own = dict(segments(done, length, params.temperature))
    drafts = dict(segments(done, length, params.temperature, DRAFT))
    return [(done + s, reward_of(text(done + s)), own[s], drafts[s]) for s in own]


def rsd_law(params: StarsParams) -> Law:
    """P(s) = p_draft(s) [r >= u] + p(s) (1 - sum of p_draft [r >= u]); arXiv 2501.19324."""

    def step(done: Tokens) -> Law:
        rows = both(done, params)
        passes = [p_draft * (r >= float(params.target_reward or 0)) for _, r, _, p_draft in rows]
        rest = 1 - sum(passes)
        return {row[0]: a + row[2] * rest for row, a in zip(rows, passes, strict=True)}

    return law_of(step, params.max_tokens)


def gsi_law(params: StarsParams, *, tilts: bool = True) -> Law:
    """Every N draws of each model, and the choice among them; arXiv 2506.04118, algorithm 1."""
    beta, number = params.beta, params.num_candidates

    def soft_best_of(rows: list[tuple[Tokens, float, float]]) -> Law:
        """Of rows (response, t, p)."""
        law = {row[0]: 0.0 for row in rows}
        for drawn in product(rows, repeat=number):
            weights = [math.exp(t / beta) for _, t, _ in drawn]
            chance = math.prod(p for _, _, p in drawn) / sum(weights)
            for (whole, _, _), weight in zip(drawn, weights, strict=True):
                law[whole] += chance * weight
        return law

    def step(done: Tokens) -> Law:
        rows = both(done, params)
        t = {s: r + beta * tilts * math.log(p / q) for s, r, p, q in rows}
        chosen = soft_best_of([(s, t[s], q) for s, _, _, q in rows])
        passes = {s: p * (t[s] >= float(params.target_reward or 0)) for s, p in chosen.items()}
        other = soft_best_of([(s, r, p) for s, r, p, _ in rows])
        rest = 1 - sum(passes.values())
        return {s: passes[s] + rest * other[s] for s in passes}

    return law_of(step, params.max_tokens)


@pytest.fixture(scope="module")
def letters() -> Engine:
    return letter_engine(draft_model=draft_letters(7))


def test_rsd_is_its_closed_form(letters: Engine) -> None:
    counts = count(letters, LETTERS_BASE, REQUESTS)
    assert p_value(counts, rsd_law(LETTERS_BASE)) > 1e-3
    for planted in ({"target_reward": -9.0}, {"target_reward": 9.0}, {"segment_length": 1}):
        assert p_value(counts, rsd_law(dataclasses.replace(LETTERS_BASE, **planted))) < 1e-6


GSI = LETTERS_BASE.with_method("gsi", candidates=2, beta=0.6, target_reward=-0.1)


def test_gsi_is_its_closed_form(letters: Engine) -> None:
    counts = count(letters, GSI, REQUESTS)
    assert p_value(counts, gsi_law(GSI)) > 1e-3
    for planted in ({"target_reward": 9.0}, {"target_reward": -9.0}, {"beta": 1.2}):
        assert p_value(counts, gsi_law(dataclasses.replace(GSI, **planted))) < 1e-6, planted
    assert p_value(counts, gsi_law(GSI, tilts=False)) < 1e-6


def test_a_draft_that_is_the_model_changes_nothing() -> None:
    """Then soft best-of-n over both is soft best-of-n, and RSD without a threshold the model."""
    engine = letter_engine(draft_model=letter_model())
    low = dataclasses.replace(GSI, candidates=3, target_reward=-9.0)
    gibbs = low.with_method("stars", acceptance="gibbs", candidates=3)
    rsd = LETTERS_BASE.with_method("rsd", target_reward=-9.0, segment_length=4)
    sss = dataclasses.replace(SSS, segment_length=2)
    pairs = ((low, gibbs), (rsd, rsd.with_method("vanilla")), (sss, sss.with_method("vanilla")))
    for one, other in pairs:
        found = [responses_of(engine, params, 40) for params in (one, other)]
        mine, theirs = ([r.token_ids for r in responses] for responses in found)
        assert mine == theirs
        assert {s.accepted for r in found[0] for s in r.segments} == {"test"}
    high = dataclasses.replace(low, target_reward=9.0)
    assert {s.accepted for r in responses_of(engine, high, 9) for s in r.segments} == {"fallback"}


SSS = LETTERS_BASE.with_method("sss", segment_length=3, target_reward=None)


def sss_law(params: StarsParams, *, aligned: bool = True, reference: bool = True) -> Law:
    """Token by token, with p, q and b behind the tokens so far: q min(1, p / b), else the rest."""

    def step(done: Tokens) -> Law:
        p = truncated(LETTER.probs(done, params.temperature), params.top_k)
        q = truncated(draft_probs(done, params.temperature), params.top_k)
        b = draft_probs(done, params.temperature, seed=8) if reference else q
        if not aligned:
            q = b
        rows = list(zip(p, q, b, strict=True))
        kept = [t * min(1.0, own / old) for own, t, old in rows]
        rest = [t * max(0.0, own / old - 1) for own, t, old in rows]
        part = (1 - sum(kept)) / sum(rest)
        return {(*done, i): a + part * c for i, (a, c) in enumerate(zip(kept, rest, strict=True))}

    return law_of(step, params.max_tokens)


def truncated(probs: list[float], top_k: int) -> list[float]:
    least = sorted(probs)[-top_k] if top_k else 0.0
    kept = [p if p >= least else 0.0 for p in probs]
    return [p / sum(kept) for p in kept]


def test_sss_is_its_closed_form() -> None:
    engine = letter_engine(None, draft_model=draft_letters(7), draft_reference=draft_letters(8))
    counts = count(engine, SSS, REQUESTS)
    assert p_value(counts, sss_law(SSS)) > 1e-3
    for planted in ({"aligned": False}, {"reference": False}):
        assert p_value(counts, sss_law(SSS, **planted)) < 1e-6, planted
    assert engine.stats()["drafted_tokens"] > engine.stats()["accepted_tokens"]


@pytest.mark.parametrize("top_k", [0, 2])
def test_sss_without_a_reference_is_the_model(top_k: int) -> None:
    """Speculative sampling: of the model's law after its filters."""
    params = dataclasses.replace(SSS, top_k=top_k)
    law = law_of(
        lambda done: {
            (*done, i): p
            for i, p in enumerate(truncated(LETTER.probs(done, params.temperature), top_k))
            if p
        },
        params.max_tokens,
    )
    counts = count(letter_engine(None, draft_model=draft_letters(7)), params, REQUESTS)
    assert p_value(counts, law) > 1e-3


PROMPTS = ["The film was slow at first, but", "A terrible kettle", "Not bad at all. " * 3]
BASE = StarsParams(
    segment_length=4, max_tokens=12, target_reward=0.1, temperature=1.0, top_k=30, ignore_eos=True
)
METHODS = {
    "rsd": BASE.with_method("rsd"),
    "gsi": BASE.with_method("gsi", candidates=3, beta=0.2, target_reward=-3.5, top_k=0),
    "stars": dataclasses.replace(BASE, max_attempts=3),
    "sss": BASE.with_method("sss", target_reward=None, repetition_penalty=1.2),
}


@cache
def draft() -> PreTrainedModel:
    """Of another family, with more logits than there are tokens; not far from the model's law."""
    return tiny_lm("gpt2", vocab_size=416, max_position_embeddings=128)


def engine(**options: Any) -> Engine:
    return bpe_engine(**({"draft_model": draft()} | options))


def run(one: Engine, order: tuple[int, ...] = tuple(range(12)), **changes: Any) -> list[Any]:
    """Every prompt by every method, in this order."""
    asks = [(prompt, params) for params in METHODS.values() for prompt in PROMPTS]
    each = [dataclasses.replace(asks[i][1], seed=30 + i, **changes) for i in order]
    outputs = one.generate([asks[i][0] for i in order], each, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * len(order)
    assert one.stats()["pages_used"] == 0
    return [output.outputs[0] for output in outputs]


def tokens(responses: list[Any]) -> list[list[int]]:
    return [response.token_ids for response in responses]


@torch.no_grad()
def log_p(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """What follows each of the ids, of the tokens that there are."""
    return model(input_ids=torch.tensor([ids])).logits[0, :, :400].double().log_softmax(-1)


def test_greedy_segments_are_those_of_plain_forwards() -> None:
    """Both models read what the other has drawn, and log-probabilities are the model's."""
    params = dataclasses.replace(METHODS["rsd"], temperature=0.0, top_logprobs=2)
    outputs = engine().generate(PROMPTS, params, use_tqdm=False)
    used = set()
    for output in outputs:
        ids = list(output.prompt_token_ids)
        response = output.outputs[0]
        for segment in response.segments:
            model = draft() if segment.accepted == "test" else small_model()
            used.add(segment.accepted)
            for token in response.token_ids[segment.start : segment.end]:
                assert int(log_p(model, ids)[-1].argmax()) == token
                ids.append(token)
        own = log_p(small_model(), ids[:-1])[len(output.prompt_token_ids) - 1 :]
        at = torch.tensor(response.token_ids)[:, None]
        assert response.logprobs == pytest.approx(own.gather(1, at)[:, 0].tolist(), abs=1e-4)
        for row, top in zip(own, response.top_logprobs, strict=True):
            assert [*top] == row.topk(2).indices.tolist()
    assert used == {"test", "fallback"}


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    found = run(engine())
    for part in (found[:3], found[3:6]):
        assert {s.accepted for r in part for s in r.segments} == {"test", "fallback"}
    assert tokens(found)[6:9] == tokens(run(bpe_engine(), (6, 7, 8)))
    return tokens(found)


@pytest.mark.parametrize(
    "options",
    [
        {"page_size": 3, "num_pages": 900, "max_rows": 2},
        {"max_prefill_tokens": 5, "prefix_caching": False},
        {"num_pages": 14},
        {"overlap_scoring": True},
    ],
    ids=str,
)
def test_same_tokens_whatever_the_pages(expected: list[list[int]], options: dict[str, Any]) -> None:
    one = engine(**options)
    assert tokens(run(one)) == expected
    if options.get("num_pages") == 14:
        assert one.stats()["preemptions"] > 0


def test_same_tokens_in_any_batch(expected: list[list[int]]) -> None:
    one = engine()
    order = (4, 8, 0, 11, 6, 2, 3, 9)
    assert tokens(run(one, order)) == [expected[i] for i in order]
    assert tokens(run(one, (1,))) == [expected[1]]


@pytest.mark.parametrize("reference", [None, tiny_lm("gpt2", vocab_size=416, seed=4)])
def test_greedy_sss_is_greedy_guidance(reference: PreTrainedModel | None) -> None:
    """The arg max of log p + log q - log b; without b that of p."""
    params = dataclasses.replace(METHODS["sss"], temperature=0.0, repetition_penalty=1.0)
    one = engine(draft_reference=reference)
    for output in one.generate(PROMPTS, params, use_tqdm=False):
        ids = list(output.prompt_token_ids)
        for token in output.outputs[0].token_ids:
            best = log_p(small_model(), ids)[-1]
            if reference is not None:
                best = best + log_p(draft(), ids)[-1] - log_p(reference, ids)[-1]
            assert int(best.argmax()) == token
            ids.append(token)


def test_on_the_kernels() -> None:
    """Rows of both models in one round, on the Triton backend."""
    pytest.importorskip("triton", reason="Triton is for Linux only")
    each = [dataclasses.replace(GSI, candidates=1, max_tokens=2, seed=seed) for seed in (4, 5)]
    found = []
    for backend in ("pytorch", "triton"):
        one = letter_engine(draft_model=draft_letters(7), num_pages=40, max_rows=8, backend=backend)
        outputs = one.generate([PROMPT] * len(each), each, use_tqdm=False)
        found.append([output.outputs[0].token_ids for output in outputs])
    assert found[0] == found[1]


def test_costs_count_both_models() -> None:
    one = engine()
    before = one.stats()["lm_calls"]
    one.generate(PROMPTS[:1], dataclasses.replace(METHODS["rsd"], target_reward=-9.0))
    assert one.stats()["lm_calls"] - before == 1 + 3  # the prompt, and each segment read at once
    assert one.num_parameters(beside=True)["lm"] > one.num_parameters()["lm"]


class TestRefused:
    @pytest.mark.parametrize("method", ["rsd", "gsi", "sss"])
    def test_without_a_draft_model(self, method: Any) -> None:
        match = rf"method='{method}' needs a draft model: pass Engine\(\.\.\., draft_model"
        with pytest.raises(ValueError, match=match):
            bpe_engine().check_request("a", BASE.with_method(method, target_reward=None))

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"draft_model": None, "draft_reference": "x"}, "draft_reference must be None without"),
            ({"guide": "x"}, "guide must be None with a draft_model"),
            ({"tensor_parallel": True}, "draft_model must be None with tensor_parallel"),
            ({"draft_model": "/no/model"}, "draft_model: model directory '/no/model'"),
            ({"draft_model": tiny_lm("llama", vocab_size=300)}, "draft_model must have .* got 300"),
        ],
    )
    def test_options(self, options: dict[str, Any], match: str) -> None:
        with pytest.raises(Exception, match=match):
            engine(**options)
