"""Guided segments: the language model and its guide side by side, against both drafting alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from stars_fast import Engine, StarsParams
from stars_fast.benchmarks.compare import Compare
from stars_fast.benchmarks.models import SMALL, TINY, id_tokenizer, language_model, prompts


@pytest.mark.sizes("rows", full=[1, 16], small=[3])
def test_guided_draft(compare: Compare, device: torch.device, full: bool, rows: int) -> None:
    """A segment of 32 tokens after 64, against the same by each of the two models alone."""
    shape, tokens, context = (SMALL, 32, 64) if full else (TINY, 4, 8)
    model, guide = (language_model(shape).to(device) for _ in range(2))  # type: ignore[arg-type]
    asked = prompts(shape, rows, context, context)
    params = StarsParams(
        method="vanilla",
        segment_length=tokens,
        max_tokens=tokens,
        temperature=0.8,
        top_k=40,
        seed=0,
    )
    options: dict[str, Any] = {
        "tokenizer": id_tokenizer(shape), "max_rows": rows, "num_pages": 16 * rows,
    }  # fmt: skip
    engine = Engine(model, guide=guide, guide_reference="uniform", **options)
    alone = [Engine(one, **options) for one in (model, guide)]

    def draft(one: Engine, weight: float) -> list[list[int]]:
        asks = replace(params, guide_weight=weight)
        outputs = one.generate(asked, asks, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    def ours() -> list[list[int]]:
        return draft(engine, 1.0)

    def both() -> list[list[list[int]]]:
        return [draft(one, 0.0) for one in alone]

    # A guide that is the model: log p + log p is log p at half the temperature.
    colder = replace(params, temperature=params.temperature / 2)
    wanted = alone[0].generate(asked, colder, use_tqdm=False)
    assert ours() == [output.outputs[0].token_ids for output in wanted]
    compare(
        ours, {"both models alone": both}, work={"rows": rows, "context": context},
        tokens=rows * tokens,
    )  # fmt: skip
