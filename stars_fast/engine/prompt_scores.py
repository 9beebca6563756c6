"""Log-probabilities of a prompt's own tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from stars_fast.models.interface import attention_configs, exclusive
from stars_fast.models.logits import LogitHead
from stars_fast.outputs import TokenScore

#: Positions whose logits are there at once.
_POSITIONS = 256


@torch.inference_mode()
def prompt_scores(
    model: PreTrainedModel, head: LogitHead, token_ids: Sequence[int], top: int
) -> list[TokenScore]:
    """Return the scores of a prompt's tokens, by one forward pass of the model.

    Parameters
    ----------
    model
        A language model.
    head
        Its logits.
    token_ids
        The prompt, not empty.
    top
        How many of the most likely tokens to name at each place, at least 0.
    """
    ids = torch.tensor([list(token_ids)], device=model.device)
    with exclusive(attention_configs(model)):  # a reward model may share its layers
        hidden = model.base_model(input_ids=ids, use_cache=False, return_dict=True)[0][0]
    scores = [TokenScore()]
    for begin in range(0, len(token_ids) - 1, _POSITIONS):
        following = ids[0, 1 + begin : 1 + begin + _POSITIONS]
        logprobs = head(hidden[begin : begin + len(following)]).float().log_softmax(-1)
        own = logprobs.gather(1, following.unsqueeze(1)).squeeze(1).tolist()
        values, tokens = logprobs.topk(min(top, logprobs.shape[-1]))
        best = zip(tokens.tolist(), values.tolist(), strict=True)
        scores += [
            TokenScore(one, dict(zip(*pair, strict=True)))
            for one, pair in zip(own, best, strict=True)
        ]
    return scores
