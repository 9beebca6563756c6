"""The engine whose language model is vLLM's, in this process."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Mapping
from random import SystemRandom
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from stars_fast.config import Combine, Quantize, TemplateLike, check_combine
from stars_fast.models.load import load_tokenizer
from stars_fast.params import StarsParams
from stars_fast.prompts import Prompt, PromptReader
from stars_fast.remote.base import CallEngine, check_options, check_rewards
from stars_fast.reward_head import RewardHeadLike
from stars_fast.rewards.load_several import RewardModelsLike, load_rewards
from stars_fast.vllm.callers import AsyncCaller, BatchCaller

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.engine.protocol import EngineClient

    from stars_fast.vllm.rounds import SchedulerCaller


class StarsLLM(CallEngine):
    """`Engine` with the language model in an engine of vLLM in this process.

    vLLM draws segments by token ids, with its batching and its prefix cache; the scheduler, the
    accept tests and the reward model are ours. Everything else is as in `Engine`: `generate`,
    `calibrate`, `add_request`, `step`, `abort`, `score`, and `AsyncEngine` on top.

    The methods are those of `RemoteEngine`; segments end by length.

    Parameters
    ----------
    llm
        A `vllm.LLM`, or an `EngineClient` such as `AsyncLLM`. It stays the caller's, who may use it
        for other requests: an `AsyncLLM` at any time, an `LLM` between two calls of this engine.
    reward_model
        As for `Engine`, except a `Persona`; or a `RemoteReward`, such as vLLM's pooling server.
    loop
        The event loop that an `AsyncLLM` runs on, which must not be the one that this engine is
        called on. None: one of its own on a thread, for an `AsyncLLM` that was made where no event
        loop ran, and that nobody uses after `close`.
    tokenizer
        The language model's, or its directory or hub id; None: vLLM's `model_config.tokenizer`.
    logprobs
        Ask vLLM for the log-probabilities of the tokens drawn; otherwise
        `CompletionOutput.logprobs` stay empty.
    seed
        See `RemoteEngine`.
    max_rows
        See `RemoteEngine`.
    overlap_scoring
        Draw for one half of the requests while the other half is scored. It halves vLLM's batches,
        and so pays only where scoring takes as long as drafting.
    chat_template_kwargs, parse_special, trust_remote_code
        See `Engine`.
    reward_template, reward_head, combine, combine_stds, reward_tokenizer, reward_num_pages,
    reward_timeout, reward_quantize, dtype, allow_pickle
        Options of the reward model, see `Engine`.
    reward_device
        Device of the reward model. vLLM takes most of the memory of its own GPUs.

    Raises
    ------
    ValueError
        A parameter is out of range, or vLLM runs on a CPU with chunked prefill: its engine (0.32)
        dies there when it splits the prompt of a request that has a seed.
    """

    def __init__(
        self,
        llm: LLM | EngineClient | SchedulerCaller,
        reward_model: RewardModelsLike | None = None,
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
        logprobs: bool = True,
        seed: int | None = 0,
        max_rows: int = 256,
        overlap_scoring: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        reward_template: TemplateLike = None,
        reward_head: RewardHeadLike = None,
        combine: Combine = "sum",
        combine_stds: float = 1.0,
        reward_tokenizer: PreTrainedTokenizerBase | None = None,
        reward_device: str | torch.device = "cpu",
        reward_num_pages: int | None = None,
        reward_timeout: float | None = None,
        reward_quantize: Quantize = "none",
        dtype: str | torch.dtype = "auto",
        parse_special: bool = False,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        check_options(max_rows, seed, reward_timeout, chat_template_kwargs, reward_quantize, dtype)
        check_combine(combine, combine_stds)
        check_rewards(
            reward_model,
            template=reward_template,
            head=reward_head,
            reward_tokenizer=reward_tokenizer,
        )
        _check_seeds(llm)
        model = llm.model_config
        if tokenizer is None:
            tokenizer = model.tokenizer
        if isinstance(tokenizer, str | os.PathLike):
            tokenizer = load_tokenizer(os.fspath(tokenizer), trust_remote_code=trust_remote_code)
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        scorer = None
        if reward_model is not None:
            scorer = load_rewards(
                reward_model,
                combine=combine,
                combine_stds=combine_stds,
                lm_tokenizer=tokenizer,
                reward_tokenizer=reward_tokenizer,
                device=reward_device,
                dtype=dtype,
                template=reward_template,
                head=reward_head,
                num_pages=reward_num_pages,
                max_rows=max_rows,
                parse_special=parse_special,
                trust_remote_code=trust_remote_code,
                allow_pickle=allow_pickle,
                quantize=reward_quantize,
                timeout=reward_timeout,
            )
        self._max_length = int(model.max_model_len)
        vocab_size = int(model.get_vocab_size())
        self._most_logprobs = vocab_size if model.max_logprobs == -1 else model.max_logprobs
        self._own_loop: LoopThread | None = None
        if hasattr(llm, "llm_engine"):
            if loop is not None:
                raise ValueError("loop must be None with a vllm.LLM, which has none")
            caller: AsyncCaller | BatchCaller | SchedulerCaller = BatchCaller(
                llm, logprobs=logprobs
            )
        elif hasattr(llm, "run"):
            caller = llm
        else:
            if loop is None:
                self._own_loop = LoopThread()
                loop = self._own_loop.loop
            caller = AsyncCaller(llm, loop, logprobs=logprobs)
        self._calls = caller.stats
        end = tokenizer.eos_token_id
        super().__init__(
            PromptReader(
                tokenizer,
                vocab_size,
                self._max_length,
                chat_template_kwargs,
                parse_special=parse_special,
            ),
            caller,
            _ids_so_far,
            scorer,
            tokenizer,
            tokenizer=tokenizer,
            eos_ids=() if end is None else (int(end),),
            vocab_size=vocab_size,
            seed=SystemRandom().getrandbits(64) if seed is None else seed,
            seeded=seed is not None,
            max_rows=max_rows,
            overlap_scoring=overlap_scoring,
            rows_at_once=64,
            has_logprobs=logprobs,
        )

    @property
    def max_length(self) -> int:
        """The language model's context in tokens."""
        return self._max_length

    def stats(self) -> dict[str, float]:
        """Return counters as `Engine.stats` does.

        The counts of pages belong to no cache; ``lm_calls`` are calls. In addition
        ``call_prompt_tokens``, the tokens of the calls' prompts, and ``call_cached_tokens``, those
        of them that vLLM's prefix cache had.
        """
        return {
            **super().stats(),
            "call_prompt_tokens": self._calls.prompt_tokens,
            "call_cached_tokens": self._calls.cached_tokens,
        }

    def close(self) -> None:
        """End its own event loop, if there is one; vLLM's engine is left as it is."""
        super().close()
        if self._own_loop is not None:
            self._own_loop.close()

    def __enter__(self) -> StarsLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _resolve(self, params: StarsParams) -> StarsParams:
        """Check the parameters against vLLM, then as every `CallEngine` does."""
        params = super()._resolve(params)
        if params.top_logprobs and not self.has_logprobs:
            raise ValueError(
                f"top_logprobs must be 0 with StarsLLM(logprobs=False), got {params.top_logprobs}"
            )
        if params.top_logprobs > self._most_logprobs:
            raise ValueError(
                f"top_logprobs must be at most vLLM's max_logprobs, {self._most_logprobs}, got "
                f"{params.top_logprobs}"
            )
        return params


class LoopThread:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self.loop.run_forever, name="stars-fast-vllm", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Cancel what runs on the loop, and end the thread."""
        if self.loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(_cancel_others(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


async def _cancel_others() -> None:
    """Cancel the other tasks of this loop: calls, and an `AsyncLLM`'s reader of outputs."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _check_seeds(llm: LLM | EngineClient | SchedulerCaller) -> None:
    """Refuse the one setting in which a call with a seed ends vLLM's engine.

    `GPUModelRunner._bookkeeping_sync` sets the generator of a split prompt back by `set_offset`,
    which a CPU's generator does not have.
    """
    config = (llm.llm_engine if hasattr(llm, "llm_engine") else llm).vllm_config
    chunked = config.scheduler_config.enable_chunked_prefill
    if chunked and config.device_config.device_type == "cpu":
        raise ValueError(
            "vLLM on a CPU fails when it splits the prompt of a request with a seed: start it with "
            "--no-enable-chunked-prefill, or LLM(enable_chunked_prefill=False)"
        )


def _ids_so_far(prompt: Prompt, committed: list[int]) -> list[int]:
    return prompt.token_ids + committed
