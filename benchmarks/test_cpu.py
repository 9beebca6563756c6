"""Plain sampling on a CPU: tokens a second by rows and threads, and the draw by itself.

Against transformers' `generate` and, with ``--vllm-python``, a vLLM for CPUs, which compiles
nothing (``enforce_eager``) and stands still while it is not its turn.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stars_fast import Engine, StarsParams, ops
from stars_fast.benchmarks.compare import Compare
from stars_fast.benchmarks.kernel_cases import samplers
from stars_fast.benchmarks.measure import seconds_of
from stars_fast.benchmarks.models import (
    SMOLLM2_135M,
    TINY,
    id_tokenizer,
    language_model,
    prompts,
)
from stars_fast.benchmarks.vllm_sampling import VllmSampling

#: Further engines beside the one by default: their options, by name.
VARIANTS: dict[str, dict[str, Any]] = {"int8": {"quantize": "int8"}}

_CONTEXT = 32  # tokens of a prompt
_SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_k": 40}


class Sides:
    """Those that draw, all on the same weights in float32.

    Parameters
    ----------
    full
        At the size of SmolLM2-135M, 32 tokens; or for seconds.
    vllm_python
        An interpreter that has vLLM; empty: without it.
    folder
        For the weights, and for what vLLM says.
    """

    def __init__(self, *, full: bool, vllm_python: str, folder: Path) -> None:
        self._shape = SMOLLM2_135M if full else TINY
        self.tokens = 32 if full else 4
        self.model: Any = language_model(self._shape)
        self._saved = folder / "model"
        self.model.save_pretrained(self._saved)
        self._engines = {
            name: Engine(
                self.model if name == "" else str(self._saved),
                tokenizer=id_tokenizer(self._shape),
                max_rows=64,
                num_pages=1024,
                prefix_caching=False,
                **options,
            )
            for name, options in {"": {}, **VARIANTS}.items()
        }
        self._vllm_python = vllm_python
        self._folder = folder
        self._vllm: tuple[int, VllmSampling] | None = None
        self.vllm_version = ""

    def prompts(self, rows: int, context: int = _CONTEXT) -> list[list[int]]:
        """Return token ids, as many of each."""
        return prompts(self._shape, rows, low=context, high=context)

    def engine(
        self, rows: int, name: str = "", *, context: int = _CONTEXT, **changed: Any
    ) -> list[list[int]]:
        """Draw with an engine; returns the responses' ids."""
        params = StarsParams(method="vanilla", max_tokens=self.tokens, seed=0, **_SAMPLING)
        outputs = self._engines[name].generate(
            self.prompts(rows, context), replace(params, **changed), use_tqdm=False
        )
        return self._whole([output.outputs[0].token_ids for output in outputs])

    def generate(self, rows: int, *, context: int = _CONTEXT, **sampling: Any) -> list[list[int]]:
        """Draw with `generate`."""
        ids = torch.tensor(self.prompts(rows, context))
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.tokens,
                pad_token_id=0,
                **(sampling or {"do_sample": True, **_SAMPLING}),
            )
        return self._whole(out[:, context:].tolist())

    def vllm(self, rows: int, threads: int) -> list[list[int]]:
        """Draw with vLLM."""
        if self._vllm is None or self._vllm[0] != threads:
            self.close()
            child = VllmSampling(self._vllm_python, self._saved, threads, self._folder / "log")
            self._vllm = threads, child
            self.vllm_version = child.version
        sampling = {**_SAMPLING, "max_tokens": self.tokens, "seed": 0}
        return self._whole(self._vllm[1].draw(self.prompts(rows), sampling))

    def others(self, rows: int, threads: int) -> dict[str, Callable[[], Any]]:
        """All but `generate` and the engine by default."""
        found: dict[str, Callable[[], Any]] = {
            name: functools.partial(self.engine, rows, name) for name in VARIANTS
        }
        if self._vllm_python:
            found["vllm"] = functools.partial(self.vllm, rows, threads)
        return found

    def close(self) -> None:
        """End vLLM."""
        if self._vllm is not None:
            self._vllm[1].close()
            self._vllm = None

    def _whole(self, responses: list[list[int]]) -> list[list[int]]:
        assert {len(ids) for ids in responses} == {self.tokens}
        return responses


