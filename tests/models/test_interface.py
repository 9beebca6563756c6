"""Engines that share a model, each on a thread of its own."""

from __future__ import annotations

import copy
import gc
from concurrent import futures

import pytest
from helpers.tiny_lm import letter_model, letter_tokenizer

from stars_fast import Engine, StarsParams
from stars_fast.models import interface
from stars_fast.models.interface import (
    STARS_PAGED,
    attention_configs,
    attention_implementation,
    exclusive,
)


def test_passes_of_one_model_are_made_one_after_the_other() -> None:
    model = letter_model()
    engines = [
        Engine(model, tokenizer=letter_tokenizer(), num_pages=40, page_size=4) for _ in range(3)
    ]
    params = StarsParams(method="vanilla", max_tokens=8, segment_length=2, seed=1, top_k=0)

    def tokens(engine: Engine) -> list[list[int]]:
        outputs = engine.generate(["ab", "ba"] * 4, params, use_tqdm=False)
        assert [output.error for output in outputs] == [None] * 8
        return [output.outputs[0].token_ids for output in outputs]

    alone = tokens(engines[0])
    with futures.ThreadPoolExecutor(3) as pool:
        for _ in range(4):
            assert list(pool.map(tokens, engines)) == [alone] * 3
    assert model.config._attn_implementation_internal != STARS_PAGED


def test_a_lock_goes_with_its_model() -> None:
    class Config:
        _attn_implementation_internal = "sdpa"

    config = Config()
    key = id(config)
    with (
        attention_implementation([config], STARS_PAGED),
        attention_implementation([config], "eager"),  # on the same thread
    ):
        assert key in interface._LOCKS
    assert config._attn_implementation_internal == "sdpa"
    del config
    gc.collect()
    assert key not in interface._LOCKS


def test_a_model_and_its_backbone_are_one() -> None:
    """Also where the backbone has a configuration of its own inside of the model's."""
    model = copy.deepcopy(letter_model())
    model.config = copy.copy(model.config)
    assert len(attention_configs(model)) == 2

    def use_backbone() -> None:
        with exclusive(attention_configs(model.base_model)):
            pass

    with futures.ThreadPoolExecutor(1) as pool:
        with exclusive(attention_configs(model)):
            using = pool.submit(use_backbone)
            with pytest.raises(futures.TimeoutError):
                using.result(timeout=0.1)
        using.result(timeout=60)
