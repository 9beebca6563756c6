"""Responses that keep to a JSON schema or a regular expression, on every method that draws."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from typing import Any

import pytest
from helpers.bpe_engine import bpe_engine
from helpers.tiny_lm import small_model

from stars_fast import Engine, RequestOutput, StarsParams
from stars_fast.methods import METHODS as RECORDS
from stars_fast.rewards import Persona

pytest.importorskip("llguidance", reason="needs llguidance, of the extra guided")

PROMPTS = ["The film was slow at first, but", "A terrible kettle", "Not bad"]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "stars": {"type": "integer", "minimum": 1, "maximum": 5},
        "kind": {"enum": ["film", "kettle"]},
    },
    "required": ["name", "stars", "kind"],
    "additionalProperties": False,
}
REGEX = r"(good|bad) [a-c]{2,9}(, (yes|no)){0,3}!"
BASE = StarsParams(
    segment_length=4,
    max_tokens=150,
    max_attempts=3,
    target_reward=1.0,
    beta=0.4,
    temperature=1.0,
    top_k=0,
    candidates=1,
)
METHODS: dict[str, StarsParams] = {
    "stars": BASE,
    "gibbs": BASE.with_method("stars", acceptance="gibbs", candidates=3),
    "vanilla": BASE.with_method("vanilla"),
    "best_of_n": BASE.with_method("best_of_n", candidates=3),
    "rejection": BASE.with_method("rejection"),
    "cards": BASE.with_method("cards", entropy_threshold=5.0, min_segment_length=1),
    "speculative_rejection": BASE.with_method("speculative_rejection", candidates=3),
    "smc": BASE.with_method("smc", candidates=4, beta=0.1, ess_threshold=1.0),
    "persona_judge": BASE.with_method("persona_judge"),
    "rsd": BASE.with_method("rsd"),
    "gsi": BASE.with_method("gsi", candidates=2, target_reward=-5.0),
    "sss": BASE.with_method("sss", target_reward=None),
}


def engine_for(method: str, **options: Any) -> Engine:
    rewards = {"persona_judge": (Persona(template="Be kind. {prompt}"),)}.get(method, ())
    if method in ("rsd", "gsi", "sss"):
        options["draft_model"] = small_model(layers=1)
    return bpe_engine(*rewards, **options)


def run(params: StarsParams, method: str = "", **options: Any) -> list[RequestOutput]:
    each = [dataclasses.replace(params, seed=30 + i) for i in range(len(PROMPTS))]
    outputs = engine_for(method, **options).generate(PROMPTS, each, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * len(PROMPTS)
    return outputs


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [response.token_ids for output in outputs for response in output.outputs]


def test_every_method_that_draws_is_here() -> None:
    drawing = {name for name, kind in RECORDS.items() if "guided" in kind.parameters}
    assert drawing == {*METHODS} - {"gibbs"}
    assert {*RECORDS} - drawing == {"args", "mara"}


@pytest.mark.parametrize("method", METHODS)
def test_texts_match_a_regular_expression(method: str) -> None:
    params = dataclasses.replace(METHODS[method], guided={"regex": REGEX})
    found = run(params, method)
    for output in found:
        response = output.outputs[0]
        assert response.finish_reason == "stop"
        assert re.fullmatch(REGEX, response.text), response.text
    assert len({output.outputs[0].text for output in found}) == 3


@pytest.mark.parametrize("method", ["stars", "smc", "vanilla"])
def test_texts_match_a_schema(method: str) -> None:
    params = dataclasses.replace(
        METHODS[method], guided={"json_schema": SCHEMA}, logit_bias={199: -4}
    )
    for output in run(params, method):
        response = output.outputs[0]
        if response.finish_reason == "length":
            continue  # of spaces there may be many
        value = json.loads(response.text)
        assert value.keys() == {"name", "stars", "kind"}
        assert 1 <= value["stars"] <= 5
        assert value["kind"] in ("film", "kettle")


def test_same_tokens_in_any_batch_and_with_any_number_of_candidates() -> None:
    params = dataclasses.replace(METHODS["stars"], guided={"regex": REGEX}, repetition_penalty=1.2)
    want = tokens(run(params))
    assert want == tokens(run(dataclasses.replace(params, candidates=3)))
    assert want == tokens(run(params, num_pages=30, max_rows=3))
    assert want == tokens(run(params, overlap_scoring=True))
    plain = dataclasses.replace(METHODS["vanilla"], seed=4, max_tokens=12)
    both = engine_for("").generate(
        PROMPTS[:2], [dataclasses.replace(params, seed=30), plain], use_tqdm=False
    )
    assert tokens(both[:1]) == want[:1]
    alone = engine_for("").generate(PROMPTS[1], plain, use_tqdm=False)
    assert tokens(both[1:]) == tokens(alone)


def test_triton_form() -> None:
    """Unknown tokens and a grammar, in a captured step."""
    params = dataclasses.replace(
        METHODS["vanilla"], guided={"regex": "(aa|bc){1,3}"}, max_tokens=12, seed=3
    )
    found = []
    for backend in ("pytorch", "triton"):
        engine = bpe_engine(model=small_model(512, layers=1), backend=backend, num_pages=100)
        (output,) = engine.generate(PROMPTS[:1], params, use_tqdm=False)
        assert output.error is None
        assert re.fullmatch("(aa|bc){1,3}", output.outputs[0].text)
        found.append(output.outputs[0].token_ids)
    assert found[0] == found[1]


def test_a_length_cuts_a_prefix() -> None:
    params = dataclasses.replace(METHODS["vanilla"], guided={"regex": "a{40}b"}, max_tokens=3)
    for output in run(params):
        response = output.outputs[0]
        assert response.finish_reason == "length"
        assert set(response.text) == {"a"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guided": {"regex": "(("}}, "guided: regex cannot be followed: .*unclosed"),
        ({"guided": {"json_schema": {"type": "list"}}}, "guided: json_schema cannot be followed: "),
        ({"guided": {"regex": "a"}, "ignore_eos": True}, "ignore_eos must be False with guided"),
    ],
)
def test_what_cannot_be_followed_is_refused(changes: dict[str, Any], message: str) -> None:
    engine = bpe_engine()
    params = dataclasses.replace(METHODS["vanilla"], **changes)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        engine.add_request("a", "b", params)
    assert not engine.has_unfinished()
    engine.add_request("a", "b", METHODS["vanilla"])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    params = dataclasses.replace(METHODS["vanilla"], guided={"regex": "a"})
    with pytest.raises(ValueError, match=r"guided needs llguidance: pip install 'stars_fast\[guid"):
        bpe_engine().add_request("a", "b", params)


def test_no_tokenizer_no_grammar() -> None:
    params = dataclasses.replace(METHODS["vanilla"], guided={"regex": "a"})
    with pytest.raises(ValueError, match="guided needs a tokenizer"):
        Engine(small_model(), num_pages=50).add_request("a", [1, 2], params)


def test_without_a_grammar_the_package_is_not_loaded() -> None:
    loaded = {name for name in sys.modules if name.startswith("llguidance")}
    bpe_engine().generate("a", METHODS["vanilla"], use_tqdm=False)
    assert {name for name in sys.modules if name.startswith("llguidance")} == loaded


def test_space_between_tokens_of_json_has_an_end() -> None:
    """A model that likes nothing better writes the text all the same."""
    model, tokenizer = small_model(), bpe_engine().tokenizer
    spaces = [token for name, token in tokenizer.get_vocab().items() if not name.strip(" ĠĊ")]
    bias = dict.fromkeys(spaces, 50.0)
    params = dataclasses.replace(METHODS["vanilla"], guided={"json_schema": SCHEMA}, max_tokens=400)
    params = dataclasses.replace(params, logit_bias=bias, seed=1)
    (output,) = bpe_engine(model=model).generate(PROMPTS[:1], params, use_tqdm=False)
    assert output.outputs[0].finish_reason == "stop"
    json.loads(output.outputs[0].text)
