"""Baseline (d): segments drafted by transformers' continuous batching, rewards by full forwards.

Each round asks the manager behind `generate_batch` for n candidates of every prompt's next segment,
scores whole texts in one padded pass, and tests the candidates in attempt order with the engine's
accept draws. The token draws are transformers' own, so what must agree with the engine is the rate
of acceptance, not the tokens. The manager lives through the run and shares the blocks of a prompt
among its candidates.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching import ContinuousBatchingManager

from stars_fast import StarsParams, _core
from stars_fast.benchmarks.baseline_lockstep import PaddedText
from stars_fast.benchmarks.baselines import BaselineOutput, BestAttempt, schedule_of


class ContinuousBaseline:
    """The accept/reject loop on top of transformers' continuous batching.

    Parameters
    ----------
    model
        Causal LM.
    reward_model
        Sequence classifier over the same token ids.
    params
        Without stop tokens or texts; `target_reward` is a number.
    candidates
        n, segments drawn side by side for each prompt.
    num_blocks, block_size
        Of the manager's cache: blocks, and tokens of one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reward_model: PreTrainedModel,
        params: StarsParams,
        *,
        candidates: int = 1,
        num_blocks: int = 512,
        block_size: int = 256,
    ) -> None:
        self._model = model
        self._reward_model = reward_model
        self._params = params
        self._candidates = candidates
        # transformers 5.17 knows it as block_size, which later ones warn of.
        names = {field.name for field in fields(ContinuousBatchingConfig)}
        sized: dict[str, Any] = {"page_size" if "page_size" in names else "block_size": block_size}
        self.cache = ContinuousBatchingConfig(num_blocks=num_blocks, max_batch_tokens=2048, **sized)

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], seeds: list[int]) -> list[BaselineOutput]:
        """Align a response to each prompt; `seeds` are the requests'."""
        params = self._params
        schedule = schedule_of(params)
        rows = range(len(prompts))
        text = PaddedText.of(prompts, self._model.device)
        prompt_rewards = text.rewards(self._reward_model, list(rows))
        responses: list[list[int]] = [[] for _ in rows]
        attempts, fallbacks, tried, number = ([0] * len(prompts) for _ in range(4))
        best = [BestAttempt() for _ in rows]
        with drafting(self._model, params, self._candidates, self.cache) as manager:
            while unfinished := [r for r in rows if len(responses[r]) < params.max_tokens]:
                drawn = self._draft(manager, [prompts[r] + responses[r] for r in unfinished], [
                    min(params.segment_length, params.max_tokens - len(responses[r]))
                    for r in unfinished
                ])  # fmt: skip
                whole = [
                    prompts[r] + responses[r] + segment
                    for r, segments in zip(unfinished, drawn, strict=True)
                    for segment in segments
                ]
                scored = PaddedText.of(whole, self._model.device)
                rewards = iter(scored.rewards(self._reward_model, list(range(len(whole)))))
                for row, segments in zip(unfinished, drawn, strict=True):
                    start = len(responses[row])
                    for segment in segments:
                        reward = next(rewards)
                        if best[row].passed or tried[row] == params.max_attempts:
                            continue  # a candidate before it has won, or was the last one
                        tau = schedule.threshold(prompt_rewards[row], start + len(segment))
                        uniform = _core.accept_uniform(seeds[row], start, tried[row], number[row])
                        passed = schedule.accepts(reward, tau, uniform)
                        best[row].offer(segment, reward, passed=passed)
                        attempts[row] += 1
                        tried[row] += 1
                    if best[row].passed or tried[row] == params.max_attempts:
                        fallbacks[row] += not best[row].passed
                        responses[row] += best[row].token_ids
                        best[row], tried[row] = BestAttempt(), 0
                        number[row] += params.max_attempts > 1
        return [BaselineOutput(responses[r], attempts[r], fallbacks[r]) for r in rows]

    def _draft(
        self, manager: ContinuousBatchingManager, texts: list[list[int]], lengths: list[int]
    ) -> list[list[list[int]]]:
        """Draw the candidates of each text's next segment."""
        names: list[list[str]] = [[] for _ in texts]
        for length in sorted(set(lengths)):
            of_length = [i for i, n in enumerate(lengths) if n == length]
            ids = manager.add_requests([texts[i] for i in of_length], max_new_tokens=length)
            for i, name in zip(of_length, ids, strict=True):
                names[i] = [name, *(f"{name}__child#{k}" for k in range(self._candidates - 1))]
        found = collect(manager, len(texts) * self._candidates)
        return [[found[name] for name in candidates] for candidates in names]


def collect(manager: ContinuousBatchingManager, count: int) -> dict[str, list[int]]:
    """Wait for `count` requests; returns their tokens by request id."""
    found: dict[str, list[int]] = {}
    while len(found) < count:
        result = manager.get_result(timeout=1)
        if result is None:
            assert manager.is_running(), "the generation thread has ended"
        elif result.is_finished():
            assert result.error is None, result.error
            found[result.request_id] = list(result.generated_tokens)
    return found


@contextmanager
def drafting(
    model: PreTrainedModel, params: StarsParams, candidates: int, cache: ContinuousBatchingConfig
) -> Iterator[ContinuousBatchingManager]:
    """A running manager that samples as `params` ask; the model is left as it was."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    level, attention = logger.level, model.config._attn_implementation
    logger.setLevel(logging.CRITICAL)  # it is loud about what a CPU does not have
    generation = GenerationConfig(
        do_sample=params.temperature > 0,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        num_return_sequences=candidates,
        max_new_tokens=params.segment_length,
        eos_token_id=-1,
        pad_token_id=0,
    )
    able: Any = model
    try:
        with able.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=cache, warmup=False
        ) as manager:
            yield manager
    finally:
        logger.setLevel(level)
        able.set_attn_implementation(attention)
