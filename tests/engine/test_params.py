"""Which parameters a method has, and what another method keeps of them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import fields
from typing import Any, get_args

import pytest
from helpers.params import other_value

from stars_fast import StarsParams
from stars_fast.methods import COMMON, GIBBS, METHODS, Method

#: A value that is allowed and is not the default.
OTHER = {field.name: other_value(field.name) for field in fields(StarsParams)}
del OTHER["method"]
FIELDS = [field for field in fields(StarsParams) if field.name != "method"]
KINDS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    **{method: ({"method": method}, kind.parameters) for method, kind in METHODS.items()},
    "gibbs": ({"acceptance": "gibbs"}, GIBBS.parameters),
}


def test_every_field_is_some_methods_own() -> None:
    names = {field.name for field in fields(StarsParams)}
    assert names == {*COMMON}.union(*(own for _, own in KINDS.values()))
    assert {*METHODS} == {*get_args(Method)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OTHER)
def test_a_parameter_of_another_method_is_an_error(kind: str, name: str) -> None:
    given, own = KINDS[kind]
    if name in given:
        return  # "gibbs" is itself a value of acceptance
    if name in own or name in COMMON:
        assert getattr(StarsParams(**given, **{name: OTHER[name]}), name) == OTHER[name]
        return
    with pytest.raises(ValueError, match=f"^{name} is no parameter of ") as error:
        StarsParams(**given, **{name: OTHER[name]})
    message = str(error.value)
    assert f"{next(iter(given))}={next(iter(given.values()))!r}" in message
    assert f"got {OTHER[name]!r}; the parameters are {', '.join((*COMMON, *own))}" in message


@pytest.mark.parametrize("method", [m for m in METHODS if m != "stars"])
def test_gibbs_is_for_stars_alone(method: Any) -> None:
    with pytest.raises(ValueError, match=f"acceptance must be .* with method='{method}', got 'gib"):
        StarsParams(method=method, acceptance="gibbs")


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_with_method_keeps_what_both_have(source: str, method: Any) -> None:
    given, own = KINDS[source]
    set_all = {
        name: OTHER[name]
        for name in (*COMMON, *own)
        if name not in ("method", "guided", "budget", *given)
    }
    params = StarsParams(**given, **set_all)
    changed = params.with_method(method)
    assert changed.method == method
    still_gibbs = source == "gibbs" and method == "stars"
    kept = KINDS["gibbs" if still_gibbs else method][1]
    for field in FIELDS:
        value = getattr(changed, field.name)
        if field.name == "acceptance" and source == "gibbs":
            assert value == ("gibbs" if still_gibbs else "soft")
        elif field.name in (*COMMON, *kept):
            assert value == getattr(params, field.name), field.name
        else:
            assert value == field.default, field.name


def test_with_method_takes_changes_besides() -> None:
    params = StarsParams(beta=0.3, segment_length=5, target_reward=1.0)
    gibbs = params.with_method("stars", acceptance="gibbs", candidates=4)
    assert (gibbs.beta, gibbs.segment_length, gibbs.target_reward) == (0.3, 5, None)
    tested = gibbs.with_method("stars", acceptance="hard")
    assert (tested.beta, tested.candidates, tested.acceptance) == (0.3, 4, "hard")
    assert gibbs.with_method("rejection", target_reward=2.0).acceptance == "soft"
    smc = gibbs.with_method("smc", ess_threshold=0.1)
    assert (smc.beta, smc.candidates, smc.ess_threshold) == (0.3, 4, 0.1)
    with pytest.raises(ValueError, match="rejection_rate is no parameter of method='smc'"):
        params.with_method("smc", rejection_rate=0.1)


@pytest.mark.parametrize("name", ["magic", "STARS", "", None, 3])
def test_unknown_methods_are_told_the_methods(name: Any) -> None:
    for make in (lambda: StarsParams(method=name), lambda: StarsParams().with_method(name)):
        with pytest.raises(ValueError, match=f"method must be one of .*, got {name!r}") as error:
            make()
        assert all(repr(method) in str(error.value) for method in METHODS)


@pytest.mark.parametrize(
    ("method", "field", "value", "error"),
    [
        ("smc", "ess_threshold", 1.1, ValueError),
        ("smc", "ess_threshold", -0.1, ValueError),
        ("smc", "beta", 0.0, ValueError),
        ("smc", "candidates", 0, ValueError),
        ("speculative_rejection", "rejection_rate", 1.0, ValueError),
        ("speculative_rejection", "rejection_rate", -0.1, ValueError),
        ("speculative_rejection", "rejection_rate", "half", TypeError),
        ("args", "reward_weight", -1.0, ValueError),
        ("args", "reward_weight", float("nan"), ValueError),
        ("cards", "rules", "private", ValueError),
        ("stars", "calibrate_prefixes", 1, TypeError),
        ("mara", "acceptance", "gibbs", ValueError),
        ("stars", "repetition_penalty", 0.0, ValueError),
        ("stars", "repetition_penalty", math.inf, ValueError),
        ("smc", "presence_penalty", 2.1, ValueError),
        ("args", "frequency_penalty", -2.1, ValueError),
        ("stars", "frequency_penalty", None, TypeError),
        ("stars", "logit_bias", [5, 1.0], TypeError),
        ("stars", "logit_bias", {"five": 1.0}, TypeError),
        ("stars", "logit_bias", {-1: 1.0}, ValueError),
        ("stars", "logit_bias", {5: 101.0}, ValueError),
        ("stars", "logit_bias", {5: math.nan}, ValueError),
        ("stars", "logit_bias", {5: 1.0, "5": 1.0}, ValueError),
        ("stars", "min_tokens", -1, ValueError),
        ("stars", "min_tokens", 129, ValueError),
        ("stars", "min_tokens", 1.0, TypeError),
        ("stars", "guided", {"regex": ""}, ValueError),
        ("stars", "guided", {"json_schema": "{}"}, ValueError),
        ("stars", "guided", {"json_schema": {"type": {1}}}, ValueError),
        ("stars", "guided", {"grammar": "a"}, ValueError),
        ("stars", "guided", "a+", ValueError),
        ("stars", "guided", {"regex": "a", "json_schema": {}}, ValueError),
        ("stars", "top_logprobs", 21, ValueError),
        ("stars", "top_logprobs", -1, ValueError),
        ("stars", "n", True, TypeError),  # which equals the default
    ],
)
def test_values_are_checked(method: Any, field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=field):
        StarsParams(method=method, **{field: value})


@pytest.mark.parametrize(
    "beside", [{"min_tokens": 3}, {"method": "cards", "rules": "public"}], ids=str
)
def test_what_does_not_go_with_a_grammar(beside: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{list(beside)[-1]} must be .* with guided"):
        StarsParams(guided={"regex": "a"}, **beside)


def test_biases_are_a_copy_by_token_id() -> None:
    given = {"7": -100, 5: 2.5}
    params = StarsParams(logit_bias=given)  # type: ignore[arg-type]
    given["7"] = 100
    assert params.logit_bias == {7: -100.0, 5: 2.5}
    assert dataclasses.replace(params, n=2).logit_bias == params.logit_bias
    assert hash(params) == hash(dataclasses.replace(params))
    assert StarsParams(logit_bias={}) == StarsParams()


def test_auto_candidates_stand_for_a_number_where_it_matters() -> None:
    numbers = {method: StarsParams(method=method).num_candidates for method in METHODS}
    assert numbers == dict.fromkeys(METHODS, 1) | {
        "best_of_n": 8, "args": 10, "speculative_rejection": 8, "smc": 8, "gsi": 8,
    }  # fmt: skip
    assert StarsParams(acceptance="gibbs").num_candidates == 8


def test_greedy_draws_need_no_second_attempt() -> None:
    greedy = StarsParams(temperature=0.0, max_attempts=9)
    assert greedy.attempts_per_segment == 1
    assert greedy.with_method("mara").attempts_per_segment == 9  # those are no draws
    assert greedy.with_method("gsi").attempts_per_segment == 2  # one of each model
    assert dataclasses.replace(greedy, temperature=0.1).attempts_per_segment == 9


@pytest.mark.parametrize("name", ["stop", "stop_token_ids"])
def test_stops_have_a_largest_number(name: str) -> None:
    of = str if name == "stop" else int
    StarsParams(**{name: [of(i) for i in range(1024)]})
    with pytest.raises(ValueError, match=f"{name} must be at most 1024, got 70000"):
        StarsParams(**{name: [of(i) for i in range(70_000)]})
