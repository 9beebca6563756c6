"""Log-probabilities of responses under a language model, by teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BATCH_TOKENS = 8192  # of a padded batch


def response_logprobs(
    model: PreTrainedModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[float]:
    """Return the sum of the natural log-probabilities of each response's tokens after its prompt.

    Parameters
    ----------
    model
        A causal language model in eval mode.
    pairs
        Token ids of prompts, at least one each, and of responses; an empty response has 0.

    Notes
    -----
    Padded on the right, so that positions are what they are without padding, the shortest first;
    logits in float32.
    """
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    sums = [0.0] * len(pairs)
    batch: list[int] = []
    for i in order:
        length = len(pairs[i][0]) + len(pairs[i][1])
        if batch and (len(batch) + 1) * length > _BATCH_TOKENS:
            _run(model, pairs, batch, sums)
            batch = []
        batch.append(i)
    if batch:
        _run(model, pairs, batch, sums)
    return sums


def _run(
    model: PreTrainedModel,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch: Sequence[int],
    sums: list[float],
) -> None:
    import torch

    rows = [[*pairs[i][0], *pairs[i][1]] for i in batch]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.device)
    seen = torch.tensor(
        [[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=model.device
    )
    with torch.inference_mode():
        output: Any = model(input_ids=ids, attention_mask=seen, use_cache=False)
        for row, i in enumerate(batch):
            begin, end = len(pairs[i][0]), len(rows[row])
            logits = output.logits[row, begin - 1 : end - 1].float()
            logprobs = logits.log_softmax(-1).gather(1, ids[row, begin:end, None])
            sums[i] = float(logprobs.double().sum())
