"""STARS as public code has it: one prompt at a time, the reward model fed the whole text.

Two forms: (a) without a KV cache, and (b) with transformers' own, cropped when a segment is
rejected. Both use the engine's draws and accept tests, so that on the same seed they give the same
tokens, which the benchmarks check before they time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from stars_fast import StarsParams, _core, ops


@dataclass(frozen=True)
class BaselineOutput:
    """A response and what it took.

    Attributes
    ----------
    attempts
        Segments drawn and tested.
    fallbacks
        Segments of which no attempt passed.
    """

    token_ids: list[int]
    attempts: int
    fallbacks: int = 0


# Of one segment, so far


@dataclass
class BestAttempt:
    """The attempt that will be committed: the one that passed, or the best-scored of the others."""

    reward: float = float("-inf")
    token_ids: tuple[int, ...] = ()
    passed: bool = False

    def offer(self, token_ids: Sequence[int], reward: float, *, passed: bool) -> None:
        """Take an attempt if it passed or is better than those before."""
        if passed or reward > self.reward:
            self.reward, self.token_ids, self.passed = reward, tuple(token_ids), passed


def schedule_of(params: StarsParams) -> _core.Schedule:
    """The accept test of a request whose `target_reward` is a number."""
    assert isinstance(params.target_reward, float)
    return _core.Schedule(
        target_reward=params.target_reward,
        alpha=params.alpha,
        beta=params.beta,
        max_tokens=params.max_tokens,
        hard=params.acceptance == "hard",
    )


def sample_rows(
    logits: Tensor,
    params: StarsParams,
    seeds: Sequence[int],
    position: int,
    attempt: int,
    segment: int,
) -> Tensor:
    """Draw a token of each row ``[R]`` from logits ``[R, vocab]``, as the engine draws it."""
    rows = len(seeds)
    token, *_ = ops.sample(
        logits,
        logits.new_full((rows,), params.temperature, dtype=torch.float32),
        logits.new_full((rows,), params.top_k, dtype=torch.int32),
        logits.new_full((rows,), params.top_p, dtype=torch.float32),
        logits.new_full((rows,), params.min_p, dtype=torch.float32),
        torch.tensor(seeds, device=logits.device),
        logits.new_full((rows,), position, dtype=torch.int64),
        logits.new_full((rows,), attempt, dtype=torch.int64),
        logits.new_full((rows,), segment, dtype=torch.int64),
        with_entropy=False,
    )
    return token


#: Draws one segment: (tokens so far, response position, attempt, segment, length) -> tokens.
DrawSegment = Callable[[list[int], int, int, int, int], list[int]]


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
        schedule = schedule_of(params)
        draw = self._draw_cached(seed) if self._cached else self._draw_uncached(seed)
        prompt_reward = self._reward(prompt)
        response: list[int] = []
        attempts = fallbacks = number = 0
        while len(response) < params.max_tokens:
            length = min(params.segment_length, params.max_tokens - len(response))
            best = BestAttempt()
            for attempt in range(params.max_attempts):
                attempts += 1
                segment = draw(prompt + response, len(response), attempt, number, length)
                reward = self._reward(prompt + response + segment)
                tau = schedule.threshold(prompt_reward, len(response) + length)
                uniform = _core.accept_uniform(seed, len(response), attempt, number)
                best.offer(segment, reward, passed=schedule.accepts(reward, tau, uniform))
                if best.passed:
                    break
            fallbacks += not best.passed
            response += best.token_ids
            number += params.max_attempts > 1
        return BaselineOutput(response, attempts, fallbacks)

    def _reward(self, ids: list[int]) -> float:
        logits = self._reward_model(self._tensor(ids), use_cache=False).logits
        return float(logits[0, 0])

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self._model.device)

    def _sample(self, logits: Tensor, seed: int, position: int, attempt: int, number: int) -> int:
        return int(sample_rows(logits, self._params, [seed], position, attempt, number))

    def _draw_uncached(self, seed: int) -> DrawSegment:
        def draw(
            tokens: list[int], position: int, attempt: int, number: int, length: int
        ) -> list[int]:
            segment: list[int] = []
            for step in range(length):
                ids = self._tensor(tokens + segment)
                logits = self._model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
                segment.append(self._sample(logits, seed, position + step, attempt, number))
            return segment

        return draw

    def _draw_cached(self, seed: int) -> DrawSegment:
        cache = DynamicCache(config=self._model.config)
        held: list[int] = []  # the tokens that are cached

        def draw(
            tokens: list[int], position: int, attempt: int, number: int, length: int
        ) -> list[int]:
            # Of the last attempt that is cached, keep what has been committed; the last committed
            # token is fed again.
            common = 0
            for a, b in zip(held, tokens[:-1], strict=False):
                if a != b:
                    break
                common += 1
            if len(held) > common:
                cache.crop(common - len(held))
            del held[common:]
            segment: list[int] = []
            fed = tokens[common:]
            for step in range(length):
                logits = self._model(
                    self._tensor(fed), past_key_values=cache, use_cache=True, logits_to_keep=1
                ).logits[:, -1]
                held.extend(fed)
                fed = [self._sample(logits, seed, position + step, attempt, number)]
                segment += fed
            return segment

        return draw
