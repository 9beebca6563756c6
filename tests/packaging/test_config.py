"""The engine's options stand in its signature and in EngineConfig: the two agree."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

from stars_fast import Engine
from stars_fast.config import EngineConfig

#: Models, tokenizers and processors are no options.
MODELS = {"self", "model", "reward_model", "tokenizer", "reward_tokenizer", "processor"}


def test_every_option_has_the_same_default() -> None:
    signature = inspect.signature(Engine.__init__).parameters
    options = {name: p.default for name, p in signature.items() if name not in MODELS}
    assert options == {field.name: field.default for field in fields(EngineConfig)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("page_size", 0),
        ("max_rows", 0),
        ("num_pages", 1),
        ("seed", 2**64),
        ("reward_timeout", 0),
        ("reward_timeout", float("nan")),
    ],
)
def test_ranges_are_checked_before_anything_is_loaded(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*got {value}"):
        EngineConfig(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"{name} must be .*got {value}"):
        Engine("no/such/model", **{name: value})  # type: ignore[arg-type]
