"""ArmoRM (arXiv 2406.12845) and QRM (arXiv 2409.10164): objectives, weighted by a gate.

The last token's hidden state gives the objectives, in QRM several quantiles of each, whose mean is
taken. The hidden state at the end of the prompt, where the template begins the assistant's message,
gives their weights. All of it is in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from stars_fast.errors import UnsupportedModelError
from stars_fast.reward_head import RewardHead
from stars_fast.rewards.checkpoint import CALLABLE_ADVICE, Checkpoint, Loading
from stars_fast.rewards.kinds.base import Kind, Loaded
from stars_fast.rewards.kinds.classifier import labelled
from stars_fast.rewards.labels import label_readout
from stars_fast.rewards.reading import Cut, Head, LastToken
from stars_fast.rewards.split_ids import Ids
from stars_fast.rewards.tokens import Encoded, TokenPrompt

__all__ = ["GATED", "GatedReading"]

_REGRESSION, _TRANSFORM, _GATE = "regression_layer.", "reward_transform_matrix", "gating."
#: What stands between prompt and response; the gate reads its first token.
_BOUNDARIES = {
    "llama": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma2": "<end_of_turn>\n<start_of_turn>model\n",
}
_BATCH_NORM_EPS = 1e-5  # torch's default


class GatedReading(LastToken):
    """Objectives of the last token, weighted by a gate that reads the end of the prompt.

    Parameters
    ----------
    objectives, gate : Head
        From hidden states to objectives and to their weights, both [N, K].
    pad_token_id : int or None
        See `LastToken`.
    boundary : int64 [B]
        The ids between prompt and response, B >= 1.
    """

    def __init__(
        self, objectives: Head, gate: Head, pad_token_id: int | None, boundary: Ids
    ) -> None:
        super().__init__(objectives, pad_token_id)
        self._gate = gate
        self._boundary = boundary

    def marks(self, ids: Ids) -> tuple[int, ...]:
        """Return the first id of the last boundary."""
        width = len(self._boundary)
        if len(ids) >= width:
            windows = np.lib.stride_tricks.sliding_window_view(ids, width)
            found = np.flatnonzero((windows == self._boundary).all(axis=1))
            if len(found):
                return (int(found[-1]),)
        raise ValueError(
            "the reward model's gate reads the token behind the prompt, and its text does not have "
            f"the ids {self._boundary.tolist()} that begin an assistant's message there: use "
            "reward_template='chat' with the reward model's own chat template"
        )

    def cut(self, text: Encoded, prompt: TokenPrompt, committed: Ids) -> Cut | Exception:
        """Return the ids up to the last that is not padding, and the gate's."""
        cut = super().cut(text, prompt, committed)
        if isinstance(cut, Exception):
            return cut
        try:
            return replace(cut, marks=self.marks(cut.ids))
        except ValueError as error:
            return error

    def values(self, hidden: Tensor, marked: Tensor, cuts: Sequence[Cut]) -> list[float]:
        """Return the sums of objectives; `marked` is what the gate reads."""
        rewards: list[float] = (self.head(hidden) * self._gate(marked)).sum(dim=1).tolist()
        return rewards


def _fits(checkpoint: Checkpoint, _: RewardHead) -> bool:
    shapes = checkpoint.shapes
    transform = shapes.get(_TRANSFORM, ())
    rows = shapes.get(_REGRESSION + "weight", (0,))[0]
    square = len(transform) == 2 and transform[0] == transform[1]
    return square and rows > 0 and rows % transform[0] == 0 and _GATE + "logit_scale" in shapes


def _load(checkpoint: Checkpoint, head: RewardHead, how: Loading) -> Loaded:
    config = checkpoint.config
    if config.model_type not in _BOUNDARIES:
        raise UnsupportedModelError(
            f"{checkpoint.name} is a gated {config.model_type}; where its gate reads the prompt is "
            f"known of {', '.join(_BOUNDARIES)}: {CALLABLE_ADVICE}"
        )
    count = checkpoint.shapes[_TRANSFORM][0]
    readout = None
    if head.is_asked:  # labels are the objectives, before the gate
        readout = label_readout(head, config, count, checkpoint.name)
    model = checkpoint.backbone(how, (_REGRESSION, _TRANSFORM, _GATE))
    regression = checkpoint.tensors(_REGRESSION, model.device)
    transform = checkpoint.tensors(_TRANSFORM, model.device)[""]

    def objectives(hidden: Tensor) -> Tensor:
        found = nn.functional.linear(hidden.float(), regression["weight"], regression.get("bias"))
        return found.reshape(len(found), count, -1).mean(dim=2)

    def transformed(hidden: Tensor) -> Tensor:
        return objectives(hidden) @ transform

    pad = model.config.get_text_config().pad_token_id
    if readout is not None:
        plain = LastToken(labelled(objectives, readout), pad)
        return Loaded(model, reading=lambda _: plain)
    gate = _Gate(checkpoint.tensors(_GATE, model.device), getattr(config, "gating_temperature", 10))

    def reading(tokenizer: PreTrainedTokenizerBase) -> GatedReading:
        text = _BOUNDARIES[config.model_type]
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return GatedReading(transformed, gate, pad, np.array(ids, dtype=np.int64))

    return Loaded(model, reading=reading)


class _Gate:
    """Linear and ReLU, in QRM with batch norms behind them, then a softmax at a temperature."""

    def __init__(self, weights: dict[str, Tensor], temperature: float) -> None:
        names = {name.rsplit(".", 1)[0] for name in weights if name.startswith("layers.")}
        ordered = sorted(names, key=lambda name: int(name.split(".")[1]))
        self._layers = [
            {key.rsplit(".", 1)[1]: value for key, value in weights.items()
             if key.rsplit(".", 1)[0] == name}
            for name in ordered
        ]  # fmt: skip
        self._temperature = temperature
        self._scale = weights["logit_scale"].flatten()[0]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the weights [N, K] of the objectives."""
        inner = hidden.float()
        for layer in self._layers:
            if "running_mean" in layer:
                inner = nn.functional.batch_norm(
                    inner, layer["running_mean"], layer["running_var"], layer["weight"],
                    layer["bias"], eps=_BATCH_NORM_EPS,
                )  # fmt: skip
                continue
            inner = nn.functional.linear(inner, layer["weight"], layer.get("bias"))
            if layer is not self._layers[-1]:
                inner = inner.relu()
        return torch.softmax(inner / self._temperature, dim=1) * self._scale


GATED = Kind("objectives with a gate (ArmoRM, QRM)", _fits, _load)
