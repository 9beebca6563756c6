"""Specs as text and as JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from stars_fast.eval.specs import (
    ModelNames,
    described,
    make_spec,
    names,
    spec_of_text,
    specs_of_json,
    with_reference,
)
from stars_fast.params import StarsParams
from stars_fast.text.named_values import values_of

NAMES = ModelNames(("sft", "dpo"), ("value",))


def spec(text: str, **common: Any) -> Any:
    return spec_of_text(text, common, NAMES)


def test_a_method_with_parameters() -> None:
    found = spec("stars:segment_length=16,beta=0.3,target_reward=auto,ignore_eos=true")
    expected = StarsParams(segment_length=16, beta=0.3, target_reward="auto", ignore_eos=True)
    assert found.params == expected
    assert found.label == "stars segment_length=16 beta=0.3 target_reward=auto ignore_eos=True"
    assert found.needs_target
    assert not spec("stars:target_reward=1").needs_target
    assert spec("stars").needs_target
    assert not spec("best_of_n").needs_target


def test_labels_and_models() -> None:
    found = spec("mine=vanilla:lm=sft")
    assert (found.label, found.lm, found.rm) == ("mine", "sft", None)
    assert spec("a=b=stars:rm=value").label == "a=b"
    assert spec("a=b=stars:rm=value").rm == "value"


def test_values_can_have_commas_and_equals_signs() -> None:
    assert values_of('stop_token_ids=[1,2],stop=", ",x=a=b') == {
        "stop_token_ids": [1, 2],
        "stop": ", ",
        "x": "a=b",
    }


def test_common_parameters_are_those_of_all() -> None:
    assert spec("vanilla", max_tokens=9).params.max_tokens == 9
    assert spec("vanilla:max_tokens=5", max_tokens=9).params.max_tokens == 5
    assert spec("vanilla", max_tokens=9).label == "vanilla"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic", "method must be one of stars, .*vanilla, .*got 'magic'"),
        ("", "method must be one of"),
        ("stars:beata=1", "unknown parameter 'beata'; those of stars are .*segment_length"),
        ("stars:seed=1", "unknown parameter 'seed'"),
        ("vanilla:beta=0.3", "beta is no parameter of method='vanilla'.*the parameters are"),
        ("best_of_n:alpha=0.3", "alpha is no parameter of method='best_of_n'.*candidates"),
        ("stars:beta", "expected name=value, got 'beta'"),
        ("stars:beta=1,beta=2", "beta is given twice"),
        ("stars:beta=-1", "beta must be above 0"),
        ("vanilla:lm=other", "lm must be one of sft, dpo, got 'other'"),
    ],
)
def test_bad_specs_list_what_is_right(text: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        spec(text)


def test_json_is_the_same() -> None:
    raw = [
        {"method": "vanilla", "lm": "dpo", "label": "DPO"},
        {"method": "best_of_n", "candidates": 4},
    ]
    found = specs_of_json(json.dumps(raw), {"max_tokens": 8}, NAMES)
    assert found == [
        spec("DPO=vanilla:lm=dpo", max_tokens=8),
        spec("best_of_n:candidates=4", max_tokens=8),
    ]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("{}", "expected a JSON list"),
        ("[1]", "method 1: expected an object"),
        ('[{"method": "stars"}, {"method": "x"}]', "method 2: method must be one of"),
        ('[{"label": "a"}]', "method 1: method must be one of .*got None"),
        ('[{"method": "stars", "label": 3}]', "label must be text"),
    ],
)
def test_bad_json_is_named(raw: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        specs_of_json(raw, {}, NAMES)


def test_the_reference_is_vanilla_on_the_base() -> None:
    specs, reference = with_reference([spec("stars"), spec("plain=vanilla")], {})
    assert [s.label for s in specs] == ["plain", "stars"]
    assert reference == "plain"
    specs, reference = with_reference([spec("vanilla=vanilla:lm=sft")], {"max_tokens": 9})
    assert [s.label for s in specs] == ["vanilla on the base model", "vanilla"]
    assert reference == "vanilla on the base model"
    assert specs[0].params.max_tokens == 9
    guided = spec("led=vanilla:guide_weight=1")
    assert with_reference([guided], {})[1] == "vanilla"
    assert with_reference([guided], {"guide_weight": 1.0})[1] == "led"
    with pytest.raises(ValueError, match="two methods are labelled 'stars'"):
        with_reference([spec("stars"), spec("stars=best_of_n")], {})


def test_every_parameter_of_every_method_can_be_given() -> None:
    from typing import get_args

    from stars_fast.params import Method

    for method in get_args(Method):
        own = set(names(method)) - {"lm", "rm", "stop", "stop_token_ids"}
        defaults = {name: getattr(StarsParams(), name) for name in own}
        assert make_spec(method, defaults, {}, NAMES).params == StarsParams(method=method)


def test_what_the_record_says() -> None:
    assert described(spec("x=stars:beta=0.3,stop_token_ids=[4],lm=sft")) == {
        "label": "x",
        "method": "stars",
        "lm": "sft",
        "rm": None,
        "params": {"beta": 0.3, "stop_token_ids": [4]},
    }
