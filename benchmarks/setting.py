"""The setting of the end-to-end comparison: models, prompts, parameters, and each side's run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from stars_fast import Engine, StarsParams
from stars_fast.benchmarks.baseline_continuous import ContinuousBaseline, collect, drafting
from stars_fast.benchmarks.baseline_lockstep import LockstepBaseline, PaddedText
from stars_fast.benchmarks.baselines import Baseline, BaselineOutput
from stars_fast.benchmarks.models import (
    SMALL,
    TINY,
    id_engine,
    language_model,
    prompts,
    reward_model,
)


@dataclass(frozen=True)
class Tally:
    """What a side gave.

    Attributes
    ----------
    token_ids
        Of each response.
    attempts, segments, fallbacks
        Of all responses.
    drafted
        Tokens of all attempts, those too that were drawn beside a winner.
    """

    token_ids: list[list[int]]
    attempts: int
    segments: int
    fallbacks: int
    drafted: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all responses."""
        return sum(map(len, self.token_ids))

    @property
    def acceptance(self) -> float:
        """Attempts that passed their test, as a share."""
        return (self.segments - self.fallbacks) / self.attempts

    def same_acceptance(self, other: Tally) -> bool:
        """Whether two rates of acceptance differ by no more than chance: four standard errors."""
        passed = sum(t.segments - t.fallbacks for t in (self, other))
        pooled = passed / (self.attempts + other.attempts)
        error = (pooled * (1 - pooled) * (1 / self.attempts + 1 / other.attempts)) ** 0.5
        return abs(self.acceptance - other.acceptance) <= 4 * error + 1e-9


