"""What a model's generation_config asks for is reported once, unless a request asks for it."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
from helpers.tiny_lm import letter_model, letter_tokenizer

from stars_fast import Engine, StarsParams

PLAIN = StarsParams(method="vanilla", top_k=0, max_tokens=2)


def engine(**asked: Any) -> Engine:
    model = copy.deepcopy(letter_model())
    assert model.generation_config is not None
    for name, value in asked.items():
        setattr(model.generation_config, name, value)
    return Engine(model, tokenizer=letter_tokenizer(), num_pages=50)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = caplog.get_records("call")
    return [r.getMessage() for r in records if r.levelno == logging.WARNING]


def test_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    one = engine(repetition_penalty=1.1, no_repeat_ngram_size=3, temperature=0.1)
    one.generate(["a", "b"], PLAIN, use_tqdm=False)
    one.generate("c", PLAIN, use_tqdm=False)
    (message,) = warnings_of(caplog)
    assert "has repetition_penalty=1.1, no_repeat_ngram_size=3, which changes no draw" in message
    assert "ask for it by StarsParams(repetition_penalty=...)" in message


def test_not_reported_where_it_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    one = engine(repetition_penalty=1.1)
    asking = StarsParams(method="vanilla", top_k=0, max_tokens=2, repetition_penalty=1.1)
    one.generate("a", asking, use_tqdm=False)
    assert warnings_of(caplog) == []
    one.generate("a", PLAIN, use_tqdm=False)
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("asked", [{}, {"repetition_penalty": 1.0, "min_length": 0}])
def test_what_is_off_is_not_reported(
    asked: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    engine(**asked).generate("a", PLAIN, use_tqdm=False)
    assert warnings_of(caplog) == []


def test_what_there_is_nothing_for_is_said(caplog: pytest.LogCaptureFixture) -> None:
    engine(typical_p=0.9).generate("a", PLAIN, use_tqdm=False)
    (message,) = warnings_of(caplog)
    assert message.endswith("typical_p=0.9, which changes no draw here: StarsParams has nothing "
                            "like it")  # fmt: skip
