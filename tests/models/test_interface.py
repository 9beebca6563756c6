"""Engines that share a model, each on a thread of its own."""

from __future__ import annotations

import gc
from concurrent import futures

from helpers.tiny_lm import letter_model, letter_tokenizer

from stars_fast import Engine, StarsParams
from stars_fast.models import interface
from stars_fast.models.interface import STARS_PAGED, attention_implementation


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