@dataclass
class Setting:
    """Models, prompts and parameters that all sides share.

    Attributes
    ----------
    model, rewards
        Causal LM, and sequence classifier over the same token ids.
    engine
        With both.
    all_prompts, count
        Token ids, and how many of them a run takes.
    params
        Without stop tokens; `target_reward` is a number.
    first_seed
        Of the first prompt's request; the others count on.
    """

    model: Any
    rewards: Any
    engine: Engine
    all_prompts: list[list[int]]
    count: int
    params: StarsParams
    first_seed: int = 100

    @classmethod
    def of_size(cls, device: torch.device, *, full: bool) -> Setting:
        """Models with random weights, at full size or for seconds; about 4 in 10 attempts pass."""
        shape = SMALL if full else TINY
        model, rewards = language_model(shape, device=device), reward_model(shape, device=device)
        engine = id_engine(model, rewards, shape, max_rows=64, num_pages=2048 if full else 256)
        plain = StarsParams(
            segment_length=32 if full else 8, max_tokens=128 if full else 16, beta=0.5, top_k=40
        )
        asked, count = prompts(shape, 32 if full else 3), 16 if full else 3
        target = engine.calibrate(asked[:count], 0.6, 2, plain, use_tqdm=False).target_reward
        return cls(model, rewards, engine, asked, count, replace(plain, target_reward=target))

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.engine.loop.model.device

    @property
    def prompts(self) -> list[list[int]]:
        """Prompts of a run."""
        return self.all_prompts[: self.count]

    def seeds(self, count: int) -> list[int]:
        """Seeds of the first requests."""
        return [self.first_seed + i for i in range(count)]

    # The engine

    def run_engine(
        self, params: StarsParams | None = None, prompts: Sequence[list[int]] | None = None
    ) -> Tally:
        """Run the engine on the prompts, each with its own seed."""
        asked = list(self.prompts if prompts is None else prompts)
        params = params or self.params
        each = [replace(params, seed=seed) for seed in self.seeds(len(asked))]
        before = self.engine.stats()
        outputs = self.engine.generate(asked, each, use_tqdm=False)
        assert [output.error for output in outputs] == [None] * len(outputs)
        after = self.engine.stats()
        counted = {name: int(after[name] - before[name]) for name in _COUNTED}
        return Tally(
            [output.outputs[0].token_ids for output in outputs],
            attempts=counted["attempts"],
            segments=counted["segments"],
            fallbacks=counted["fallbacks"],
            drafted=counted["drafted_tokens"],
        )

    @cached_property
    def reference(self) -> Tally:
        """What the engine gives, for every comparison; warms both models."""
        return self.run_engine()

    # The baselines

    def run_one_by_one(self, prompts: list[list[int]] | None = None, *, cached: bool) -> Tally:
        """Baselines (a) and (b): one prompt after the other."""
        asked = self.prompts if prompts is None else prompts
        loop = Baseline(self.model, self.rewards, self.params, cached=cached)
        seeds = self.seeds(len(asked))
        return self._tally([loop.run(p, s) for p, s in zip(asked, seeds, strict=True)])

    def run_lockstep(self, prompts: list[list[int]] | None = None) -> Tally:
        """Baseline (c): a padded batch that waits for its slowest prompt."""
        asked = self.prompts if prompts is None else prompts
        loop = LockstepBaseline(self.model, self.rewards, self.params)
        return self._tally(loop.run(asked, self.seeds(len(asked))))

    def run_continuous(self, candidates: int) -> Tally:
        """Baseline (d): segments from transformers' continuous batching."""
        torch.manual_seed(0)
        loop = self._continuous(candidates)
        return self._tally(loop.run(self.prompts, self.seeds(len(self.prompts))))

    def _continuous(self, candidates: int) -> ContinuousBaseline:
        longest = max(map(len, self.prompts)) + self.params.max_tokens
        blocks = len(self.prompts) * candidates * -(-longest // _BLOCK) + 8
        return ContinuousBaseline(
            self.model,
            self.rewards,
            self.params,
            candidates=candidates,
            num_blocks=blocks,
            block_size=_BLOCK,
        )

    def _tally(self, outputs: list[BaselineOutput]) -> Tally:
        per_response = -(-self.params.max_tokens // self.params.segment_length)
        return Tally(
            [output.token_ids for output in outputs],
            attempts=sum(output.attempts for output in outputs),
            segments=per_response * len(outputs),
            fallbacks=sum(output.fallbacks for output in outputs),
        )

    # Without alignment: baseline (f)

    @property
    def _sampling(self) -> dict[str, Any]:
        params = self.params
        return {"do_sample": True, "temperature": params.temperature, "top_k": params.top_k}

    def run_generate(self, **sampling: Any) -> list[list[int]]:
        """Run transformers' `generate` on the batch, padded on the left as it asks for."""
        text = PaddedText.of(self.prompts, self.device)
        with torch.inference_mode():
            out = self.model.generate(
                text.ids,
                attention_mask=text.mask,
                max_new_tokens=self.params.max_tokens,
                pad_token_id=0,
                **(sampling or self._sampling),
            )
        found: list[list[int]] = out[:, text.length :].tolist()
        return found

    def run_generate_batch(self) -> list[list[int]]:
        """Run transformers' `generate_batch`, its manager begun and ended as it does that."""
        cache = self._continuous(1).cache
        with drafting(self.model, self.params, 1, cache) as manager:
            names = manager.add_requests(self.prompts, max_new_tokens=self.params.max_tokens)
            found = collect(manager, len(names))
        return [found[name] for name in names]

    # For segments that end by entropy

    @torch.inference_mode()
    def entropy_threshold(self, tokens_apart: float) -> float:
        """The entropy in nats that one in `tokens_apart` tokens of unaligned text exceeds."""
        texts = self.run_engine(self.params.with_method("vanilla")).token_ids
        entropies = []
        for prompt, response in zip(self.prompts, texts, strict=True):
            ids = torch.tensor([prompt + response], device=self.device)
            log_p = self.model(ids, use_cache=False).logits[0, len(prompt) :].log_softmax(dim=-1)
            entropies.append(-(log_p.exp() * log_p).sum(dim=-1))
        return float(torch.cat(entropies).quantile(1 - 1 / tokens_apart))


#: Tokens of a block of transformers' manager, its default.
_BLOCK = 256
_COUNTED = ("attempts", "segments", "fallbacks", "drafted_tokens")
