"""Rewards of whole responses, and log-probabilities under the base model."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_lm import letter_model, letter_tokenizer

from stars_fast import Engine, StarsParams, demo
from stars_fast.eval.answers import MathScores
from stars_fast.eval.datasets import Item
from stars_fast.eval.fluency import response_logprobs
from stars_fast.eval.gold import TextScorer, gold_source
from stars_fast.eval.measure import Saver, score_rows, unmeasured
from stars_fast.eval.models import Models, identity_of
from stars_fast.eval.store import Store
from stars_fast.rewards.load import load_scorer


def scorer(function: Any) -> TextScorer:
    return TextScorer(load_scorer(function, lm_tokenizer=None), letter_tokenizer())


def test_a_response_that_fails_harms_no_other() -> None:
    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        if "b" in responses:
            raise RuntimeError("no b")
        return [
            math.nan if r == "c" else len(p) + 10.0 * len(r)
            for p, r in zip(prompts, responses, strict=True)
        ]

    prompts: list[Any] = ["ab", "a", "a", [0, 1], ""]
    found = scorer(reward).score(prompts, ["aa", "b", "c", "a", "a"])
    assert found[0] == 22.0
    assert "no b" in str(found[1])
    assert "finite" in str(found[2])
    assert found[3] == 12.0
    assert "prompt is empty" in str(found[4])


def test_a_scorer_that_breaks_down_is_asked_in_halves() -> None:
    class Breaking:
        def __init__(self, inner: Any) -> None:
            self.inner = inner
            self.start, self.finish = inner.start, inner.finish

        def score(self, jobs: list[Any]) -> list[Any]:
            if len(jobs) > 2 or any(job.response_text == "bad" for job in jobs):
                raise MemoryError("too much")
            scores: list[Any] = self.inner.score(jobs)
            return scores

    inner = load_scorer(lambda prompts, responses: [1.0] * len(responses), lm_tokenizer=None)
    broken: Any = Breaking(inner)
    found = TextScorer(broken, letter_tokenizer()).score(["a"] * 5, ["a", "a", "bad", "a", "a"])
    assert [value == 1.0 for value in found] == [True, True, False, True, True]
    assert isinstance(found[2], MemoryError)


def test_it_agrees_with_the_engine() -> None:
    prompts = demo.prompts(4)
    texts = [" It was good.", " It was dull.", "", " A fine one, and cheap."]
    models = Models(
        str(demo.model_dir()), str(demo.reward_model_dir()), options={"device": "cpu"}
    )  # fmt: skip
    found = models.scorer(str(demo.reward_model_dir())).score(prompts, texts)
    assert found == pytest.approx(Engine.demo(device="cpu").score(prompts, texts), abs=1e-4)


def test_gold_rewards_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_gold_reward.py").write_text(
        "def score(prompts, responses):\n    return [float(len(r)) for r in responses]\n\nNO = 3\n"
    )
    function = gold_source("my_gold_reward:score")
    assert callable(function)
    assert function(["p"], ["four"]) == [4.0]
    assert gold_source("some/model") == "some/model"
    demo_gold = gold_source("demo")
    assert callable(demo_gold)
    assert demo_gold(["x"], ["It was very good."])[0] > 0
    for bad in ("my_gold_reward:NO", "my_gold_reward:missing"):
        with pytest.raises(ValueError, match="has no function"):
            gold_source(bad)
    with pytest.raises(ValueError, match="cannot import 'no_such_module'"):
        gold_source("no_such_module:f")


def test_a_model_trained_again_is_another_one(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1")
    before = identity_of(str(tmp_path))
    assert identity_of(str(tmp_path)) == before
    weights.write_bytes(b"12")
    assert identity_of(str(tmp_path)) != before
    assert identity_of(None) is None


def test_a_decorated_function_is_known_by_its_own_file() -> None:
    @torch.no_grad()
    def gold(prompts: list[str], responses: list[str]) -> list[float]:
        return [0.0 for _ in responses]

    ((name, *_),) = identity_of(gold)[1]
    assert name == Path(__file__).name


def test_columns_are_filled_once_and_again_where_they_failed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows = [{"run": "a", "number": n, "text": "x" * n, "error": None} for n in (1, 2, 3)]
    rows.append({"run": "a", "number": 4, "text": "", "error": "refused"})
    store.add({"run": "a", "responses": 4}, rows)
    calls: list[list[str]] = []

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        calls.append(responses)
        return [math.inf if len(r) == 2 and len(calls) == 1 else float(len(r)) for r in responses]

    items = {n: Item(n, "ab") for n in (1, 2, 3, 4)}
    for _ in range(2):
        with Saver(store) as saver:
            lacking = unmeasured(store.responses.values(), "gold", "g1")
            score_rows(lacking, "gold", "g1", scorer(reward), items, saver)
    assert calls == [["x", "xx", "xxx"], ["xx"]]
    kept = Store(tmp_path).responses["a"]
    assert [row.get("gold") for row in kept] == [1.0, 2.0, 3.0, None]
    assert unmeasured(store.responses.values(), "gold", "g1") == []
    assert len(unmeasured(store.responses.values(), "gold", "g2")[0]) == 3


def test_teacher_forcing_agrees_with_the_engine_and_padding_changes_nothing() -> None:
    engine = Engine(letter_model(), tokenizer=letter_tokenizer(), device="cpu")
    prompts = ["ab", "abcab", "c", "bb"]
    params = [StarsParams(method="vanilla", max_tokens=n, seed=n, top_k=0) for n in (3, 9, 1, 20)]
    outputs = engine.generate(prompts, params, use_tqdm=False)
    pairs = [(output.prompt_token_ids, output.outputs[0].token_ids) for output in outputs]
    found = response_logprobs(letter_model(), [*pairs, ([0], [])])
    expected = [math.fsum(output.outputs[0].logprobs) for output in outputs]
    assert found == pytest.approx([*expected, 0.0], abs=1e-4)
    assert found[1:2] == pytest.approx(response_logprobs(letter_model(), pairs[1:2]), abs=1e-4)
    with torch.inference_mode():
        logits = letter_model()(torch.tensor([[0, 1, 2]])).logits[0, 1].log_softmax(-1)
    assert response_logprobs(letter_model(), [([0, 1], [2])])[0] == pytest.approx(
        float(logits[2]), abs=1e-5
    )


def test_parameters_are_those_that_multiply() -> None:
    engine = Engine.demo(device="cpu")
    # vocabulary 1024, width 128, 4 layers, MLP 384, 4 heads of 32 with 2 for keys and values
    layer = 128 * 128 * 2 + 2 * 128 * 64 + 3 * 128 * 384 + 2 * 128
    body = 4 * layer + 128
    assert engine.num_parameters() == {"lm": body + 1024 * 128, "rm": body + 128}
    function = Engine(letter_model(), lambda p, r: [0.0] * len(r), tokenizer=letter_tokenizer())
    untied = sum(p.numel() for p in letter_model().parameters()) - 4 * 16
    assert function.num_parameters() == {"lm": untied, "rm": 0}
    led = Engine(letter_model(), guide=letter_model(), tokenizer=letter_tokenizer())
    assert led.num_parameters()["lm"] == untied
    assert led.num_parameters(beside=True)["lm"] == 2 * untied


def test_answers_of_mathematics() -> None:
    pytest.importorskip("math_verify")
    pairs = {
        ("1/2", "So it is $0.5$."): 1.0,
        (r"\frac{1}{2}", r"First 3, then \boxed{\frac{2}{4}}."): 1.0,
        ("12 - 2 = 10\n#### 10", "It costs 12, and now it is 10."): 1.0,
        ("(1, 2)", r"\boxed{(1,2)}"): 1.0,
        ("42", "41"): 0.0,
        ("42", "I do not know."): 0.0,
        ("42", ""): 0.0,
    }
    answers, responses = zip(*pairs, strict=True)
    scores = MathScores()
    assert scores.score(answers, responses) == list(pairs.values())
    (failed,) = scores.score([" "], ["42"])
    assert "is no mathematics" in str(failed)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(scores.score, ["42"], ["42"]).result() == [1.0]
