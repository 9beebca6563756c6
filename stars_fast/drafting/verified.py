"""Speculative sampling: tokens of a draft model, as far as the language model accepts them.

With p of the language model, q of the draft model, which is aligned, and b of the draft model
before it was, all behind the same tokens: a token that q has drawn is kept with probability
min(1, p / b). Instead of the first that is not, a token is drawn from q (p / b - 1)+, normalised.
Where p q / b sums up to 1, that is a draw from p q / b, the optimum of the reward log(q / b) at
weight 1 (SSS, arXiv 2508.15044). With b = q it is a draw from p (arXiv 2211.17192).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stars_fast import _core, ops
from stars_fast.drafting.base import Draft, RowSampling
from stars_fast.drafting.plan_rows import RowPlan
from stars_fast.drafting.walk import Walk, told

_MOST = 600.0  # of a log-ratio: its exponential is a number


@dataclass(frozen=True)
class _Uniforms:
    """Uniform numbers that test a round's tokens and draw others, named as accept tests are."""

    plan: RowPlan

    def of(self, step: int, attempt: int, device: torch.device) -> Tensor:
        """Return them float64 ``[R]``."""
        plan = self.plan
        rows = zip(plan.seed.tolist(), plan.position.tolist(), plan.stream.tolist(), strict=True)
        found = [
            _core.accept_uniform(seed % 2**64, position + step, attempt, stream)
            for seed, position, stream in rows
        ]
        return torch.tensor(found, dtype=torch.float64, device=device)


def verified(
    plan: RowPlan,
    sampling: Sequence[RowSampling],
    drawn: Draft,
    walk: Walk,
    logits: Iterable[tuple[Tensor, Tensor, Tensor | None]],
) -> Draft:
    """Return a draft as far as its tokens are accepted, each row with the token drawn instead.

    Parameters
    ----------
    plan, sampling, drawn
        Rows that the draft model has drawn.
    walk
        At their beginning.
    logits
        Of each step those of the language model, the draft model and the draft model's reference,
        ``[R, V]``; without the last the draft model is its own.
    """
    lengths = drawn.lengths.copy()
    tokens, stopped = drawn.tokens.copy(), drawn.stopped.copy()
    top = 0 if drawn.top_tokens is None else drawn.top_tokens.shape[2]
    live = np.ones(len(lengths), np.bool_)
    uniforms = _Uniforms(plan)
    named_all, logprobs = [], []
    for step, (ours, theirs, before) in enumerate(logits):
        live &= step < lengths
        token = torch.from_numpy(tokens[:, step].copy()).to(ours.device)
        kept, instead = _tested(walk, step, token, (ours, theirs, before), uniforms)
        cut = live & ~kept.cpu().numpy()
        if cut.any():
            at = np.nonzero(cut)[0]
            tokens[at, step] = instead.cpu().numpy()[at]
            lengths[at] = step + 1
            for row in at.tolist():
                stopped[row] = int(tokens[row, step]) in sampling[row].stop_token_ids
            live &= ~cut
            token = torch.from_numpy(tokens[:, step].copy()).to(ours.device)
        named = token.unsqueeze(1)
        if top:
            named = torch.cat((named, ops.top_tokens(ours, top)), dim=1)
        named_all.append(named)
        logprobs.append(ops.token_logprobs(ours, named, with_entropy=False)[0])
        if not live.any():
            break
        walk.go_on(token, step)
    cut_short = replace(
        drawn,
        tokens=tokens[:, : len(logprobs)],
        lengths=lengths,
        stopped=stopped,
        discarded=drawn.lengths - lengths,
    )
    return told(cut_short, named_all, logprobs)


def _tested(
    walk: Walk,
    step: int,
    token: Tensor,
    logits: tuple[Tensor, Tensor, Tensor | None],
    uniforms: _Uniforms,
) -> tuple[Tensor, Tensor]:
    """Return whether each row's token is kept, bool ``[R]``, and one to be drawn instead."""
    ours, theirs, before = logits
    p, q = walk.log_probs(ours, step), walk.log_probs(theirs, step)
    # Whole: what the filters of the reference leave out would have no finite ratio.
    b = q if before is None else walk.log_probs(before, step, whole=True)
    ratio = torch.where(torch.isinf(p), -math.inf, p - b).clamp_(max=_MOST)
    drawn = uniforms.of(step, 0, ours.device)
    kept = drawn.log() <= ratio.gather(1, token.unsqueeze(1)).squeeze(1)
    # Where p > b: what p q / b is above q. Without a reference that is p - q, also where q is 0.
    above = p.exp() - q.exp() if before is None else q.exp() * (ratio.exp() - 1)
    weights = above.clamp_(min=0).nan_to_num_(0.0)
    none = weights.sum(dim=1, keepdim=True) <= 0
    running = torch.where(none, p.exp().nan_to_num_(0.0), weights).cumsum(dim=1)
    point = uniforms.of(step, 1, ours.device).unsqueeze(1) * running[:, -1:]
    instead = torch.searchsorted(running, point).squeeze(1).clamp_(max=p.shape[1] - 1)
    greedy = walk.greedy
    if bool(greedy.any()):
        best = _log_softmax(walk, ours, step)
        if before is not None:
            best = best + _log_softmax(walk, theirs, step) - _log_softmax(walk, before, step)
        best = best.nan_to_num(-math.inf).argmax(dim=1)
        kept = torch.where(greedy, token == best, kept)
        instead = torch.where(greedy, best, instead)
    return kept, instead


def _log_softmax(walk: Walk, logits: Tensor, step: int) -> Tensor:
    return walk.adjusted(logits, step).double().log_softmax(dim=1)
