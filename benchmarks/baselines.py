"""STARS as public code has it: one prompt at a time, the reward model fed the whole text.

Two forms: without a KV cache, and with transformers' own, cropped when a segment is rejected. Both
use the engine's draws and accept tests, so that on the same seed they give the same tokens, which
the benchmarks check before they time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from stars_fast import StarsParams, _core, ops


@dataclass(frozen=True)
class BaselineOutput:
    """A response and what it took."""

    token_ids: list[int]
    attempts: int


#: Draws one segment: (tokens so far, response position, attempt, length) -> tokens.
DrawSegment = Callable[[list[int], int, int, int], list[int]]


class Baseline:
    """The accept/reject loop for one prompt at a time.

    Parameters
    ----------
    model
        Causal LM.
    reward_model
        Sequence classifier over the same token ids.
    params
        Without stop tokens or texts; `target_reward` is a number.
    cached
        Use transformers' `DynamicCache` for the language model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reward_model: PreTrainedModel,
        params: StarsParams,
        *,
        cached: bool,
    ) -> None:
        self._model = model
        self._reward_model = reward_model
        self._params = params
        self._cached = cached

    @torch.inference_mode()
    def run(self, prompt: list[int], seed: int) -> BaselineOutput:
        """Align one response; `seed` is the request's."""
        params = self._params
        assert isinstance(params.target_reward, float)
        schedule = _core.Schedule(
            target_reward=params.target_reward,
            alpha=params.alpha,
            beta=params.beta,
            max_tokens=params.max_tokens,
            hard=params.acceptance == "hard",
        )
        draw = self._draw_cached(seed) if self._cached else self._draw_uncached(seed)
        prompt_reward = self._reward(prompt)
        response: list[int] = []
        total = 0
        while len(response) < params.max_tokens:
            length = min(params.segment_length, params.max_tokens - len(response))
            best: tuple[float, list[int]] | None = None
            for attempt in range(params.max_attempts):
                total += 1
                segment = draw(prompt + response, len(response), attempt, length)
                reward = self._reward(prompt + response + segment)
                tau = schedule.threshold(prompt_reward, len(response) + length)
                uniform = _core.accept_uniform(seed, len(response), attempt)
                if schedule.accepts(reward, tau, uniform):
                    best = (reward, segment)
                    break
                if best is None or reward > best[0]:
                    best = (reward, segment)
            assert best is not None
            response += best[1]
        return BaselineOutput(response, total)

    def _reward(self, ids: list[int]) -> float:
        return float(self._reward_model(torch.tensor([ids]), use_cache=False).logits[0, 0])

    def _sample(self, logits: torch.Tensor, seed: int, position: int, attempt: int) -> int:
        params = self._params
        token, *_ = ops.sample(
            logits,
            torch.tensor([params.temperature]),
            torch.tensor([params.top_k], dtype=torch.int32),
            torch.tensor([params.top_p]),
            torch.tensor([params.min_p]),
            torch.tensor([seed]),
            torch.tensor([position]),
            torch.tensor([attempt]),
        )
        return int(token)

    def _draw_uncached(self, seed: int) -> DrawSegment:
        def draw(tokens: list[int], position: int, attempt: int, length: int) -> list[int]:
            segment: list[int] = []
            for step in range(length):
                ids = torch.tensor([tokens + segment])
                logits = self._model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
                segment.append(self._sample(logits, seed, position + step, attempt))
            return segment

        return draw

    def _draw_cached(self, seed: int) -> DrawSegment:
        cache = DynamicCache(config=self._model.config)

        def draw(tokens: list[int], position: int, attempt: int, length: int) -> list[int]:
            # Keep what is cached of the committed tokens but the last, which is fed again.
            surplus = cache.get_seq_length() - (len(tokens) - 1)
            if surplus > 0:
                cache.crop(-surplus)
            segment: list[int] = []
            fed = tokens[cache.get_seq_length() :]
            for step in range(length):
                logits = self._model(
                    torch.tensor([fed]), past_key_values=cache, use_cache=True, logits_to_keep=1
                ).logits[:, -1]
                fed = [self._sample(logits, seed, position + step, attempt)]
                segment += fed
            return segment

        return draw
