"""Classifier outputs for candidate next tokens, many to a text, in one pass.

Candidates of a row stand behind it in the input. Each sees the row up to the token before its
position, and itself; the row does not see them. So output [row, position, candidate] is what the
classifier gives for the row cut before the position with the candidate put there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification


def candidate_outputs(
    model: LlamaForSequenceClassification,
    ids: torch.Tensor,
    positions: torch.Tensor,
    candidates: torch.Tensor,
) -> torch.Tensor:
    """Outputs [rows, P, k] of ``candidates``.

    Parameters
    ----------
    ids
        int64 [rows, width], padded on the right.
    positions
        int64 [rows, P]: the index in its row that a candidate would have, at least 1.
    candidates
        int64 [rows, P, k] token ids.
    """
    rows, width = ids.shape
    count = candidates.shape[-1]
    their_positions = positions.repeat_interleave(count, dim=1)  # [rows, P * k]
    places = torch.arange(width).expand(rows, width)
    total = width + their_positions.shape[1]
    sees = torch.eye(total, dtype=torch.bool).repeat(rows, 1, 1)
    sees[:, :width, :width] = torch.ones(width, width, dtype=torch.bool).tril()
    sees[:, width:, :width] = places[:, None, :] < their_positions[:, :, None]
    hidden = model.model(
        input_ids=torch.cat((ids, candidates.flatten(1)), dim=1),
        position_ids=torch.cat((places, their_positions), dim=1),
        attention_mask=sees[:, None],
        use_cache=False,
    ).last_hidden_state[:, width:]
    outputs: torch.Tensor = model.score(hidden)[..., 0]
    return outputs.view(candidates.shape)


def draw_positions(
    starts: Sequence[int], ends: Sequence[int], count: int, rng: np.random.Generator
) -> torch.Tensor:
    """``count`` positions of each row [rows, count], in [start, end), with repeats."""
    low, high = np.asarray(starts)[:, None], np.asarray(ends)[:, None]
    return torch.from_numpy(rng.integers(low, high, (len(low), count)))


@torch.no_grad()
def likely_tokens(
    model: LlamaForCausalLM,
    ids: torch.Tensor,
    positions: torch.Tensor,
    count: int,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` likeliest tokens of each position [rows, P, count], and their probabilities.

    The probabilities are those of sampling at ``temperature`` from these tokens alone.
    """
    logits = model(input_ids=ids, use_cache=False).logits
    before = (positions - 1)[..., None].expand(-1, -1, logits.shape[-1])
    top = (logits.gather(1, before) / temperature).topk(count)
    return top.indices, top.values.softmax(dim=-1)
