"""The reward head of a loaded model: found, checked by running it, or refused with the reason."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stars_fast.errors import UnsupportedModelError
from stars_fast.models.parameters import embedding_rows

__all__ = ["HEAD_NAMES", "reward_module"]

#: What classifiers and value-head models call their heads.
HEAD_NAMES = (
    "score",
    "classifier",
    "v_head",
    "value_head",
    "score_head",
    "regression_head",
    "reward_head",
)
_ADVICE = "; pass as reward_model a function f(prompts, responses) that calls it"


def reward_module(model: PreTrainedModel) -> tuple[nn.Module, int]:
    """Return the module that turns a hidden state into labels, and how many there are.

    It may be any that is a function of the last hidden state: a linear layer, Linear-ReLU-Linear
    and the like. Whether it is all there is between hidden state and labels is not taken from its
    name: one short text is run both ways.

    Parameters
    ----------
    model : PreTrainedModel
        On a causal backbone, in eval mode. Its forward gives labels of the text, or of every token.

    Raises
    ------
    UnsupportedModelError
        If there is no such module, or the model's output is not that module applied to the last
        token.
    """
    name = type(model).__name__
    found = ((label, getattr(model, label, None)) for label in HEAD_NAMES)
    label, head = next(((n, m) for n, m in found if isinstance(m, nn.Module)), ("", None))
    if head is None:
        raise UnsupportedModelError(
            f"{name} has no layer {', '.join(map(repr, HEAD_NAMES))} to read a reward from{_ADVICE}"
        )
    pad = model.config.get_text_config().pad_token_id
    rows = embedding_rows(model)
    ids = [i % rows for i in range(1, 8) if i % rows != pad] or [0]
    with torch.inference_mode():
        inputs = torch.tensor([ids], device=model.device)
        output = model(input_ids=inputs)
        whole = _of_last_token(output[0], len(ids))
        last = model.base_model(input_ids=inputs)[0][:, -1]
        try:
            alone = head(last).float()
        except Exception as error:
            raise UnsupportedModelError(
                f"{name} reads its reward through {label!r}, a {type(head).__name__}, which cannot "
                f"be applied to the last token's hidden state alone ({error}){_ADVICE}"
            ) from error
    tolerance = 1e-4 if last.dtype == torch.float32 else 2e-2
    same = whole.shape == alone.shape and torch.allclose(
        whole, alone, rtol=tolerance, atol=tolerance
    )
    if not same:
        raise UnsupportedModelError(
            f"the reward of {name} is not its layer {label!r} applied to the last token: "
            f"{whole.flatten().tolist()} for a short text, not {alone.flatten().tolist()}{_ADVICE}"
        )
    return head, alone.shape[-1]


def _of_last_token(output: Tensor, length: int) -> Tensor:
    """Return the labels [1, L] of a text: as they are, or the last token's of [1, N, L]."""
    output = output.float()
    if output.ndim == 3 and output.shape[1] == length:
        output = output[:, -1]
    return output.reshape(1, -1)
