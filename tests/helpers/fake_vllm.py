"""vLLM's engine as our code sees it, over the model of four letters, without vLLM."""

from __future__ import annotations

import asyncio
import math
import random
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from helpers.letter_law import EOS, next_probs
from helpers.tiny_lm import LETTERS, letter_tokenizer


class SamplingParams(SimpleNamespace):
    """Those that a call was made with."""

    @classmethod
    def from_optional(cls, **values: Any) -> SamplingParams:
        return cls(**values)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have ``import vllm`` find the two names that calls are made of."""
    vllm, params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    vllm.__dict__["SamplingParams"] = SamplingParams
    params.__dict__["RequestOutputKind"] = SimpleNamespace(FINAL_ONLY="final")
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)


def vllm_config(device: str = "cuda", *, chunked: bool = True) -> Any:
    """Return what is looked at of vLLM's configuration."""
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(enable_chunked_prefill=chunked),
        device_config=SimpleNamespace(device_type=device),
    )


class ModelConfig(SimpleNamespace):
    """What `StarsLLM` reads of vLLM's model configuration."""

    def get_vocab_size(self) -> int:
        return len(LETTERS)


@dataclass
class LetterClient:
    """An `EngineClient`: one asynchronous generator; prompts that begin with "c" are refused.

    `hold`: calls wait for it, as a long draft would keep them.
    """

    hold: asyncio.Event | None = None
    vllm_config: Any = field(default_factory=vllm_config)
    calls: list[SamplingParams] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    model_config: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            tokenizer=letter_tokenizer(), max_model_len=64, max_logprobs=3
        )
    )

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str
    ) -> AsyncIterator[Any]:
        self.calls.append(sampling_params)
        try:
            await asyncio.sleep(0)
            if self.hold is not None:
                await self.hold.wait()
        except asyncio.CancelledError:
            self.aborted.append(request_id)
            raise
        yield answer(prompt["prompt_token_ids"], sampling_params)


class LetterLLM:
    """A `vllm.LLM`."""

    def __init__(self) -> None:
        self.llm_engine = SimpleNamespace(vllm_config=vllm_config())
        self.model_config = LetterClient().model_config

    def generate(self, prompts: Any, params: Any, *, use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        return [
            answer(prompt["prompt_token_ids"], one)
            for prompt, one in zip(prompts, params, strict=True)
        ]


def answer(prompt: list[int], params: SamplingParams) -> Any:
    """Return a `RequestOutput`, or raise what vLLM raises."""
    if LETTERS[prompt[0]] == "c":
        raise ValueError("no prompt may begin with c")
    rng = random.Random(params.seed)
    outputs = [_completion(index, prompt, params, rng) for index in range(params.n)]
    return SimpleNamespace(outputs=outputs[::-1], num_cached_tokens=len(prompt) - 1)


def _completion(index: int, prompt: list[int], params: SamplingParams, rng: random.Random) -> Any:
    ids: list[int] = []
    logprobs: list[dict[int, Any]] = []
    ends = {*getattr(params, "stop_token_ids", ())} | (set() if params.ignore_eos else {EOS})
    before = "".join(LETTERS[token] for token in prompt)
    while len(ids) < params.max_tokens and not (ids and ids[-1] in ends):
        probs = next_probs(tuple(ids), 1.0, before)
        order = sorted(range(len(probs)), key=lambda token: -probs[token])
        if params.temperature == 0:
            ids.append(order[0])
        else:
            ids += rng.choices(range(len(probs)), [p ** (1 / params.temperature) for p in probs])
        if params.logprobs is not None:
            shown = {ids[-1]: 0} | dict.fromkeys(order[: params.logprobs][::-1], 0)
            logprobs.append(
                {
                    token: SimpleNamespace(
                        logprob=math.log(probs[token]), rank=order.index(token) + 1
                    )
                    for token in shown
                }
            )
    return SimpleNamespace(
        index=index,
        token_ids=ids,
        finish_reason="stop" if ids[-1] in ends else "length",
        logprobs=logprobs if params.logprobs is not None else None,
    )
