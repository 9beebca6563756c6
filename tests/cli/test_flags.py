"""Flags made from the fields of StarsParams."""

from __future__ import annotations

import argparse
from dataclasses import fields

import pytest
from helpers.params import other_value, owner

from stars_fast.cli.flags import (
    RUN_FIELDS,
    add_params_flags,
    params_from,
)
from stars_fast.cli.model_flags import add_model_flags
from stars_fast.params import StarsParams, plain_text, with_fields

# What is typed, and what it means: forms of their own, and every other field with a flag.
EXAMPLES: dict[str, tuple[list[str], object]] = {
    "method": (["--method", "best_of_n"], "best_of_n"),
    "target_reward": (["--target-reward", "-1.5"], -1.5),
    "alpha": (["--alpha", "1"], 1.0),
    "temperature": (["--temperature", "0"], 0.0),
    "logit_bias": (["--logit-bias", '{"5": -100, "6": 1.5}'], {5: -100.0, 6: 1.5}),
    "bad_words": (["--bad-words", "x", "--bad-words", "y z"], ("x", "y z")),
    "guided": (["--guided", '{"regex": "a+"}'], {"regex": "a+"}),
    "stop": (["--stop", "END", "--stop", "12"], ("END", "12")),
    "stop_token_ids": (["--stop-token-ids", "5", "--stop-token-ids", "6"], (5, 6)),
}


def example(name: str) -> tuple[list[str], object]:
    """A flag for a field, and the value that it gives it."""
    flag, value = "--" + name.replace("_", "-"), other_value(name)
    return ([flag] if value is True else [flag, str(value)]), value


EXAMPLES |= {
    field.name: example(field.name)
    for field in fields(StarsParams)
    if field.name not in {*EXAMPLES, *RUN_FIELDS}
}


def parse(*argv: str, defaults: dict[str, object] | None = None) -> StarsParams:
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    add_params_flags(parser, defaults or {})
    return params_from(parser.parse_args(argv), defaults or {})


def test_no_flag_leaves_the_defaults() -> None:
    assert parse() == StarsParams()


@pytest.mark.parametrize("name", EXAMPLES)
def test_flag_sets_its_field_alone(name: str) -> None:
    argv, value = EXAMPLES[name]
    default = StarsParams(method=owner(name))
    params = parse("--method", default.method, *argv)
    assert getattr(params, name) == value
    assert type(getattr(params, name)) is type(value)
    default = default if name != "method" else StarsParams()
    others = [field.name for field in fields(StarsParams) if field.name != name]
    assert [getattr(params, other) for other in others] == [
        getattr(default, other) for other in others
    ]


@pytest.mark.parametrize("name", ["target_reward", "candidates"])
def test_auto_is_a_word(name: str) -> None:
    assert getattr(parse("--" + name.replace("_", "-"), "auto"), name) == "auto"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--top-k", "many"], "--top-k.*expected INT, got 'many'"),
        (["--candidates", "some"], r"--candidates.*expected INT\|auto"),
        (["--target-reward", "high"], r"--target-reward.*expected FLOAT\|auto"),
        (["--method", "dpo"], "--method.*dpo"),
        (["--logit-bias", "5=1"], "--logit-bias.*expected a JSON object, got '5=1'"),
        (["--logit-bias", "[5]"], r"--logit-bias.*expected a JSON object, got '\[5\]'"),
    ],
)
def test_what_cannot_be_read_names_the_flag(argv: list[str], message: str) -> None:
    with pytest.raises(argparse.ArgumentError, match=message):
        parse(*argv)


def test_what_stars_params_refuses_names_the_parameter() -> None:
    with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\], got 1.5"):
        parse("--top-p", "1.5")


@pytest.mark.parametrize("argv", [["--method", "smc"], ["--acceptance", "gibbs"]])
def test_defaults_that_are_of_another_method_are_left_out(argv: list[str]) -> None:
    params = parse(*argv, defaults={"target_reward": "auto", "beta": 0.3})
    assert (params.target_reward, params.beta) == (None, 0.3)


def test_defaults_of_a_command_give_way_to_flags() -> None:
    defaults: dict[str, object] = {"target_reward": "auto", "segment_length": 8}
    assert parse(defaults=defaults) == StarsParams(target_reward="auto", segment_length=8)
    params = parse("--target-reward", "2", defaults=defaults)
    assert (params.target_reward, params.segment_length) == (2.0, 8)


def test_help_describes_every_field_and_shows_the_default() -> None:
    parser = argparse.ArgumentParser()
    add_params_flags(parser, {"target_reward": "auto"})
    text = " ".join(parser.format_help().split())
    assert 'at least 1; with "cards" its longest. (default: 32)' in text
    assert "transformers' warpers. (default: 40)" in text
    assert "2511.03827" in text
    assert "`" not in text
    for field in fields(StarsParams):
        assert plain_text(field.name)[:40] in text or field.name in RUN_FIELDS


def test_the_docstring_has_the_text_of_every_field() -> None:
    docstring = StarsParams.__doc__ or ""
    head, parameters = docstring.split("\nParameters\n----------\n")
    parameters, raises = parameters.split("\nRaises\n------\n")
    assert head.startswith("What one request asks for.")
    assert raises.startswith("ValueError, TypeError\n    At construction")
    lines = parameters.splitlines()
    assert [line for line in lines if line[:1] not in ("", " ")] == [
        field.name for field in fields(StarsParams)
    ]
    assert "    Softness of the accept test or choice, in units of reward, above 0." in parameters
    assert max(map(len, lines)) <= 100


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown parameter 'temprature'; .*temperature"):
        with_fields(StarsParams(), {"temprature": 1.0})


def test_templates_have_escapes() -> None:
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    args = parser.parse_args(["--reward-template", r"Q: {prompt}\n\tA: {response} \\n \d"])
    assert args.reward_template == "Q: {prompt}\n\tA: {response} \\n \\d"
