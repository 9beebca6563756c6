"""The reward head of a transformers classifier: found, checked, or refused with the reason."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from stars_fast.errors import UnsupportedModelError
from stars_fast.rewards.vocabulary import embedding_rows

__all__ = ["check_labels", "linear_head"]


def check_labels(model_name: str, num_labels: int | None) -> None:
    """Refuse a classifier that gives more than one number per text.

    Raises
    ------
    UnsupportedModelError
        Naming the head size and what to do instead.
    """
    if num_labels != 1:
        raise UnsupportedModelError(
            f"{model_name} has a head of {num_labels} labels; a reward model has one (num_labels=1 "
            "in its config.json). To use one of several labels, pass as reward_model a function "
            "f(prompts, responses) that returns the number you want"
        )


def linear_head(model: PreTrainedModel) -> nn.Linear:
    """Return the linear layer that turns the last token's hidden state into the reward.

    transformers' causal classifiers call it `score`, a few `classifier`. Whether it is all there is
    between hidden state and reward is not taken from the name: one short text is run both ways.

    Parameters
    ----------
    model : PreTrainedModel
        A sequence classifier on a causal backbone, in eval mode.

    Raises
    ------
    UnsupportedModelError
        If there is no such layer, if it has more than one output, or if the reward is not that
        layer applied to the last token.
    """
    name = type(model).__name__
    found = ((label, getattr(model, label, None)) for label in ("score", "classifier"))
    label, head = next(((n, m) for n, m in found if m is not None), ("", None))
    advice = "; pass as reward_model a function f(prompts, responses) that calls it"
    if head is None:
        raise UnsupportedModelError(
            f"{name} has no layer 'score' or 'classifier' to read a reward from{advice}"
        )
    if not isinstance(head, nn.Linear):
        raise UnsupportedModelError(
            f"{name} reads its reward through {label!r}, a {type(head).__name__}, which is not "
            f"linear on the last token{advice}"
        )
    check_labels(name, head.out_features)

    pad = model.config.get_text_config().pad_token_id
    rows = embedding_rows(model)
    ids = [i % rows for i in range(1, 8) if i % rows != pad] or [0]
    with torch.inference_mode():
        inputs = torch.tensor([ids], device=model.device)
        whole = model(input_ids=inputs)[0].float().reshape(-1)
        last = model.base_model(input_ids=inputs)[0][:, -1]
        alone = head(last).float().reshape(-1)
    tolerance = 1e-4 if last.dtype == torch.float32 else 2e-2
    if whole.shape != (1,) or not torch.allclose(whole, alone, rtol=tolerance, atol=tolerance):
        raise UnsupportedModelError(
            f"the reward of {name} is not its layer {label!r} applied to the last token: "
            f"{whole.tolist()} for a short text, not {alone.tolist()}{advice}"
        )
    return head
