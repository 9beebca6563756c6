"""Baseline (c): the public loop on a padded batch that waits for its slowest prompt.

All prompts are at the same segment. Every attempt drafts the whole batch with transformers' cache,
cropped to where the segment began; prompts that have passed are carried along, their accepted
tokens fed again, until the last one has. The reward model reads the whole text of those that are
still waiting. Draws and tests are the engine's, so the tokens are, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from stars_fast import StarsParams, _core
from stars_fast.benchmarks.baselines import BaselineOutput, BestAttempt, sample_rows, schedule_of


@dataclass(frozen=True)
class PaddedText:
    """Texts of a batch, padded on the left to one length.

    Attributes
    ----------
    ids, mask
        int64 ``[B, T]``; the mask is 0 at padding.
    """

    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, texts: list[list[int]], device: torch.device) -> PaddedText:
        """Pad texts given as token ids."""
        longest = max(map(len, texts))
        ids = [[0] * (longest - len(text)) + text for text in texts]
        mask = [[0] * (longest - len(text)) + [1] * len(text) for text in texts]
        return cls(torch.tensor(ids, device=device), torch.tensor(mask, device=device))

    @property
    def length(self) -> int:
        """T, padding included."""
        return self.ids.shape[1]

    @property
    def positions(self) -> Tensor:
        """int64 ``[B, T]``, counted from each text's first token."""
        return (self.mask.cumsum(dim=1) - 1).clamp(min=0)

    def followed_by(self, tokens: Tensor) -> PaddedText:
        """The texts with ``[B, n]`` tokens more."""
        mask = torch.cat((self.mask, torch.ones_like(tokens)), dim=1)
        return PaddedText(torch.cat((self.ids, tokens), dim=1), mask)

    def rewards(self, model: PreTrainedModel, rows: list[int]) -> list[float]:
        """Whole-text rewards of some rows, in one pass."""
        logits = model(
            self.ids[rows],
            attention_mask=self.mask[rows],
            position_ids=self.positions[rows],
            use_cache=False,
        ).logits
        values: list[float] = logits[:, 0].tolist()
        return values


class LockstepBaseline:
    """The accept/reject loop on a batch in lockstep.

    Parameters
    ----------
    model
        Causal LM.
    reward_model
        Sequence classifier over the same token ids.
    params
        Without stop tokens or texts; `target_reward` is a number.
    """

    def __init__(
        self, model: PreTrainedModel, reward_model: PreTrainedModel, params: StarsParams
    ) -> None:
        self._model = model
        self._reward_model = reward_model
        self._params = params

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], seeds: list[int]) -> list[BaselineOutput]:
        """Align a response to each prompt; `seeds` are the requests'."""
        params, model = self._params, self._model
        schedule = schedule_of(params)
        text = PaddedText.of(prompts, model.device)
        rows = list(range(len(prompts)))
        prompt_rewards = text.rewards(self._reward_model, rows)
        cache = DynamicCache(config=model.config)
        self._feed(text, cache, text.length - 1)
        attempts, fallbacks = [0] * len(rows), [0] * len(rows)
        done = number = 0
        while done < params.max_tokens:
            length = min(params.segment_length, params.max_tokens - done)
            best = [BestAttempt() for _ in rows]
            drawn = text.ids[:, :0]
            for attempt in range(params.max_attempts):
                waiting = [row for row in rows if not best[row].passed]
                if not waiting:
                    break
                drawn = self._draft(text, cache, seeds, best, done, attempt, number, length)
                rewards = text.followed_by(drawn).rewards(self._reward_model, waiting)
                for row, reward in zip(waiting, rewards, strict=True):
                    attempts[row] += 1
                    tau = schedule.threshold(prompt_rewards[row], done + length)
                    uniform = _core.accept_uniform(seeds[row], done, attempt, number)
                    passed = schedule.accepts(reward, tau, uniform)
                    best[row].offer(drawn[row].tolist(), reward, passed=passed)
            for row in rows:
                fallbacks[row] += not best[row].passed
            segment = torch.tensor([b.token_ids for b in best], device=model.device)
            begun, text = text.length - 1, text.followed_by(segment)
            if not torch.equal(segment, drawn):  # someone fell back to an earlier attempt
                _crop(cache, begun)
                self._feed(text, cache, text.length - 1)
            done += length
            number += params.max_attempts > 1
        responses = text.ids[:, -done:].tolist()
        return [
            BaselineOutput(response, attempts[row], fallbacks[row])
            for row, response in enumerate(responses)
        ]

    def _feed(self, text: PaddedText, cache: DynamicCache, until: int) -> Tensor:
        """Run the tokens that are not cached yet, up to `until`; returns the last one's logits."""
        begin = cache.get_seq_length()
        logits: Tensor = self._model(
            text.ids[:, begin:until],
            attention_mask=text.mask[:, :until],
            position_ids=text.positions[:, begin:until],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits

    def _draft(
        self,
        text: PaddedText,
        cache: DynamicCache,
        seeds: list[int],
        best: list[BestAttempt],
        position: int,
        attempt: int,
        number: int,
        length: int,
    ) -> Tensor:
        """Draw the segment of every row ``[B, length]``; rows that have passed repeat theirs."""
        _crop(cache, text.length - 1)
        for step in range(length):
            logits = self._feed(text, cache, text.length)
            token = sample_rows(logits, self._params, seeds, position + step, attempt, number)
            for row, b in enumerate(best):
                if b.passed:
                    token[row] = b.token_ids[step]
            text = text.followed_by(token.unsqueeze(1))
        return text.ids[:, -length:]


def _crop(cache: DynamicCache, length: int) -> None:
    """Keep the first `length` tokens; not crop(length), which keeps all where it is 0."""
    surplus = cache.get_seq_length() - length
    if surplus > 0:
        cache.crop(-surplus)
