"""The two halves of a round on whole models: drafting a segment, and scoring it.

Against transformers' `generate` on the same batch, and against the reward model on whole texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from stars_fast import Engine, Reward, StarsParams
from stars_fast.benchmarks.compare import Compare
from stars_fast.benchmarks.models import (
    SMALL,
    TINY,
    Shape,
    id_engine,
    id_tokenizer,
    language_model,
    prompts,
    reward_model,
)
from stars_fast.benchmarks.neighbour import Neighbour
from stars_fast.rewards.base import Prompt, ScoreJob


@pytest.mark.sizes("rows", full=[1, 4, 16, 64], small=[3])
def test_draft(compare: Compare, device: torch.device, full: bool, rows: int) -> None:
    """A segment of 32 tokens after 64, of each row."""
    shape, tokens, context = (SMALL, 32, 64) if full else (TINY, 4, 8)
    model: Any = language_model(shape).to(device)  # type: ignore[arg-type]
    engine = Engine(model, tokenizer=id_tokenizer(shape), max_rows=rows, num_pages=16 * rows)
    asked = prompts(shape, rows, context, context)
    ids = torch.tensor(asked, device=device)
    greedy = StarsParams(
        method="vanilla", segment_length=tokens, max_tokens=tokens, temperature=0.0, seed=0
    )
    sampled = replace(greedy, temperature=0.8, top_k=40)

    def ours(params: StarsParams = sampled) -> list[list[int]]:
        outputs = engine.generate(asked, params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    def theirs(**sampling: Any) -> list[list[int]]:
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, pad_token_id=0,
                **(sampling or {"do_sample": True, "temperature": 0.8, "top_k": 40}),
            )  # fmt: skip
        found: list[list[int]] = out[:, context:].tolist()
        return found

    agree = [a == b for a, b in zip(ours(greedy), theirs(do_sample=False), strict=True)]
    assert sum(agree) >= 0.9 * rows  # a near tie may fall the other way
    compare(
        ours, {"generate": theirs}, work={"rows": rows, "context": context}, tokens=rows * tokens
    )


@pytest.mark.sizes("rows", full=[16], small=[3])
def test_draft_beside_a_busy_neighbour(
    compare: Compare, device: torch.device, full: bool, rows: int
) -> None:
    """Segments while another process keeps a core busy, against the same without it."""
    if device.type != "cpu":
        pytest.skip("a neighbour on the CPU")
    shape, tokens, context = (SMALL, 32, 64) if full else (TINY, 4, 8)
    model: Any = language_model(shape)
    engine = Engine(model, tokenizer=id_tokenizer(shape), max_rows=rows, num_pages=16 * rows)
    asked = prompts(shape, rows, context, context)
    ids = torch.tensor(asked)
    params = StarsParams(
        method="vanilla", segment_length=tokens, max_tokens=8 * tokens, temperature=0.8, top_k=40,
        seed=0,
    )  # fmt: skip

    def alone() -> list[list[int]]:
        outputs = engine.generate(asked, params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    with Neighbour() as neighbour:

        def beside() -> list[list[int]]:
            with neighbour.busy():
                return alone()

        def generate() -> None:
            with neighbour.busy(), torch.inference_mode():
                model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=8 * tokens,
                    pad_token_id=0, do_sample=True, temperature=0.8, top_k=40,
                )  # fmt: skip

        assert alone() == beside()
        compare(
            beside, {"alone": alone, "generate beside it": generate}, work={"rows": rows},
            tokens=8 * rows * tokens,
        )  # fmt: skip


@pytest.mark.sizes(
    ("rows", "context"),
    full=[(1, 256), (4, 256), (16, 256), (64, 256), (8, 64), (8, 512), (8, 1024), (8, 2048)],
    small=[(3, 24)],
)
def test_score(compare: Compare, device: torch.device, full: bool, rows: int, context: int) -> None:
    """A segment of 32 tokens after `context` committed ones, of each row."""
    shape, segment = (SMALL, 32) if full else (TINY, 8)
    scoring = Scoring(shape, rows, context, segment, device)
    difference = (torch.tensor(scoring.ours()) - torch.tensor(scoring.theirs())).abs().max()
    assert float(difference) < 1e-3
    compare(
        scoring.ours, {"whole text": scoring.theirs}, work={"rows": rows, "context": context},
        tokens=rows * segment,
    )  # fmt: skip


@pytest.mark.sizes(("rows", "context"), full=[(4, 256), (16, 256)], small=[(3, 24)])
def test_score_two_heads(
    compare: Compare, device: torch.device, full: bool, rows: int, context: int
) -> None:
    """Two rewards of one backbone, beside one of them."""
    shape, segment = (SMALL, 32) if full else (TINY, 8)
    one = Scoring(shape, rows, context, segment, device)
    two = Scoring(shape, rows, context, segment, device, names=("a", "b"))
    difference = (torch.tensor(two.ours()) - torch.tensor(one.ours())).abs().max()
    assert float(difference) < 1e-3
    compare(
        two.ours, {"one": one.ours}, work={"rows": rows, "context": context}, tokens=rows * segment
    )


class Scoring:
    """Responses whose first part the reward model has seen, and their next segments.

    `names`: of rewards, each its label 0, that together are its reward; none: it is one by itself.
    """

    def __init__(
        self,
        shape: Shape,
        rows: int,
        context: int,
        segment: int,
        device: torch.device,
        names: tuple[str, ...] = (),
    ) -> None:
        model: Any = reward_model(shape).to(device)  # type: ignore[arg-type]
        options: dict[str, Any] = {
            "num_pages": 16,
            "reward_num_pages": rows * ((context + segment) // 16 + 8),
            "max_rows": rows,
            "device": device,
        }
        tokenizer = id_tokenizer(shape)
        own: dict[str, Any] = {"tokenizer": tokenizer, "template": "plain"}
        several = [  # heads that differ, so that each is read
            Reward(name, model, label_weights={0: scale}, weight=1 / scale / len(names), **own)
            for scale, name in enumerate(names, 1)
        ]
        lm = language_model(TINY)
        if several:
            engine = Engine(lm, several, tokenizer=tokenizer, **options)
        else:
            engine = id_engine(lm, model, shape, **options)
        scorer = engine.loop.scorer
        assert scorer is not None
        self._scorer, self._model, self._device = scorer, model, device
        self._texts = prompts(shape, rows, context + segment, context + segment)
        self._branches: Iterator[int] = iter(range(10**9))
        prompt = self._texts[0][:1]
        with torch.inference_mode():
            for row, text in enumerate(self._texts):
                scorer.start(row, Prompt(f"{prompt[0]}", prompt), context + segment)
                job = ScoreJob(row, next(self._branches), text[: context - 1], "")
                scorer.score([job])
                scorer.accept(row, job.branch)
        self._prompt = prompt
        self._shape = shape

    def _next(self) -> None:
        """End every text in another token: what has been scored is not scored again."""
        for text in self._texts:
            text[-2] = (text[-2] + 1) % self._shape.vocab_size

    @torch.inference_mode()
    def ours(self) -> list[float | Exception]:
        """Rewards by the engine's scorer, which runs the new tokens only."""
        self._next()
        jobs = [
            ScoreJob(row, next(self._branches), text[:-1], "")
            for row, text in enumerate(self._texts)
        ]
        rewards = self._scorer.score(jobs)
        for row in range(len(jobs)):
            self._scorer.prune(row)
        return rewards

    @torch.inference_mode()
    def theirs(self) -> list[float]:
        """Rewards of the whole texts."""
        ids = torch.tensor([self._prompt + text[:-1] for text in self._texts], device=self._device)
        found: list[float] = self._model(ids, use_cache=False).logits[:, 0].tolist()
        return found
