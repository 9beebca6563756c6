"""Draws from plain forward passes: logits, transformers' filters, noise named by its counter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stars_fast import StarsParams
from stars_fast.ops.philox import token_noise_all

#: What batches of other shapes may change in a logit or a reward, and more.
ROUNDING = 3e-5
_ROWS = 16  # of one forward pass


class PlainLogits:
    """A language model's logits behind a prompt, by transformers' own passes, remembered.

    Parameters
    ----------
    wobble
        Not 0: the logits are off by as much as rounding may change them, differently for every
        value.
    """

    def __init__(self, model: Any, prompt_ids: Sequence[int], wobble: int = 0) -> None:
        self._model = model
        self._prompt_ids = list(prompt_ids)
        self._wobble = wobble
        self._rows: dict[tuple[int, ...], Tensor] = {}

    def wobbling(self, wobble: int) -> PlainLogits:
        """The same, off by rounding; what is remembered is shared."""
        other = PlainLogits(self._model, self._prompt_ids, wobble)
        other._rows = self._rows
        return other

    def learn(self, responses: Iterable[Sequence[int]]) -> None:
        """Read the logits behind every prefix of each response, in few passes."""
        new = sorted({tuple(ids) for ids in responses} - self._rows.keys(), key=len)
        for start in range(0, len(new), _ROWS):
            self._read(new[start : start + _ROWS])

    @torch.no_grad()
    def _read(self, responses: list[tuple[int, ...]]) -> None:
        # Padded behind, where a causal model does not look.
        longest = max(map(len, responses))
        rows = [[*self._prompt_ids, *ids] + [0] * (longest - len(ids)) for ids in responses]
        logits = self._model(input_ids=torch.tensor(rows), use_cache=False).logits.float()
        behind = len(self._prompt_ids) - 1
        for ids, row in zip(responses, logits, strict=True):
            for kept in range(len(ids) + 1):
                self._rows.setdefault(ids[:kept], row[behind + kept])

    def after(self, response: Sequence[int]) -> Tensor:
        """float32 ``[vocab]``: the logits of the token that follows the prompt and these."""
        key = tuple(response)
        if key not in self._rows:
            self._read([key])
        row = self._rows[key]
        if not self._wobble:
            return row
        generator = torch.Generator().manual_seed(hash((self._wobble, *key)) % 2**63)
        return row + ROUNDING * (2 * torch.rand(len(row), generator=generator) - 1)

    def logprob(self, before: Sequence[int], token: int) -> float:
        """Natural log-probability of a token under the raw distribution."""
        return float(self.after(before).log_softmax(-1)[token])

    def entropy(self, before: Sequence[int]) -> float:
        """Entropy of the raw distribution of the next token, in nats."""
        return float(torch.distributions.Categorical(logits=self.after(before)).entropy())


class GuidedLogits(PlainLogits):
    """Those of a model that another one guides.

    Parameters
    ----------
    lm, guide
        Of each.
    reference
        What the guide is compared with; None: nothing.
    weight
        Of the guide's log-ratio.
    """

    def __init__(
        self, lm: PlainLogits, guide: PlainLogits, reference: PlainLogits | None, weight: float
    ) -> None:
        self._parts = (lm, guide, reference)
        self._weight = weight

    def wobbling(self, wobble: int) -> GuidedLogits:
        lm, guide, reference = self._parts
        others = (lm.wobbling(wobble), guide.wobbling(wobble + 1))
        away = others[0] if reference is lm else reference and reference.wobbling(wobble + 2)
        return GuidedLogits(*others, away, self._weight)

    def learn(self, responses: Iterable[Sequence[int]]) -> None:
        known = [list(ids) for ids in responses]
        for part in self._parts:
            if part is not None:
                part.learn(known)

    def after(self, response: Sequence[int]) -> Tensor:
        found = [part.after(response) for part in self._parts if part is not None]
        width = min(map(len, found))
        lm, *others = (logits.double()[:width] for logits in found)
        log_ps = [logits.log_softmax(-1) for logits in others]
        if len(found) == 3:
            log_ps[0] = log_ps[0] - log_ps[1]
        out = torch.full((len(found[0]),), -torch.inf)
        out[:width] = (lm + self._weight * log_ps[0]).float()
        return out


def adjusted(
    logits: Tensor,
    params: StarsParams,
    prompt_ids: Sequence[int],
    response: Sequence[int],
    *,
    ends: Iterable[int],
    known: int,
) -> Tensor:
    """The logits that tokens are drawn from: biases, then penalties; some tokens are not drawn.

    Parameters
    ----------
    ends
        Tokens that end the response.
    known
        Tokens of the tokenizer, which the model may have more than.
    """
    scores = logits[:known].clone().unsqueeze(0)
    context = torch.tensor([[*prompt_ids, *response]])
    biases = {(token,): bias for token, bias in (params.logit_bias or {}).items() if token < known}
    if biases:
        scores = SequenceBiasLogitsProcessor(biases)(context, scores)
    if len(response) < params.min_tokens:
        scores[0, [token for token in ends if token < known]] = -torch.inf
    if params.repetition_penalty != 1:
        names = context[context < known].unsqueeze(0)
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(names, scores)
    for token in {*response}:
        taken = params.frequency_penalty * response.count(token) + params.presence_penalty
        scores[0, token] -= taken
    return scores[0]


def drawn_token(
    logits: Tensor, params: StarsParams, seed: int, position: int, attempt: int, stream: int
) -> int:
    """The token drawn at `params`' temperature and filters, of the largest noisy score."""
    if params.temperature == 0:
        return int(logits.argmax())
    scores = truncated(logits, params)
    signed = seed - 2**64 if seed >= 2**63 else seed
    words = [torch.tensor([word]) for word in (signed, position, attempt, stream)]
    return int((scores + token_noise_all(*words, len(logits))).argmax())


def truncated(logits: Tensor, params: StarsParams) -> Tensor:
    """The logits ``[1, vocab]`` at `params`' temperature, -inf where its filters leave them out."""
    if params.temperature == 0:
        best = torch.full((1, len(logits)), -torch.inf)
        best[0, logits.argmax()] = 0.0
        return best
    scores = (logits / params.temperature).unsqueeze(0)
    no_ids: Any = None  # the filters look at scores alone
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(no_ids, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(no_ids, scores)
    if params.min_p > 0:
        scores = MinPLogitsWarper(params.min_p)(no_ids, scores)
    return scores


def likely_token(logits: Tensor, rank: int) -> int:
    """The token of a rank, 0 for the most likely."""
    return int(logits.topk(rank + 1).indices[rank])
