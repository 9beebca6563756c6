"""The pool is allocated once; steady rounds allocate no KV; it goes with its engine."""

from __future__ import annotations

import dataclasses
import gc
import os
import weakref

import pytest
from helpers.tiny_lm import letter_model, letter_tokenizer

from stars_fast import Engine, StarsParams


def test_steady_rounds_allocate_no_kv() -> None:
    engine = Engine(letter_model(), tokenizer=letter_tokenizer(), num_pages=400, page_size=4)
    params = StarsParams(
        method="vanilla", segment_length=4, max_tokens=40, top_k=0, ignore_eos=True, seed=1
    )
    model = engine.loop.model

    def addresses() -> list[int]:
        pools = [*model._pools.k_pages, *model._pools.v_pages, *model._workspace._buffers.values()]
        return [tensor.data_ptr() for tensor in pools]

    engine.generate(["ab"] * 8, params, use_tqdm=False)
    before = addresses()
    engine.generate(["ba"] * 8, dataclasses.replace(params, seed=2), use_tqdm=False)
    assert addresses() == before


def test_an_engine_that_is_dropped_frees_its_pages_at_once() -> None:
    engine = Engine(letter_model(), tokenizer=letter_tokenizer(), num_pages=40, page_size=4)
    pages = weakref.ref(engine.loop.model)
    gc.collect()
    gc.disable()
    try:
        del engine
        assert pages() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("given", [None, "7"])
def test_few_compiled_kernels_are_kept(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    for name in names:
        monkeypatch.delenv(name, raising=False)
        if given is not None:
            monkeypatch.setenv(name, given)
    Engine(letter_model(), tokenizer=letter_tokenizer(), num_pages=20)
    assert [os.environ[name] for name in names] == [given or "128"] * 2