@pytest.fixture(scope="module")
def sides(
    request: pytest.FixtureRequest, full: bool, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sides]:
    """All of them, made once."""
    python = request.config.getoption("--vllm-python")
    with contextlib.closing(
        Sides(full=full, vllm_python=python, folder=tmp_path_factory.mktemp("vllm"))
    ) as found:
        yield found


@pytest.mark.sizes(
    ("threads", "rows"),
    full=[(2, 1), (2, 4), (2, 16), (2, 64), (1, 1), (1, 4), (1, 16)],
    small=[(1, 2)],
)
def test_tokens(
    compare: Compare, device: torch.device, sides: Sides, threads: int, rows: int
) -> None:
    """32 tokens of each row after 32, top-k 40; `generate` is timed once where it is slow."""
    if device.type != "cpu" or threads > (os.cpu_count() or 1):
        pytest.skip("for a CPU of so many threads")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        greedy = sides.engine(4, temperature=0.0), sides.generate(4, do_sample=False)
        agree = sum(a == b for a, b in zip(*greedy, strict=True))
        assert agree >= 3  # a near tie may fall the other way
        others = sides.others(rows, threads)
        sides.engine(rows)
        for run in others.values():
            run()
        generate = functools.partial(sides.generate, rows)
        once = {"generate": seconds_of(generate, device)} if rows > 4 else {}
        compare(
            functools.partial(sides.engine, rows),
            others if once else {"generate": generate, **others},
            work={"rows": rows, "threads": threads},
            tokens=rows * sides.tokens,
            budget=15.0,
            once=once,
            vllm=sides.vllm_version,
        )
    finally:
        torch.set_num_threads(before)


@pytest.mark.sizes(
    ("threads", "context"), full=[(2, 32), (2, 128), (2, 512), (2, 1024)], small=[(1, 8)]
)
def test_context(
    compare: Compare, device: torch.device, sides: Sides, full: bool, threads: int, context: int
) -> None:
    """32 tokens of each row after more and more; the prompts' own cost is in it."""
    if device.type != "cpu" or threads > (os.cpu_count() or 1):
        pytest.skip("for a CPU of so many threads")
    rows = 8 if full else 2
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = {
            name: functools.partial(sides.engine, rows, name, context=context)
            for name in ("", *VARIANTS)
        }
        runs["generate"] = functools.partial(sides.generate, rows, context=context)
        for run in runs.values():
            run()
        compare(
            runs.pop(""),
            runs,
            work={"rows": rows, "context": context, "threads": threads},
            tokens=rows * sides.tokens,
            repeats=3,
            budget=15.0,
        )
    finally:
        torch.set_num_threads(before)


@pytest.mark.sizes(
    ("threads", "rows"),
    full=[(threads, rows) for threads in (2, 1) for rows in (1, 4, 16, 64, 256, 1024, 4096)],
    small=[(1, 3)],
)
def test_draw(compare: Compare, device: torch.device, full: bool, threads: int, rows: int) -> None:
    """One token of each row at top-k 40: C++, its PyTorch form, and `torch.topk` + multinomial."""
    if device.type != "cpu" or threads > (os.cpu_count() or 1):
        pytest.skip("for a CPU of so many threads")
    generator = torch.Generator().manual_seed(rows)
    logits = 3.0 * torch.randn((rows, 32_000 if full else 1009), generator=generator)
    columns = (
        torch.full((rows,), _SAMPLING["temperature"]),
        torch.full((rows,), 40, dtype=torch.int32),
        torch.ones(rows),
        torch.zeros(rows),
        torch.arange(rows),
        *(torch.zeros(rows, dtype=torch.int64) for _ in range(3)),
    )

    def ours() -> torch.Tensor:
        return ops.sample(logits, *columns, with_entropy=False)[0]

    def pytorch() -> torch.Tensor:
        with ops.backend("pytorch"):
            return ours()

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(ours(), pytorch())
        peer = functools.partial(samplers([logits], _SAMPLING["temperature"], 40, 1.0)["torch"], 0)
        peer()
        compare(
            ours,
            {"PyTorch form": pytorch, "topk + multinomial": peer},
            work={"rows": rows, "threads": threads},
            budget=2.0,
        )
    finally:
        torch.set_num_threads(before)
